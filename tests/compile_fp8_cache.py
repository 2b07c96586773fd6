"""Compiles the kernels that read and write FP8 KV caches for Hopper and Ada; needs no GPU. Run by
tests/test_fp8_cache_compile.py in a process of its own, because there kernels must not be interpreted. Prints a line of
JSON per kernel: its name, the compute capability, bytes of registers spilled and of shared memory."""

from __future__ import annotations

import json
from typing import Any

import triton
from compile_kernels import stack_bytes
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from appliance.kernels import paged_attention_kernels, rope_cache, widen_pages

TYPES = {  # of arguments; int32 where not listed
    **dict.fromkeys(("q_ptr", "rotated_ptr", "k_ptr", "v_ptr", "out_ptr"), "*bf16"),
    **dict.fromkeys(("partial_ptr", "stats_ptr", "cos_sin_ptr"), "*fp32"),
    **dict.fromkeys(("seq_lens_ptr", "table_ptr", "tiles_ptr", "query_start_ptr", "pages_ptr"), "*i32"),
    **dict.fromkeys(("positions_ptr", "slots_ptr"), "*i64"),
    **dict.fromkeys(("scale", "out_scale", "inverse_k_scale", "inverse_v_scale"), "fp32"),
    "cache_ptr": "*fp8e4nv",
}
HEADS: dict[str, Any] = {"num_heads": 32, "num_kv_heads": 8, "group": 4, "head_dim": 128, "page_size": 16}
ATTENTION: dict[str, Any] = {**HEADS, "DIM": 128, "WINDOWED": True, "PRECISION": "tf32"}
ROPE: dict[str, Any] = {**HEADS, "q_blocks": 8, "HEADS": 4, "HALF": 64, "SCALED": True, "LARGEST": 448.0}
# (kernel, constants, of which those that it has count, warps, stages): as paged_attention.py and rope_cache.py launch
CASES: list[tuple[Any, dict[str, Any], int, int]] = [
    (paged_attention_kernels.decode_kernel, {**ATTENTION, "BLOCK_H": 16, "BLOCK_N": 128, "SPLITS": 4}, 4, 5),
    (paged_attention_kernels.prefill_kernel, {**ATTENTION, "INVARIANT": False, "BLOCK_M": 128, "BLOCK_N": 64}, 8, 3),
    (widen_pages._widen_kernel, {"BLOCK": 2048}, 4, 3),
    (rope_cache._rope_kernel, {**ROPE, "DEFERRED": False, "BIASED": False, "PDL": False}, 2, 3),
]


def main() -> None:
    for kernel, constants, num_warps, num_stages in CASES:
        names = kernel.arg_names
        signature = {name: "constexpr" if name in constants else TYPES.get(name, "i32") for name in names}
        aligned = {
            (at,): [["tt.divisibility", 16]]
            for at, name in enumerate(names)
            if name.endswith(("_ptr", "_stride")) and signature[name] != "constexpr"
        }
        values = {(at,): constants[name] for at, name in enumerate(names) if name in constants}
        source = ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=aligned)
        for capability in (90, 89):
            options = {"num_warps": num_warps, "num_stages": num_stages}
            compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
            line = {"kernel": kernel.__name__, "capability": capability, "shared": compiled.metadata.shared}
            print(json.dumps(line | {"stack": stack_bytes(compiled.asm["cubin"])}), flush=True)


if __name__ == "__main__":
    main()
