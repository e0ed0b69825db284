"""Every notebook runs from top to bottom on its small configuration, and is kept without outputs."""

from __future__ import annotations

import math
import re
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
_LONGEST_CELL = 20  # lines: what is longer belongs in the package


def executed(path: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> nbformat.NotebookNode:
    """The notebook after a run in its own folder, as a user would start it."""
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("FOVEA_NOTEBOOK_SMALL", "1")
    monkeypatch.setenv("FOVEA_NOTEBOOK_OUT", str(out))
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    # The kernel that runs must be this interpreter, whatever is registered under the notebook's name.
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "1")
    notebook = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(path.parent)}})
    client.execute()
    return notebook


def text_of(notebook: nbformat.NotebookNode) -> str:
    """All text the cells printed."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(output.get("text", "") for output in outputs if output.output_type == "stream")


def pictures_in(notebook: nbformat.NotebookNode) -> int:
    """Number of pictures the cells displayed."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return sum(any(kind.startswith("image/") for kind in output.get("data", {})) for output in outputs)


@pytest.mark.slow
def test_the_slide_notebook_goes_from_slides_to_a_heat_map(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = executed(ROOT / "notebooks" / "wsi_mil.ipynb", tmp_path, monkeypatch)
    found = re.search(r"mean over all tumour slides: ([\d.]+)", text_of(notebook))
    assert found is not None and math.isfinite(float(found[1]))
    assert pictures_in(notebook) == 6
    assert (tmp_path / "run" / "report.html").is_file()


@pytest.mark.slow
def test_the_classification_notebook_compares_modules_at_their_cost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notebook = executed(ROOT / "notebooks" / "classification.ipynb", tmp_path, monkeypatch)
    found = re.search(r"accuracy of mean colours: ([\d.]+)", text_of(notebook))
    assert found is not None and 0 < float(found[1]) < 1
    assert pictures_in(notebook) == 3
    assert (tmp_path / "sweep" / "comparison.csv").is_file()


@pytest.mark.slow
def test_the_segmentation_notebook_goes_from_images_to_outlines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notebook = executed(ROOT / "notebooks" / "qtseg.ipynb", tmp_path, monkeypatch)
    found = re.search(r"Dice of the threshold: ([\d.]+), of the network: ([\d.]+)", text_of(notebook))
    assert found is not None and 0 < float(found[1]) < 1
    assert pictures_in(notebook) == 4
    assert (tmp_path / "sweep" / "comparison.csv").is_file()
    assert (tmp_path / "predicted" / "lesion_000" / "contours.geojson").is_file()


@pytest.mark.slow
def test_the_meningioma_notebook_goes_from_heads_to_volumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = executed(ROOT / "notebooks" / "meningioma.ipynb", tmp_path, monkeypatch)
    found = re.search(r"mean Dice ([\d.]+) \(", text_of(notebook))
    assert found is not None and 0 <= float(found[1]) <= 1
    assert pictures_in(notebook) >= 3
    assert (tmp_path / "new").is_dir() and list((tmp_path / "new").glob("*/mask.nii.gz"))


def test_every_notebook_is_run_by_a_test_here() -> None:
    assert NOTEBOOKS
    source = Path(__file__).read_text()
    for path in NOTEBOOKS:
        assert f'"{path.name}"' in source, f"no test runs {path.name}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebooks_are_kept_without_outputs_in_short_cells(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.cells[0].cell_type == "markdown", "text first"
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert not cell.outputs and cell.execution_count is None, f"outputs are kept in {path.name}: clear them"
            assert len(cell.source.splitlines()) <= _LONGEST_CELL, f"a cell is too long:\n{cell.source}"
            compile(re.sub(r"^[!%].*$", "", cell.source, flags=re.M), str(path), "exec")


def test_the_interpreter_of_the_tests_has_a_kernel() -> None:
    specs = pytest.importorskip("jupyter_client.kernelspec")
    pytest.importorskip("ipykernel")
    argv = specs.KernelSpecManager().get_kernel_spec("python3").argv
    assert Path(argv[0]).name.startswith("python") or argv[0] == sys.executable
