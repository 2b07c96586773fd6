"""The safetensors files of a checkpoint: which there are, what their headers say, and whether all of it is there.

Torch-free: headers only. Format: 8 bytes little-endian header length, a JSON header {name: {dtype, shape,
data_offsets}}, then the tensors' bytes (https://huggingface.co/docs/safetensors).
"""

from __future__ import annotations

import json
import math
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from appliance.errors import CheckpointError

# safetensors dtype -> (torch dtype name, bytes)
DTYPES: dict[str, tuple[str, int]] = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}
INDEX_NAME = "model.safetensors.index.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)
# Each of these alone makes a tokenizer; the other files only add to it.
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
CONFIG_FILES = ("config.json", "generation_config.json")
# Of checkpoints that others quantized, where config.json does not say how: file -> quant_method.
QUANTIZATION_FILES = {
    "hf_quant_config.json": "modelopt",
    "quantize_config.json": "gptq",
    "quant_config.json": "awq",
}
_METADATA = "__metadata__"  # the one key of a header that is no tensor
_MAX_HEADER = 100 << 20  # bytes, the format's own limit
_DOWNLOAD_AGAIN = "download the checkpoint again"


@dataclass(frozen=True)
class TensorInfo:
    name: str
    file: Path
    dtype: str  # torch's name, e.g. "bfloat16"
    shape: tuple[int, ...]
    offset: int  # of its first byte in the file
    nbytes: int


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of one file, by name. Raises CheckpointError for a file that is truncated or no safetensors file."""
    header, base, size = _read(path)
    header.pop(_METADATA, None)
    try:
        infos = {name: _info(name, entry, path, base) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(path, error) from error
    end = max((info.offset + info.nbytes for info in infos.values()), default=base)
    if end != size:
        state = "truncated" if size < end else "too long"
        raise CheckpointError(f"{path} is {state}: {size} bytes, its header says {end}", hint=_DOWNLOAD_AGAIN)
    return infos


def read_metadata(path: Path) -> dict[str, str]:
    """What a file says of itself beside its tensors, {} if nothing. Raises CheckpointError like `read_header`."""
    metadata = _read(path)[0].get(_METADATA) or {}
    return {str(key): str(value) for key, value in metadata.items()}


def _read(path: Path) -> tuple[dict[str, Any], int, int]:
    """The header, where its tensors' bytes begin, and the size of the file."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if not 2 <= length <= _MAX_HEADER or 8 + length > size:
                raise CheckpointError(
                    f"{path} is truncated or not a safetensors file ({size} bytes)", hint=_DOWNLOAD_AGAIN
                )
            header = json.loads(file.read(length))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}", hint="check its permissions") from error
    except ValueError as error:
        raise _damaged(path, error) from error
    if not isinstance(header, dict):
        raise _damaged(path, TypeError("no JSON object"))
    return header, 8 + length, size


def _damaged(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{path} has a damaged safetensors header: {error!r}", hint=_DOWNLOAD_AGAIN)


def _info(name: str, entry: dict[str, object], path: Path, base: int) -> TensorInfo:
    stored = str(entry["dtype"])
    if stored not in DTYPES:
        raise CheckpointError(f"{path}: tensor {name} has dtype {stored}, allowed: {', '.join(DTYPES)}")
    dtype, width = DTYPES[stored]
    begin, end = (int(x) for x in entry["data_offsets"])  # type: ignore[attr-defined]
    shape = tuple(int(x) for x in entry["shape"])  # type: ignore[attr-defined]
    if begin < 0 or any(n < 0 for n in shape) or end - begin != math.prod(shape) * width:
        raise ValueError(f"tensor {name}: {end - begin} bytes for {dtype}{list(shape)}")
    return TensorInfo(name, path, dtype, shape, base + begin, end - begin)


def weight_files(path: Path) -> list[Path]:
    """The safetensors files that hold a checkpoint's weights, in name order.

    Raises CheckpointError: a shard that the index names is missing; only pickled (.bin, .pt) or GGUF weights; none.
    """
    index = path / INDEX_NAME
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index} is damaged: {error!r}", hint=_DOWNLOAD_AGAIN) from error
        _require([path / name for name in names], f"{INDEX_NAME} names")
        return [path / name for name in names]
    single = path / "model.safetensors"
    if single.is_file():
        return [single]
    # Mistral's own consolidated*.safetensors name their tensors otherwise and repeat the same weights.
    found = sorted(p for p in path.glob("*.safetensors") if not p.name.startswith("consolidated"))
    if not found:
        raise _no_weights(path)
    for file in found:
        numbered = re.fullmatch(r"(.*)-(\d{5})-of-(\d{5})\.safetensors", file.name)
        if numbered:
            stem, count = numbered[1], int(numbered[3])
            every = [path / f"{stem}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
            _require(every, f"{file.name} says that there are {count}:")
    return found


def _require(paths: list[Path], because: str) -> None:
    missing = [p.name for p in paths if not p.is_file()]
    if missing:
        raise CheckpointError(
            f"{paths[0].parent} lacks {len(missing)} of {len(paths)} shards: {because} {', '.join(missing[:4])}",
            hint=_DOWNLOAD_AGAIN,
        )


def _no_weights(path: Path) -> CheckpointError:
    if any(path.glob("consolidated*.safetensors")):
        return CheckpointError(
            f"{path} holds only consolidated.safetensors, whose tensors are not named as transformers names them",
            hint="download the model*.safetensors files of the same repository",
        )
    pickled = sorted(p.name for suffix in ("bin", "pt", "pth", "ckpt") for p in path.glob(f"*.{suffix}"))
    if pickled:
        return CheckpointError(
            f"{path} holds its weights only as pickle files ({', '.join(pickled[:3])}), which can run code when opened "
            "and are not read here",
            hint="convert to safetensors: load it in transformers where you trust it and call "
            "save_pretrained(DIR, safe_serialization=True)",
        )
    gguf = sorted(p.name for p in path.glob("*.gguf"))
    if gguf:
        return CheckpointError(
            f"{path} holds GGUF weights ({gguf[0]}), which are not read here",
            hint="use the original safetensors checkpoint; the appliance quantizes it itself",
        )
    return CheckpointError(f"{path} has no *.safetensors files", hint="is it the directory of a checkpoint?")


def content_files(path: Path) -> list[Path]:
    """Everything that decides what an engine of this checkpoint holds: weights, configuration, tokenizer."""
    others = [path / name for name in (*CONFIG_FILES, *QUANTIZATION_FILES, *TOKENIZER_FILES)]
    return [*weight_files(path), *(p for p in others if p.is_file())]


def require_tokenizer(path: Path) -> None:
    """CheckpointError if the checkpoint has none: an engine without one could not be served."""
    if not any((path / name).is_file() for name in _TOKENIZERS):
        raise CheckpointError(
            f"{path} has no tokenizer (none of {', '.join(_TOKENIZERS)})",
            hint="copy the tokenizer's files of the same model into it",
        )


def first_dtype(path: Path) -> str | None:
    """dtype of the first floating-point tensor; None where there are no weights to look at."""
    try:
        infos = read_header(weight_files(path)[0])
    except CheckpointError:
        return None
    return next((info.dtype for info in infos.values() if "float" in info.dtype), None)
