"""Whether the scales of a quantized checkpoint are numbers to multiply with, by a look at them alone, before many
gigabytes are hashed. Torch-free, as the start of a server is; knows names of tensors, not layouts. What else can be
wrong, the layout's own reader finds (`checkpoint/quantized/`)."""

from __future__ import annotations

import numpy as np

from appliance.checkpoint.files import TensorInfo
from appliance.checkpoint.reader import Checkpoint
from appliance.errors import CheckpointError

_SCALES = ("scales", "weight_scale", "input_scale")  # last part of their names, in all layouts
_NUMPY = {"float16": np.float16, "float32": np.float32, "float64": np.float64, "bfloat16": np.uint16}


def check_scale_numbers(checkpoint: Checkpoint) -> None:
    """CheckpointError naming the first tensor of scales with a number that is NaN, infinite, zero or below."""
    for name, info in checkpoint.tensors.items():
        if name.rpartition(".")[2] in _SCALES and info.dtype in _NUMPY and info.nbytes:
            wrong = _wrong(info)
            if wrong:
                raise CheckpointError(
                    f"tensor {name} in {info.file.name}: a scale is {wrong}, allowed: finite numbers above zero",
                    hint="download the checkpoint again, or use the original, unquantized one",
                )


def _wrong(info: TensorInfo) -> str:
    """What is wrong with the numbers of a tensor; "" if nothing is."""
    stored = np.memmap(info.file, _NUMPY[info.dtype], "r", info.offset, info.shape or (1,))
    numbers = np.asarray(stored)
    if info.dtype == "bfloat16":
        numbers = (numbers.astype(np.uint32) << 16).view(np.float32)
    low, high = float(numbers.min()), float(numbers.max())  # NaN if any is
    if low != low:
        return "NaN"
    if low <= 0:
        return f"{low:g}"
    return "infinite" if high == float("inf") else ""
