"""Our top-level names are common words: no library may pick them up by accident, and none of theirs may hide ours.

Each check runs in a fresh interpreter, because what is imported here already would hide the answer.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = ("kernels", "tasks", "conf", "attention", "backbones")
# What we use, and what is often installed beside it and probes for a package called ``kernels`` of its own.
LIBRARIES = (
    "torch", "torchvision", "timm", "lightning", "torchmetrics", "hydra", "omegaconf", "huggingface_hub", "safetensors",
    "openslide", "tifffile", "cv2", "h5py", "pandas", "sklearn", "scipy", "matplotlib", "transformers", "peft", "monai",
    "diffusers", "accelerate",
)  # fmt: skip
HEAVY = ("torch", "numpy", "openslide", "cv2", "lightning", "matplotlib", "timm", "pandas", "scipy", "hydra")


def run_python(code: str, cwd: Path, path: str | None = None) -> dict:
    """Run ``code`` in a new interpreter as ``python -c`` would from ``cwd``; it must print one JSON object last."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    if path is not None:
        environment["PYTHONPATH"] = path
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(json.loads(done.stdout.splitlines()[-1]))


def installed(names: tuple[str, ...]) -> list[str]:
    return [name for name in names if importlib.util.find_spec(name) is not None]


IMPORT_EACH = """
import importlib, json, sys
ours = {ours!r}
report = {{"pulled_in": {{}}, "origins": {{}}}}
for library in {libraries!r}:
    before = set(sys.modules)
    importlib.import_module(library)
    taken = [name for name in sys.modules if name not in before and name.split(".")[0] in ours]
    if taken:
        report["pulled_in"][library] = taken
for name in ours:
    module = importlib.import_module(name)
    report["origins"][name] = module.__file__
print(json.dumps(report))
"""


def check_no_shadowing(cwd: Path, home: Path, path: str | None = None) -> None:
    code = IMPORT_EACH.format(ours=OURS, libraries=installed(LIBRARIES))
    report = run_python(code, cwd, path)
    # transformers tries ``from kernels import ...`` and goes on without when that fails. It may find our package, which
    # is empty, but nothing below it.
    accidents = {library: names for library, names in report["pulled_in"].items() if names != ["kernels"]}
    assert not accidents, "a library imported a package of ours"
    for name, origin in report["origins"].items():
        assert Path(origin).resolve().is_relative_to(home.resolve()), f"{name} comes from {origin}"


def test_no_library_imports_ours_and_ours_come_from_the_checkout() -> None:
    check_no_shadowing(ROOT, ROOT)


@pytest.mark.parametrize("ours_first", [True, False])
def test_the_libraries_work_whichever_is_imported_first(ours_first: bool) -> None:
    ours = "; ".join(f"import {name}" for name in OURS)
    theirs = "; ".join(f"import {name}" for name in installed(("torch", "timm", "lightning", "transformers", "peft")))
    order = f"{ours}; {theirs}" if ours_first else f"{theirs}; {ours}"
    code = (
        f"import json, sys; {order}; import torch, timm\n"
        "model = timm.create_model('resnet10t', num_classes=3).eval()\n"
        "with torch.inference_mode():\n"
        "    shapes = [list(model(torch.zeros(1, 3, 32, 32)).shape)]\n"
        "if 'transformers' in sys.modules:\n"
        "    from transformers import ViTConfig, ViTModel\n"
        "    small = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)\n"
        "    output = ViTModel(ViTConfig(image_size=32, **small))(torch.zeros(1, 3, 32, 32)).last_hidden_state\n"
        "    shapes.append(list(output.shape)[::2])\n"
        "print(json.dumps({'shapes': shapes}))"
    )
    expected = [[1, 3], [1, 8]] if installed(("transformers",)) else [[1, 3]]
    assert run_python(code, ROOT)["shapes"] == expected


@pytest.mark.parametrize("package", ["kernels", "tasks", "conf", "attention", "backbones", "tasks.wsi_mil"])
def test_importing_a_package_of_ours_loads_nothing_heavy(package: str) -> None:
    code = (
        f"import json, sys; import {package}\n"
        f"print(json.dumps({{'heavy': [name for name in {HEAVY!r} if name in sys.modules]}}))"
    )
    assert run_python(code, ROOT)["heavy"] == []


def test_importing_kernels_changes_nothing() -> None:
    code = (
        "import json, os, sys, warnings\n"
        "before = (set(sys.modules), dict(os.environ), list(sys.path), list(warnings.filters))\n"
        "import kernels\n"
        "new = sorted(set(sys.modules) - before[0])\n"
        "same = (dict(os.environ), list(sys.path), list(warnings.filters)) == before[1:]\n"
        "public = [name for name in vars(kernels) if not name.startswith('__')]\n"
        "print(json.dumps({'new': new, 'same': same, 'public': public}))"
    )
    report = run_python(code, ROOT)
    assert report == {"new": ["kernels"], "same": True, "public": []}


@pytest.mark.slow
def test_the_same_holds_for_an_installed_wheel(tmp_path: Path) -> None:
    """Built and unpacked into a folder of its own, imported from elsewhere: what ``pip install`` gives."""
    pytest.importorskip("setuptools", reason="building a wheel without the network needs setuptools here")
    source, site = tmp_path / "source", tmp_path / "site"
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("the list of files to package comes from git")
    for name in tracked.stdout.split("\0"):
        if name and (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    (source / "README.md").touch()
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*install, "--target", str(site), str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    check_no_shadowing(tmp_path, site, str(site))
    assert (site / "conf" / "common.yaml").is_file(), "the configuration is not in the wheel"
