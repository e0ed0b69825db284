"""When memory runs out: what would fit, found by trying, so that the user need not."""

from __future__ import annotations

import contextlib
import gc
import traceback
from collections.abc import Callable, Iterator, Sequence

import torch

from kernels.errors import InputError

_SAID = (
    "out of memory",
    "can't allocate memory",
    "std::bad_alloc",
    "could not create a primitive",
    "could not create a memory",
)
"""By CUDA, by PyTorch's allocator on a CPU, by C++, and by oneDNN, whose own buffers come on top of a map's."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory, of a GPU or of the machine, ran out."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    said = str(error).lower()
    return isinstance(error, RuntimeError) and any(part in said for part in _SAID)


@contextlib.contextmanager
def explain_out_of_memory(
    step: Callable[[int, tuple[int, ...]], None],
    batch_size: int,
    size: Sequence[int],
    multiple: int = 16,
    options: tuple[str, str] = ("training.batch_size", "data.size"),
    per_item: int = 1,
) -> Iterator[None]:
    """Turn running out of memory into a sentence with the batch or the size that would fit.

    Args:
        step: one training step with a batch of so many images of a size; tried with less and less.
        batch_size: that of the run.
        size: spatial size of the images or patches.
        multiple: sizes are tried in steps of this.
        options: names of the settings to change.
        per_item: images or patches of each of a batch's ``batch_size`` items.

    Raises:
        InputError: memory ran out in the block.
    """
    try:
        yield
        return
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        _empty_frames(error)
        failure = error.with_traceback(None)
    shape = "x".join(map(str, size))
    fits = what_fits(lambda batch, tried: step(batch * per_item, tried), batch_size, size, multiple)
    if fits is None:
        advice = "not even one small image fits; use a smaller network."
    elif fits[1] == tuple(size):
        advice = f"{options[0]}={fits[0]} fits; trainer.accumulate_grad_batches keeps the effective batch."
    else:
        advice = f"{options[0]}={fits[0]} with {options[1]}=[{','.join(map(str, fits[1]))}] fits."
    raise InputError(f"memory ran out with {batch_size * per_item} images of {shape} at once: {advice}") from failure


def what_fits(
    step: Callable[[int, tuple[int, ...]], None], batch_size: int, size: Sequence[int], multiple: int = 16
) -> tuple[int, tuple[int, ...]] | None:
    """The largest halved batch that a step has memory for, else a smaller size of one image, else None."""
    batch, tried = batch_size // 2, tuple(size)
    while batch >= 1:
        if _runs(step, batch, tried):
            return batch, tried
        batch //= 2
    while max(tried) > multiple:
        tried = tuple(max(min(multiple, n), int(n * 0.8) // multiple * multiple) for n in tried)
        if _runs(step, 1, tried):
            return 1, tried
    return None


def _runs(step: Callable[[int, tuple[int, ...]], None], batch: int, size: tuple[int, ...]) -> bool:
    _release()
    try:
        step(batch, size)
    except InputError:  # the network takes nothing as small as that
        return False
    except Exception as error:
        if is_out_of_memory(error):
            _empty_frames(error)
            return False
        raise
    finally:
        _release()
    return True


def _empty_frames(error: BaseException | None) -> None:
    """Let go of the tensors that filled the memory, which the frames that an exception came through still hold.

    The frames in turn are held by the ``with`` statement that it is leaving, whatever is done to the exception itself.
    """
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
