"""Compiles kernels for Hopper as the engine launches them, deferred scales and dependent launch on; needs no GPU. Run
by tests/test_triton_compile.py in a process of its own, because there kernels must not be interpreted. Prints a line of
JSON per kernel: its name, how often it waits for the kernel before it, and bytes of registers spilled."""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from appliance.kernels import (
    activation,
    deferred_scale,
    int8_linear,
    norm,
    rope_cache,
    row_quantization,
    sampling,
    skinny_linear,
)

TYPES = {  # of arguments, by name; int32 where not listed
    "*bf16": "x residual values bias logits q k v rotated cache weight q_weight k_weight",
    "*fp32": "row_scales column_scales scales x_scales weight_scales static_scale cos_sin best_score temperature "
    "thresholds partial",
    "*i64": "positions slots best_token",
    "*i32": "seeds counter",
    "fp32": "eps inverse_k_scale inverse_v_scale greedy_temperature",
}
DEFERRED: dict[str, Any] = {"DEFERRED": True, "BIASED": True, "PDL": True}
FP8: dict[str, Any] = {"LARGEST": 448.0, "WHOLE": False, "STATIC": False, "SMALLEST_AMAX": 1e-12, "WHOLE_ROW": True}
INT8 = {**FP8, "LARGEST": 127.0, "WHOLE": True}
ROPE: dict[str, Any] = {"num_heads": 32, "num_kv_heads": 8, "head_dim": 128, "page_size": 16, "q_blocks": 8}
SKINNY: dict[str, Any] = {"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 128, "SPLIT": 4, "LINE": 128, "LINES_AHEAD": 4}
SKINNY |= {"WEIGHT_FIRST": True, "WHOLE_K": True, "SCALED": True}
TILED: dict[str, Any] = {"BLOCK_K": 128, "GROUP": 8, "WHOLE_K": True, "SCALED": True}
TO_FP8 = {"out": "*fp8e4nv"}
INT8_SUMS = {"x": "*i32", "out": "*i8"}
INT8_PRODUCT = {"x": "*i8", "values": "*i8", "weight": "*i8", "out": "*bf16", "partial": "*i32"}
# (kernel, constants, of which those that it has count, warps, types that differ)
CASES: list[tuple[Any, dict[str, Any], int, dict[str, str]]] = [
    (deferred_scale._materialize_kernel, {**DEFERRED, "BLOCK": 1024}, 4, {"out": "*fp32"}),
    (deferred_scale._materialize_kernel, {**DEFERRED, "BLOCK": 1024}, 4, {"values": "*i32", "out": "*bf16"}),
    (norm._rms_norm_kernel, {**DEFERRED, **FP8, "HAS_RESIDUAL": True, "QUANTIZE": True, "BLOCK": 4096}, 8, TO_FP8),
    (norm._qk_rms_norm_kernel, {**DEFERRED, "head_dim": 128, "BLOCK": 128}, 1, {}),
    (norm._rms_norm_kernel, {**DEFERRED, **INT8, "HAS_RESIDUAL": True, "QUANTIZE": True, "BLOCK": 4096}, 8, INT8_SUMS),
    (activation._silu_mul_kernel, {**DEFERRED, **FP8, "BLOCK": 1024}, 4, {"out": "*bf16"}),
    (activation._silu_mul_kernel, {**DEFERRED, **FP8, "STATIC": True, "BLOCK": 1024}, 4, TO_FP8),
    (activation._silu_mul_quantize_kernel, {**DEFERRED, **INT8, "BLOCK": 2048, "PARTS": 7}, 8, INT8_SUMS),
    (
        activation._silu_mul_quantize_kernel,
        {**DEFERRED, **FP8, "BLOCK": 16384, "PARTS": 1, "BIASED": False},
        16,
        TO_FP8,
    ),
    (activation._silu_mul_quantize_kernel, {**DEFERRED, **FP8, "BLOCK": 2048, "PARTS": 7, "BIASED": False}, 8, TO_FP8),
    (activation._silu_mul_quantize_kernel, {**DEFERRED, **FP8, "BLOCK": 4096, "PARTS": 7, "BIASED": False}, 16, TO_FP8),
    (row_quantization._quantize_rows_kernel, {**FP8, "BLOCK": 4096, "PDL": True}, 8, TO_FP8),
    (
        rope_cache._rope_kernel,
        {**DEFERRED, **ROPE, "HEADS": 4, "HALF": 64, "SCALED": True, "LARGEST": 448.0},
        2,
        {"cache": "*fp8e4nv"},
    ),
    (
        rope_cache._rope_kernel,
        {**DEFERRED, **ROPE, "HEADS": 8, "HALF": 64, "SCALED": False, "LARGEST": 448.0},
        4,
        {"q": "*i32", "k": "*i32", "v": "*i32", "cache": "*bf16"},
    ),
    (sampling._draw_kernel, {**DEFERRED, "GREEDY": True, "FILTERED": False, "BLOCK": 2048}, 4, {"logits": "*i32"}),
    (sampling._draw_kernel, {**DEFERRED, "GREEDY": True, "FILTERED": False, "BLOCK": 2048}, 4, {}),
    (sampling._best_of_blocks_kernel, {"BLOCK": 64, "PDL": True}, 1, {"out": "*i64"}),
    (sampling._draw_kernel, {**DEFERRED, "GREEDY": False, "FILTERED": True, "BLOCK": 2048}, 4, {"logits": "*fp32"}),
    (
        skinny_linear._skinny_kernel,
        {**DEFERRED, **SKINNY, "PROMOTE": 128, "WHOLE": False},
        4,
        {"x": "*fp8e4nv", "weight": "*fp8e4nv", "out": "*bf16"},
    ),
    (skinny_linear._skinny_kernel, {**DEFERRED, **SKINNY, "PROMOTE": 0, "WHOLE": True}, 4, INT8_PRODUCT),
    (int8_linear._int8_linear_kernel, {**DEFERRED, **TILED, "BLOCK_M": 64, "BLOCK_N": 64}, 4, INT8_PRODUCT),
    (int8_linear._int8_linear_kernel, {**DEFERRED, **TILED, "BLOCK_M": 128, "BLOCK_N": 256}, 8, INT8_PRODUCT),
]


def type_of(name: str, own: dict[str, str]) -> str:
    stem, pointer = name.removesuffix("_ptr"), name.endswith("_ptr")
    if pointer and stem in own:
        return own[stem]
    return next((kind for kind, names in TYPES.items() if stem in names.split() and pointer == (kind[0] == "*")), "i32")


def compile_kernel(kernel: Any, constants: dict[str, Any], num_warps: int, own: dict[str, str]) -> Any:
    names = kernel.arg_names
    constants = {name: value for name, value in constants.items() if name in names}
    signature = {name: "constexpr" if name in constants else type_of(name, own) for name in names}
    # What Triton finds out about the arguments of the real launches: addresses, sizes and strides of whole 16s.
    whole = [name for name in names if signature[name][0] == "*" or (signature[name] == "i32" and name != "m")]
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in whole}
    positions = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=positions, attrs=aligned)
    options = {"num_warps": num_warps, "launch_pdl": True}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def stack_bytes(cubin: bytes) -> int:
    """What a thread keeps in memory for lack of registers."""
    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"STACK:(\d+)", usage)
    assert found, usage
    return int(found.group(1))


def main() -> None:
    for kernel, constants, num_warps, own in CASES:
        compiled = compile_kernel(kernel, constants, num_warps, own)
        waits = compiled.asm["ptx"].count("griddepcontrol.wait")
        line = {"kernel": kernel.__name__, "waits": waits, "stack": stack_bytes(compiled.asm["cubin"])}
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
