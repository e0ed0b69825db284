"""Our modules, loaded from the released code's weights, give the released code's numbers."""

import fnmatch
from pathlib import Path

import pytest

from tests.parity import adapters as _adapters  # noqa: F401  (registers them)
from tests.parity.harness import OWN, adapter_for, case_paths, compare, load_case

CASES = case_paths()
PENDING = [
    line.split("#")[0].strip()
    for line in (Path(__file__).parent / "PENDING.txt").read_text().splitlines()
    if line.split("#")[0].strip()
]


@pytest.mark.parametrize("name", [name for name in CASES if adapter_for(name) is not None])
def test_our_code_reproduces_the_released_code(name: str) -> None:
    adapter = adapter_for(name)
    assert adapter is not None
    case = load_case(CASES[name])
    compare(case, adapter.run(case), adapter.skip)


def test_every_case_has_an_adapter_or_is_listed_as_pending() -> None:
    forgotten = [n for n in CASES if adapter_for(n) is None and not any(fnmatch.fnmatch(n, p) for p in PENDING)]
    assert not forgotten, f"neither run nor listed in PENDING.txt: {forgotten}"


def test_the_copied_cases_all_run_and_stay_small() -> None:
    own = sorted(OWN.glob("*.json"))
    assert own, "no parity case in the repository"
    assert all(adapter_for(path.stem) is not None for path in own)
    assert sum(path.stat().st_size for path in OWN.iterdir()) < 15e6
