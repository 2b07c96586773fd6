"""Compiles, for GPUs that are not here, every Triton kernel that an engine runs on them: Turing (7.5, float16), Ampere
(8.0, 8.6) and Ada (8.9). Run by tests/test_triton_compile.py in a process of its own, because there kernels must not be
interpreted. Prints a line of JSON per kernel and architecture: bytes of registers spilled, of shared memory, and how
many instructions of tensor cores.

Shapes are those of an 8B Llama; launches are those of `appliance/kernels`: no deferred scales but for an FP8 head, no
dependent launch, since that begins with Hopper. FlashInfer's and own CUDA C++ kernels are no matter of this file.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import triton
from compile_kernels import FP8, INT8, INT8_PRODUCT, ROPE, SKINNY, TILED, TO_FP8, TYPES, stack_bytes
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from appliance.kernels import (
    activation,
    deferred_scale,
    filtered_draw,
    int4_triton,
    int8_linear,
    norm,
    paged_attention_kernels,
    rope_cache,
    row_quantization,
    sampling,
    skinny_linear,
    widen_pages,
)
from appliance.kernels.int4_triton import default_config

# kernel, constants (of which those that it has count), warps, stages, types that differ
Case = tuple[Any, dict[str, Any], int, int, dict[str, str]]

MULTIPROCESSORS = {75: 40, 80: 108, 86: 84, 89: 142}  # T4, A100, RTX 3090 Ti, L40S
HALF = "*half"  # the model's 16 bits, by architecture
NOW: dict[str, Any] = {"DEFERRED": False, "BIASED": False, "PDL": False}  # nothing deferred, nothing launched early
MORE_TYPES = {
    "*i32": "seq_lens table tiles query_start pages top_k weight",
    "*fp32": "partial stats top_p min_p",
    "*i64": "candidates",
    "fp32": "scale out_scale",
}
HEADS: dict[str, Any] = {"num_heads": 32, "num_kv_heads": 8, "group": 4, "head_dim": 128, "page_size": 16}
ATTENTION: dict[str, Any] = {**HEADS, "DIM": 128, "WINDOWED": True, "PRECISION": "tf32"}


def common(arch: int) -> list[Case]:
    """Of any INT4 or 16-bit engine."""
    whole = {"HAS_RESIDUAL": True, "QUANTIZE": False, "BLOCK": 4096}
    halves = dict.fromkeys(("q", "k", "v", "out", "cache", "x", "weight", "bias", "residual", "rotated"), HALF)
    # As `paged_attention.py` cuts tiles: smaller ones where Triton has no tensor cores.
    decode = {**ATTENTION, "BLOCK_N": 64 if arch >= 80 else 32, "SPLITS": 4}
    prefill = {**decode, "INVARIANT": False, "BLOCK_M": 128 if arch >= 80 else 32}
    cases: list[Case] = [
        (norm._rms_norm_kernel, {**NOW, **FP8, **whole}, 8, 3, halves | {"values": HALF}),
        (norm._qk_rms_norm_kernel, {**NOW, "head_dim": 128, "BLOCK": 128}, 1, 3, {}),
        (activation._silu_mul_kernel, {**NOW, **FP8, "BLOCK": 1024}, 4, 3, halves),
        (
            rope_cache._rope_kernel,
            {**NOW, **ROPE, "HEADS": 4, "HALF": 64, "SCALED": False, "LARGEST": 0.0},
            2,
            3,
            halves,
        ),
        (sampling._draw_kernel, {**NOW, "GREEDY": True, "FILTERED": False, "BLOCK": 2048}, 4, 3, {}),
        (sampling._draw_kernel, {**NOW, "GREEDY": False, "FILTERED": True, "BLOCK": 2048}, 4, 3, {"logits": "*fp32"}),
        (sampling._best_of_blocks_kernel, {"BLOCK": 64, "PDL": False}, 1, 3, {"out": "*i64"}),
        (filtered_draw._reject_kernel, {"BLOCK": filtered_draw._BLOCK}, 16, 3, {"logits": "*fp32"}),
        (paged_attention_kernels.decode_kernel, {**decode, "BLOCK_H": 16}, 4, 5 if arch >= 80 else 2, halves),
        (paged_attention_kernels.merge_kernel, decode, 4, 3, halves),
        (paged_attention_kernels.prefill_kernel, prefill, 8 if arch >= 80 else 4, 3 if arch >= 80 else 2, halves),
        (skinny_linear._skinny_kernel, {**NOW, **SKINNY, "SCALED": False, "PROMOTE": 0, "WHOLE": False}, 4, 3, halves),
    ]
    packed = halves | {"weight": "*i32", "scale_zero": "*fp16"}
    for rows in (1, 16, 64, 128):
        config = default_config(4096, 4096, rows, MULTIPROCESSORS[arch])
        tile = {"BLOCK_M": config.rows_of_x(rows), "BLOCK_N": config.block_n, "BLOCK_K": config.block_k}
        constants = {**NOW, **tile, "GROUP": 128, "SPLIT": config.split}
        cases.append((int4_triton._int4_linear_kernel, constants, config.num_warps, config.num_stages, packed))
    constants = {"GROUP_WORDS": 16, "ROWS": 16, "WORDS": 64, "PDL": False}
    cases.append((int4_triton._dequantize_kernel, constants, 4, 3, packed))
    return cases


def int8() -> list[Case]:
    """What an INT8 engine has besides."""
    whole = {"HAS_RESIDUAL": True, "QUANTIZE": True, "BLOCK": 4096}
    deferred = {**NOW, "DEFERRED": True}
    product = INT8_PRODUCT | {"out": HALF, "bias": HALF}
    return [
        (norm._rms_norm_kernel, {**deferred, **INT8, **whole}, 8, 3, {"x": "*i32", "out": "*i8", "weight": HALF}),
        (
            activation._silu_mul_quantize_kernel,
            {**NOW, **INT8, "BLOCK": 2048, "PARTS": 7},
            8,
            3,
            {"out": "*i8", "x": HALF},
        ),
        (row_quantization._quantize_rows_kernel, {**INT8, "BLOCK": 4096, "PDL": False}, 8, 3, {"out": "*i8"}),
        (skinny_linear._skinny_kernel, {**NOW, **SKINNY, "PROMOTE": 0, "WHOLE": True}, 4, 3, product),
        (int8_linear._int8_linear_kernel, {**NOW, **TILED, "BLOCK_M": 64, "BLOCK_N": 64}, 4, 3, product),
    ]


def fp8() -> list[Case]:
    """What Ada has besides: an FP8 head, FP8 caches."""
    eight = {"x": "*fp8e4nv", "weight": "*fp8e4nv", "out": HALF, "bias": HALF}
    cached = dict.fromkeys(("q", "k", "v", "out", "rotated", "bias"), HALF) | {"cache": "*fp8e4nv"}
    rope = {**NOW, **ROPE, "HEADS": 4, "HALF": 64, "SCALED": True, "LARGEST": 448.0}
    return [
        (row_quantization._quantize_rows_kernel, {**FP8, "BLOCK": 4096, "PDL": False}, 8, 3, TO_FP8),
        (skinny_linear._skinny_kernel, {**NOW, **SKINNY, "PROMOTE": 128, "WHOLE": False}, 4, 3, eight),
        (deferred_scale._materialize_kernel, {**NOW, "DEFERRED": True, "BLOCK": 1024}, 4, 3, {"out": "*fp32"}),
        (sampling._draw_kernel, {**NOW, "DEFERRED": True, "GREEDY": True, "FILTERED": False, "BLOCK": 2048}, 4, 3, {}),
        (rope_cache._rope_kernel, rope, 2, 3, cached),
        (widen_pages._widen_kernel, {"BLOCK": 2048}, 4, 3, cached),
    ]


def type_of(name: str, own: dict[str, str]) -> str:
    stem, pointer = name.removesuffix("_ptr"), name.endswith("_ptr")
    if pointer and stem in own:
        return own[stem]
    for table in (MORE_TYPES, TYPES):
        for kind, names in table.items():
            if stem in names.split() and pointer == (kind[0] == "*"):
                return HALF if kind == "*bf16" else kind
    return "i32"


def compile_for(arch: int, case: Case) -> dict[str, Any]:
    kernel, constants, warps, stages, own = case
    names = kernel.arg_names
    constants = {name: value for name, value in constants.items() if name in names}
    half = "*fp16" if arch < 80 else "*bf16"
    signature = {name: "constexpr" if name in constants else type_of(name, own) for name in names}
    signature = {name: half if kind == HALF else kind for name, kind in signature.items()}
    whole = [name for name in names if signature[name][0] == "*" or (signature[name] == "i32" and name != "m")]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in whole},
    )
    compiled = triton.compile(
        source, target=GPUTarget("cuda", arch, 32), options={"num_warps": warps, "num_stages": stages}
    )
    return {
        "arch": arch,
        "kernel": kernel.__name__,
        "stack": stack_bytes(compiled.asm["cubin"]),
        "shared": compiled.metadata.shared,
        "tensor_products": compiled.asm["ptx"].count("mma.sync"),
    }


def main() -> None:
    for arch in map(int, sys.argv[1:]):
        for case in common(arch) + (int8() if arch >= 80 else []) + (fp8() if arch >= 89 else []):
            try:
                line = compile_for(arch, case)
            except Exception as error:
                line = {"arch": arch, "kernel": case[0].__name__, "error": f"{type(error).__name__}: {error}"[:500]}
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
