"""FP8 checkpoints of NVIDIA ModelOpt: `hf_quant_config.json` beside config.json, or `quant_method: modelopt` in it.

The older file has {"producer", "quantization": {"quant_algo", "kv_cache_quant_algo", "exclude_modules"}}, the newer
section the same facts as `quant_algo`, `kv_cache_scheme` and `ignore`. Excluded modules are names with wildcards.
Tensors are those of `fp8.py`; scales of an FP8 KV cache are `k_scale` and `v_scale` (`source.py`).
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from appliance.checkpoint.quantized.fp8 import Fp8
from appliance.checkpoint.quantized.layout import Raw, unsupported
from appliance.types import Quantization

# quant_algo -> whether the scale of the activations is static.
_ALGORITHMS = {"FP8": True, "FP8_PER_CHANNEL_PER_TOKEN": False}


class ModelOpt(Fp8):
    method = "modelopt"

    def facts(self, config: Raw, where: Path) -> Quantization:
        config = _section(config)
        algorithm = config.get("quant_algo")
        if algorithm not in _ALGORITHMS:
            raise unsupported(where, f"ModelOpt's quant_algo {algorithm!r}", ", ".join(_ALGORITHMS))
        kv_cache = config.get("kv_cache_quant_algo") or config.get("kv_cache_scheme")
        if not (kv_cache is None or _is_fp8(kv_cache)):
            raise unsupported(where, f"a KV cache in {kv_cache!r}", "FP8 with one scale per tensor, or none")
        return Quantization(
            "modelopt",
            str(algorithm).lower(),
            "fp8",
            static_input=_ALGORITHMS[algorithm],
            kv_cache=None if kv_cache is None else "fp8",
        )

    def ignores(self, config: Raw, module: str) -> bool:
        config = _section(config)
        excluded = config.get("exclude_modules") or config.get("ignore") or []
        return any(fnmatchcase(module, name) or module.startswith(f"{name}.") for name in map(str, excluded))


def _section(config: Raw) -> dict[str, Any]:
    """The facts of either form."""
    inner = config.get("quantization")
    return {**config, **inner} if isinstance(inner, dict) else dict(config)


def _is_fp8(kv_cache: object) -> bool:
    if isinstance(kv_cache, dict):
        return kv_cache.get("num_bits") == 8 and kv_cache.get("type") == "float" and not kv_cache.get("dynamic")
    return str(kv_cache).upper() == "FP8"
