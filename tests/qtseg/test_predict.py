"""New images to files that others can open: masks, outlines, areas, ONNX."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from kernels.errors import InputError
from tasks.common.cli import main
from tasks.common.contours import rasterise, read_geojson
from tasks.qtseg import predict
from tasks.qtseg.__main__ import TASK
from tasks.qtseg.predict_inputs import find_images
from tests.qtseg.squares import read_picture, square, write_set
from tests.qtseg.test_run import train

PREDICT = ["action=predict", "inference.device=cpu"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    write_set(folder / "set", count=16)
    tiles = ["data.resize=tiles", "data.img_size=32", "training.draws=2", "training.epochs=10", "crossval.folds=2"]
    assert train(*tiles, "evaluation.worst=0", folder=str(folder / "run"), data=str(folder / "set" / "images.csv")) == 0
    return folder / "run"


@pytest.fixture
def new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for seed, (name, size) in enumerate({"a.png": (40, 61), "sub/a.png": (75, 33), "b.tif": (20, 24)}.items()):
        image, _ = square(100 + seed, size) if min(size) > 30 else (np.full((*size, 3), 90, np.uint8), None)
        Path("new", name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image if seed else image[..., 0]).save(Path("new", name))
    return tmp_path / "new"


def test_masks_and_outlines_are_at_the_images_own_size(trained: Path, new: Path) -> None:
    assert main(TASK, [*PREDICT, f"checkpoint={trained}", "input=new", "out=out", "inference.probabilities=true"]) == 0
    table = pd.read_csv("out/areas.csv", index_col="image")
    assert list(table.index) == ["a", "b", "sub_a"] and (table["networks"] == 2).all()
    for name, size in (("a", (40, 61)), ("sub_a", (75, 33)), ("b", (20, 24))):
        mask = read_picture(f"out/{name}/mask.png")
        assert mask.shape == size and set(np.unique(mask)) <= {0, 255}
        assert read_picture(f"out/{name}/probability.png").shape == size
        assert (mask > 0).sum() == table.loc[name, "foreground_pixels"]
        content = json.loads(Path(f"out/{name}/contours.geojson").read_text())
        assert content["type"] == "FeatureCollection"
        assert len(content["features"]) == table.loc[name, "foreground_pieces"]
        if content["features"]:
            contours, _ = read_geojson(Path(f"out/{name}/contours.geojson"))
            assert sum(c.area for c in contours) == (mask > 0).sum()
            inside = rasterise(contours, size, (1.0, 1.0))
            assert inside[mask > 0].all()
        assert read_picture(f"out/{name}/overlay.png").shape[1] >= size[1]
    assert (table["foreground_pixels"] > 0).any()
    assert "Outlines" in Path("out/report.html").read_text()


def test_a_prediction_goes_on_where_it_stopped(
    trained: Path, new: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    segment, done = predict._segment, []

    def stop_after_two(*arguments: object) -> dict[str, object]:
        if len(done) == 2:
            raise RuntimeError("the plug was pulled")
        done.append(arguments[1])
        return segment(*arguments)  # type: ignore[arg-type]

    options = [*PREDICT, f"checkpoint={trained}/fold_00", "input=new", "out=out"]
    with monkeypatch.context() as patch:
        patch.setattr(predict, "_segment", stop_after_two)
        with pytest.raises(RuntimeError, match="plug"):
            main(TASK, options)
    first = Path("out/a/mask.png").stat().st_mtime_ns
    assert not Path("out/sub_a/mask.png").exists()
    assert main(TASK, options) == 0
    assert Path("out/a/mask.png").stat().st_mtime_ns == first and len(pd.read_csv("out/areas.csv")) == 3
    # A file that cannot be read does not stop the others, and the exit code tells.
    Path("new/broken.png").write_bytes(b"nothing")
    capsys.readouterr()
    assert main(TASK, [*options[:-1], "out=partly"]) == 2
    assert "1 of 4 images could not be segmented: new/broken.png" in capsys.readouterr().err
    assert len(pd.read_csv("partly/areas.csv")) == 3


def test_the_onnx_file_computes_what_the_network_does(trained: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    assert main(TASK, ["action=export", f"checkpoint={trained}/fold_01", f"out={tmp_path}", "export.softmax=true"]) == 0
    about = json.loads((tmp_path / "model.json").read_text())
    assert about["input"] == ["batch", 3, 32, 32] and about["output"] == "probabilities"
    session = runtime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"image": np.zeros((3, 3, 32, 32), np.float32)})
    assert found.shape == (3, 2, 32, 32) and np.allclose(found.sum(1), 1, atol=1e-5)


def test_inputs_are_files_folders_and_tables(new: Path) -> None:
    assert [image.name for image in find_images(["new/a.png", "new/b.tif"])] == ["a", "b"]
    Path("list.csv").write_text("image,id\nnew/a.png,first\nnew/sub/a.png,second\n")
    assert [image.name for image in find_images("list.csv")] == ["first", "second"]
    Image.fromarray(read_picture("new/a.png")).save("new/a.jpg")
    assert [image.name for image in find_images("new")] == ["a_jpg", "a_png", "b", "sub_a"]
    for text, said in (("image,id\nnew/a.png,../x\n", "file name"), ("image\nnew/z.png\n", "row 2: image 'new/z.png'")):
        Path("bad.csv").write_text(text)
        with pytest.raises(InputError, match=said):
            find_images("bad.csv")
    Path("empty").mkdir()
    for given in (None, "nowhere", "empty"):
        with pytest.raises(InputError, match="input="):
            find_images(given)
