"""A network as an ONNX file, compared with itself before it is kept."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from kernels.errors import InputError
from tasks.common.files import atomic_path

TOLERANCE = 1e-4


def export_onnx(
    network: nn.Module,
    path: str | Path,
    in_channels: int = 3,
    size: int | Sequence[int] = 512,
    softmax: bool = False,
) -> float:
    """Write ``network`` for images (B, in_channels, *size) of any batch size, and run the file on one image.

    The input is called ``image``, the output ``logits``, or ``probabilities`` with ``softmax``.

    Returns:
        The largest difference between the file's output and the network's, relative to the largest output.

    Raises:
        InputError: ONNX or its runtime is not installed, the network cannot be exported, or the file computes something
            else, in which case none is left.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise InputError(
            "the export needs onnx, onnxscript and onnxruntime; install them with: pip install 'fovea-toolkit[onnx]'"
        ) from error
    sides = (size, size) if isinstance(size, int) else tuple(size)
    output = "probabilities" if softmax else "logits"
    training = network.training
    sample = next(network.parameters())
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, in_channels, *sides, generator=generator).to(sample.device, sample.dtype)
    whole = _Exported(network, softmax).eval()
    try:
        with torch.no_grad(), _silence():
            expected = whole(images)[:1].float().cpu().numpy()
            program = torch.onnx.export(
                whole,
                (images,),
                dynamo=True,
                input_names=["image"],
                output_names=[output],
                dynamic_shapes={"x": {0: torch.export.Dim("batch", min=1)}},
                verbose=False,
            )
    except (torch.onnx.OnnxExporterError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")[:200]
        raise InputError(f"the network cannot be written as ONNX ({reason}).") from error
    finally:
        network.train(training)
    assert program is not None
    with atomic_path(Path(path)) as temporary:
        program.save(str(temporary))
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(str(temporary), options, providers=["CPUExecutionProvider"])
        # One image, where two were traced: a file that took over the number of images would refuse it.
        try:
            (found,) = session.run([output], {"image": images[:1].float().cpu().numpy()})
        except Exception as error:  # the runtime's own kinds have no common base that it exports
            reason = str(error).strip().splitlines()[0].rstrip(".")[:200]
            raise InputError(f"the ONNX file does not run on one image ({reason}).") from error
        off = float(np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-12))
        if not off <= TOLERANCE:
            raise InputError(f"the ONNX file computes something else than the network: it is {off:.1e} away.")
    return off


class _Exported(nn.Module):
    def __init__(self, network: nn.Module, softmax: bool) -> None:
        super().__init__()
        self.network = network
        self.softmax = softmax

    def forward(self, x: Tensor) -> Tensor:
        logits = self.network(x)
        return logits.softmax(1) if self.softmax else logits


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Without what the exporter prints, logs and warns of, none of which is the user's to mend."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "torch.export")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
