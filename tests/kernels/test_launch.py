"""Choosing, tuning and recording launches, with a kernel that runs in Triton's interpreter; and its traps."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import autotune, backend
from kernels.errors import InputError
from kernels.launch import MAX_CONFIGS, Config, launch, precision, recording

interpreted = pytest.mark.skipif(not backend.INTERPRETING, reason="the kernels are compiled in this process")


@triton.jit
def _double(x, y, size, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + place, 2 * tl.load(x + place, mask=place < size, other=0.0), mask=place < size)


CONFIGS = [Config({"BLOCK": 16}), Config({"BLOCK": 32}), Config({"BLOCK": 64}, num_warps=8)]


def double(x: Tensor, configs: list[Config] = CONFIGS) -> Tensor:
    y = torch.full_like(x, torch.nan)
    grid = lambda c: (triton.cdiv(x.numel(), c["BLOCK"]),)  # noqa: E731
    launch(_double, grid, {"x": x, "y": y, "size": x.numel()}, configs, key=(x.numel(),))
    return y


@interpreted
def test_the_first_configuration_is_taken_without_tuning() -> None:
    x = torch.randn(37)
    assert torch.equal(double(x), 2 * x)
    assert double(torch.empty(0)).numel() == 0


def test_recording_collects_every_configuration_and_runs_nothing() -> None:
    with recording() as recorder:
        double(torch.empty(37, device="meta"))
    assert [launch.config for launch in recorder.launches] == CONFIGS
    assert recorder.launches[0].arguments["size"] == 37


def test_the_number_of_configurations_is_bounded() -> None:
    with pytest.raises(AssertionError, match="13 configurations"):
        double(torch.randn(3), [Config({"BLOCK": 16})] * (MAX_CONFIGS + 1))


def counting(times: dict[str, float], calls: list[str]) -> Callable[[Callable[[], None]], float]:
    def timer(call: Callable[[], None]) -> float:
        call()
        return times[calls[-1]]

    return timer


def test_tuning_times_each_configuration_once_and_remembers_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOVEA_CACHE", str(tmp_path))
    autotune.forget()
    calls: list[str] = []
    times = {str(c): t for c, t in zip(CONFIGS, (3.0, 1.0, 2.0), strict=True)}

    def tune(key: tuple[int, ...] = (5,)) -> Config:
        return autotune.best(
            _double, CONFIGS, key, torch.device("cpu"), lambda c: calls.append(str(c)), counting(times, calls)
        )

    assert tune() == CONFIGS[1] and len(calls) == 3
    assert tune() == CONFIGS[1] and len(calls) == 3
    autotune.forget()  # as a new process
    assert tune() == CONFIGS[1] and len(calls) == 3
    assert list(json.loads((tmp_path / "kernels.json").read_text()).values()) == [str(CONFIGS[1])]
    assert tune((6,)) == CONFIGS[1] and len(calls) == 6
    (tmp_path / "kernels.json").write_text("{ broken")
    autotune.forget()
    assert tune() == CONFIGS[1] and len(calls) == 9


def test_a_configuration_that_does_not_launch_loses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOVEA_CACHE", str(tmp_path))
    autotune.forget()

    def run(config: Config) -> None:
        if config != CONFIGS[2]:
            raise RuntimeError("out of shared memory")

    def timer(call: Callable[[], None]) -> float:
        call()
        return 1.0

    assert autotune.best(_double, CONFIGS, (), torch.device("cpu"), run, timer) == CONFIGS[2]
    assert autotune.best(_double, CONFIGS[:2], (), torch.device("cpu"), run, timer) == CONFIGS[0]
    assert [autotune.size_bucket(n) for n in (1, 2, 3, 64, 65)] == [1, 2, 4, 64, 128]


def test_exact_products_unless_told_otherwise() -> None:
    assert precision(torch.float32) == "ieee"
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert precision(torch.float32) == "tf32" and precision(torch.bfloat16) == "ieee"
    finally:
        torch.set_float32_matmul_precision(before)


@interpreted
def test_the_interpreter_still_computes_bfloat16_wrongly_and_is_refused() -> None:
    x = torch.tensor([1.0, 3.0, -2.5], dtype=torch.bfloat16)
    y = torch.empty_like(x)
    launch(_double, lambda c: (1,), {"x": x, "y": y, "size": 3}, [Config({"BLOCK": 16})])
    assert not torch.equal(y, 2 * x), "the interpreter has learnt bfloat16: the refusal in kernels.backend can go"
    with pytest.raises(InputError, match="interpreter computes bfloat16 wrongly"):
        backend.choose("varlen_attention", "triton", [x])
