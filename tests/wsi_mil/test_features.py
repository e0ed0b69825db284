"""Bags are written once, read from every layout there is, and refused with a reason when they cannot be learnt from."""

from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from kernels.errors import InputError
from tasks.wsi_mil.features import (
    check_bag,
    find_bags,
    last_part,
    read_attributes,
    read_coords,
    read_features,
    read_label,
    write_bag,
)

RNG = np.random.default_rng(0)
X = RNG.normal(size=(7, 5)).astype(np.float32)
XY = np.stack([np.arange(7) % 3, np.arange(7) // 3], axis=1) * 448


def only(folder: Path) -> tuple[str, np.ndarray]:
    (info,) = find_bags(folder).values()
    check_bag(info)
    return info.layout, read_features(info)


def test_what_is_written_comes_back(tmp_path: Path) -> None:
    write_bag(tmp_path / "007.h5", X, XY, attributes={"patch_size_level0": 448, "settings": {"a": 1}, "none": None})
    bags = find_bags(tmp_path)
    assert list(bags) == ["007"]
    info = bags["007"]
    assert (info.num_tiles, info.dim, info.layout) == (7, 5, "fovea")
    np.testing.assert_array_equal(read_features(info), X)
    coords = read_coords(info)
    assert coords is not None
    assert coords.xy.dtype == np.int64
    np.testing.assert_array_equal(coords.xy, XY)
    assert coords.size == 448
    about = read_attributes(info)
    assert about["settings"] == '{"a": 1}'
    assert about["complete"] and about["num_tiles"] == 7 and "none" not in about
    check_bag(info)
    np.testing.assert_array_equal(last_part(info), X[-1:])


def test_half_precision_and_parts(tmp_path: Path) -> None:
    write_bag(tmp_path / "a.h5", iter([X[:3], X[3:]]), XY, float16=True, dim=5)
    (info,) = find_bags(tmp_path).values()
    with h5py.File(info.path) as file:
        assert file["features"].dtype == np.float16
        assert file["features"].fletcher32
    np.testing.assert_array_equal(read_features(info), X.astype(np.float16).astype(np.float32))
    assert read_features(info, "float16").dtype == np.float16


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (np.full((7, 5), np.nan, np.float32), "NaN or infinite; check its weights"),
        (np.full((7, 5), 1e6, np.float32), r"data\.float16=false"),
        (X[:4], "4 features for 7 coords"),
    ],
)
def test_bad_features_are_not_written(tmp_path: Path, features: np.ndarray, message: str) -> None:
    with pytest.raises(InputError, match=message):
        write_bag(tmp_path / "a.h5", features, XY, float16=True)
    assert list(tmp_path.iterdir()) == []


def test_clam_layout_prefers_the_file_with_coordinates(tmp_path: Path) -> None:
    (tmp_path / "h5_files").mkdir()
    (tmp_path / "pt_files").mkdir()
    with h5py.File(tmp_path / "h5_files" / "S.1.h5", "w") as file:
        file["features"] = X
        file["coords"] = XY
        file["coords"].attrs.update({"patch_size": 256, "patch_level": 1, "downsample": [2.0, 2.0]})
    torch.save(torch.from_numpy(X), tmp_path / "pt_files" / "S.1.pt")
    (info,) = find_bags(tmp_path).values()
    assert (info.slide_id, info.layout, info.path.suffix) == ("S.1", "clam", ".h5")
    coords = read_coords(info)
    assert coords is not None and coords.size == 512
    layout, features = only(tmp_path / "pt_files")
    assert layout == "pt"
    np.testing.assert_array_equal(features, X)


def test_trident_job_folder(tmp_path: Path) -> None:
    job = tmp_path / "20x_256px_0px_overlap"
    (job / "patches").mkdir(parents=True)
    (job / "features_uni").mkdir()
    (job / "slide_features_titan").mkdir()
    attributes = {"patch_size": 256, "patch_size_level0": 512, "overlap": 0, "level0_width": 9000, "name": "a"}
    with h5py.File(job / "patches" / "a_patches.h5", "w") as file:
        file["coords"] = XY
    with h5py.File(job / "features_uni" / "a.h5", "w") as file:
        file["features"] = X[None]
        file["coords"] = XY
        file["coords"].attrs.update(attributes)
    with h5py.File(job / "slide_features_titan" / "a.h5", "w") as file:
        file["features"] = X[0]
    layout, features = only(tmp_path)
    assert layout == "trident"
    np.testing.assert_array_equal(features, X)
    coords = read_coords(find_bags(tmp_path)["a"])
    assert coords is not None
    assert coords.size == 512 and coords.attrs["level0_width"] == 9000


def test_stamp_positions_are_micrometres(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["feats"] = X.astype(np.float16)
        file["coords"] = XY * 0.25
        file.attrs.update({"extractor": "ctranspath", "unit": "um", "tile_size_um": 256.0, "tile_size_px": 224})
    layout, features = only(tmp_path)
    assert layout == "stamp"
    np.testing.assert_array_equal(features, X.astype(np.float16))
    info = find_bags(tmp_path)["a"]
    coords = read_coords(info, mpp=0.25)
    assert coords is not None
    np.testing.assert_array_equal(coords.xy, XY)
    assert (coords.size, coords.attrs["unit"]) == (1024, "um")
    with pytest.raises(InputError, match="positions are in micrometres; the slide is needed"):
        read_coords(info)


def test_acmil_file_holds_many_bags_with_labels(tmp_path: Path) -> None:
    path = tmp_path / "patch_feats_pretrain_vit.h5"
    with h5py.File(path, "w") as file:
        for name, label in (("tumor_001", 1), ("normal_001", 0)):
            group = file.create_group(name)
            group["feat"] = X.astype(np.float16)
            group["coords"] = XY
            group.attrs["label"] = label
    bags = find_bags(path)
    assert list(bags) == ["normal_001", "tumor_001"]
    assert bags["tumor_001"].layout == "acmil" and bags["tumor_001"].key == "tumor_001"
    assert read_label(bags["tumor_001"]) == "1"
    coords = read_coords(bags["tumor_001"])
    assert coords is not None and coords.size == 448  # the smallest distance between two tiles
    for info in bags.values():
        check_bag(info)
        np.testing.assert_array_equal(read_features(info), X.astype(np.float16).astype(np.float32))


@pytest.mark.parametrize("content", ["tensor", "dictionary", "bfloat16", "legacy"])
def test_tensors_in_pt_files(tmp_path: Path, content: str) -> None:
    tensor = torch.from_numpy(X)
    saved = {
        "tensor": tensor,
        "dictionary": {"feats": tensor, "coords": torch.from_numpy(XY)},
        "bfloat16": tensor.bfloat16(),
        "legacy": tensor,
    }[content]
    torch.save(saved, tmp_path / "a.pt", _use_new_zipfile_serialization=content != "legacy")
    layout, features = only(tmp_path)
    assert layout == "pt"
    np.testing.assert_allclose(features, X, rtol=1e-2 if content == "bfloat16" else 0)
    coords = read_coords(find_bags(tmp_path)["a"])
    assert (coords is not None) == (content == "dictionary")


def test_arrays_in_npy_files(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", X.astype(np.float64))
    layout, features = only(tmp_path)
    assert (layout, features.dtype) == ("npy", np.float32)
    np.testing.assert_allclose(features, X)
    assert read_coords(find_bags(tmp_path)["a"]) is None


def test_code_in_a_pt_file_is_not_run(tmp_path: Path) -> None:
    torch.save({"features": Path("x")}, tmp_path / "a.pt")
    with pytest.raises(InputError, match="cannot be read as tensors alone"):
        find_bags(tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a.h5", "cannot be read as HDF5"),
        ("a.pt", "cannot be read as tensors"),
        ("a.npy", "cannot be read as a numpy array"),
    ],
)
def test_damaged_files_are_refused_with_their_name(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / name).write_bytes(b"half a file")
    with pytest.raises(InputError, match=message) as caught:
        find_bags(tmp_path)
    assert name in str(caught.value)


def test_a_truncated_hdf5_file_is_refused(tmp_path: Path) -> None:
    write_bag(tmp_path / "a.h5", X, XY)
    content = (tmp_path / "a.h5").read_bytes()
    (tmp_path / "a.h5").write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"a\.h5 cannot be read as HDF5 .*damaged or incomplete"):
        find_bags(tmp_path)


def test_a_flipped_byte_in_the_features_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    write_bag(path, X, XY)
    content = bytearray(path.read_bytes())
    place = content.index(X.tobytes())
    content[place + 9] ^= 0xFF
    path.write_bytes(content)
    (info,) = find_bags(path).values()
    with pytest.raises(InputError, match="damaged"):
        read_features(info)


def test_nothing_missing_and_duplicates_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        find_bags(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no features"):
        find_bags(tmp_path / "empty")
    write_bag(tmp_path / "uni" / "a.h5", X, XY)
    write_bag(tmp_path / "phikon" / "a.h5", X[:, :3], XY)
    with pytest.raises(InputError, match=r"slide 'a' has two feature files, .*phikon.*a\.h5 and .*uni.*a\.h5"):
        find_bags(tmp_path)


def test_ids_that_lead_out_of_the_folder_are_refused(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "all.h5", "w") as file:
        file.create_group(".. x")["feat"] = X
    with pytest.raises(InputError, match=r"id '\.\. x' cannot be used as a file name"):
        find_bags(tmp_path)


def test_files_being_written_are_passed_over(tmp_path: Path) -> None:
    write_bag(tmp_path / "a.h5", X, XY)
    (tmp_path / ".b.h5.x1.partial.h5").write_bytes(b"half")
    assert list(find_bags(tmp_path)) == ["a"]


@pytest.mark.parametrize(
    ("features", "coords", "message"),
    [
        (np.zeros((0, 5), np.float32), np.zeros((0, 2)), r"has no tiles \(0 x 5\)"),
        (X, XY[:3], "has 7 features but 3 coords"),
        (np.where(np.arange(7)[:, None] == 4, np.nan, X), XY, "NaN or infinite values, 5 of them from tile 4"),
        (np.where(np.arange(7)[:, None] == 2, np.inf, X), XY, "NaN or infinite values, 5 of them from tile 2"),
    ],
)
def test_bags_that_cannot_be_learnt_from_are_refused(
    tmp_path: Path, features: np.ndarray, coords: np.ndarray, message: str
) -> None:
    with h5py.File(tmp_path / "S-4.h5", "w") as file:
        file["features"], file["coords"] = features, coords
    (info,) = find_bags(tmp_path).values()
    with pytest.raises(InputError, match=message) as caught:
        check_bag(info)
    assert "S-4" in str(caught.value)
