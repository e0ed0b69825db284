"""What each Triton kernel compiles to, without a GPU: registers, spills, shared memory, tensor-core instructions.

Every operator's module ``kernels.<operator>.triton_cases`` has ``cases()``, an iterator of names and functions without
arguments: calls of its Triton path on meta tensors that between them reach every configuration the dispatcher can
choose. Each is run with its launches recorded (:func:`kernels.launch.recording`), and each recorded launch is compiled
by the whole NVIDIA pipeline.
"""

from __future__ import annotations

import concurrent.futures
import importlib
import importlib.util
import json
import multiprocessing
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernels.backend import OPERATORS
from kernels.errors import InputError
from kernels.launch import Config, Launch, recording

# Bytes of shared memory one block may use, by compute capability.
SHARED_MEMORY = {80: 166_912, 90: 232_448}

_TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "i1",
}


@dataclass(frozen=True)
class Compiled:
    """One kernel in one configuration for one GPU.

    Attributes:
        case: what called it.
        registers: per thread.
        spills: bytes of stack per thread.
        allowed_spills: what its configuration states.
        shared: bytes of shared memory per block.
        tensor_cores: ``wgmma``, ``mma`` or ``-``.
        problem: the compiler's error, or which bound is broken; empty when all is well.
    """

    operator: str
    case: str
    kernel: str
    config: str
    capability: int
    registers: int = 0
    spills: int = 0
    allowed_spills: int = 0
    shared: int = 0
    tensor_cores: str = "-"
    seconds: float = 0.0
    problem: str = ""


def packages(operators: Iterable[str] = ()) -> list[str]:
    """The packages of these operators (default: all) that have Triton cases."""
    chosen = list(operators) or list(OPERATORS)
    modules = dict.fromkeys(OPERATORS[name].partition(":")[0] for name in chosen)
    return [m for m in modules if importlib.util.find_spec(m) and importlib.util.find_spec(f"{m}.triton_cases")]


def compile_all(operators: Iterable[str] = (), workers: int | None = None) -> Iterator[Compiled]:
    """Compile every launch of these operators (default: all) for every capability in ``SHARED_MEMORY``.

    Raises:
        InputError: the process interprets Triton's kernels, so that there is nothing to compile.
    """
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        raise InputError("TRITON_INTERPRET=1 replaces Triton's compiler by its interpreter; unset it to compile.")
    counts = {package: len(_launches(package)) for package in packages(operators)}
    jobs = [(p, cap, i) for p, count in counts.items() for cap in SHARED_MEMORY for i in range(count)]
    workers = workers or min(4, os.cpu_count() or 1)
    # A worker imports torch and the operators once; forking would copy this process's threads' locks.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
        yield from pool.map(_compile_job, jobs, chunksize=4)


@cache
def _launches(package: str) -> list[tuple[str, Launch]]:
    """Recorded launches of a package, each distinct specialisation once."""
    found: dict[str, tuple[str, Launch]] = {}
    for case, call in importlib.import_module(f"{package}.triton_cases").cases():
        with recording() as recorder:
            call()
        for launch in recorder.launches:
            found.setdefault(repr((launch.kernel.__name__, _specialise(launch), launch.config)), (case, launch))
    return list(found.values())


def _compile_job(job: tuple[str, int, int]) -> Compiled:
    package, capability, index = job
    case, launch = _launches(package)[index]
    return compile_launch(package.rpartition(".")[2], case, launch, capability)


def _specialise(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int, ...], list[list[Any]]]]:
    """Signature, constants and divisibility, as Triton derives them from the arguments of a call."""
    kernel = launch.kernel
    given = {**launch.arguments, **launch.config.constants}
    absent = [name for name in kernel.arg_names if name not in given]
    if absent or len(given) != len(kernel.arg_names):
        unknown = [name for name in given if name not in kernel.arg_names]
        raise TypeError(f"{kernel.__name__}: arguments absent {absent}, unknown {unknown}")
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    is_constant = {parameter.name: parameter.is_constexpr for parameter in kernel.params}
    for position, name in enumerate(kernel.arg_names):
        value = given[name]
        if is_constant[name] or value is None or (isinstance(value, int) and value == 1 and value is not True):
            signature[name] = "constexpr"
            constants[name] = value
        elif isinstance(value, Tensor):
            signature[name] = f"*{_TYPES[value.dtype]}"
            if value.storage_offset() * value.element_size() % 16 == 0:
                attributes[(position,)] = [["tt.divisibility", 16]]
        elif isinstance(value, bool):
            signature[name] = "i1"
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(position,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            raise TypeError(f"{kernel.__name__}: argument {name} is a {type(value).__name__}")
    return signature, constants, attributes


def compile_launch(operator: str, case: str, launch: Launch, capability: int) -> Compiled:
    """Compile one recorded launch and hold it against its bounds."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    config: Config = launch.config
    tensors = [v for v in launch.arguments.values() if isinstance(v, Tensor) and v.is_floating_point()]
    dtype = str(tensors[0].dtype).removeprefix("torch.") if tensors else ""
    about: Mapping[str, Any] = {
        "operator": operator,
        "case": f"{case} {dtype}",
        "kernel": launch.kernel.__name__,
        "config": str(config),
        "capability": capability,
        "allowed_spills": config.spills,
    }
    start = time.perf_counter()
    try:
        signature, constants, attributes = _specialise(launch)
        compiled = triton.compile(
            ASTSource(launch.kernel, signature, constants, attributes),
            target=GPUTarget("cuda", capability, 32),
            options={"num_warps": config.num_warps, "num_stages": config.num_stages},
        )
        registers, spills = _resources(compiled.asm["cubin"])
    except Exception as error:  # whatever the compiler raises is this configuration's result
        return Compiled(**about, problem=f"does not compile: {type(error).__name__}: {error}")
    shared = int(compiled.metadata.shared)
    assembly = compiled.asm["ptx"]
    problem = ""
    if spills > config.spills:
        problem = f"spills {spills} bytes per thread, {config.spills} allowed"
    if shared > SHARED_MEMORY[capability]:
        problem = f"needs {shared} bytes of shared memory, {SHARED_MEMORY[capability]} there are"
    return Compiled(
        **about,
        registers=registers,
        spills=spills,
        shared=shared,
        tensor_cores="wgmma" if "wgmma.mma" in assembly else "mma" if "mma.sync" in assembly else "-",
        seconds=time.perf_counter() - start,
        problem=problem,
    )


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and stack bytes per thread, from the assembler's own tool."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        text = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+)", text), re.search(r"STACK:(\d+)", text)
    if registers is None or stack is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {text!r}")
    return int(registers[1]), int(stack[1])


def as_json(rows: Sequence[Compiled]) -> str:
    """The rows as JSON."""
    return json.dumps([asdict(row) for row in rows], indent=1)
