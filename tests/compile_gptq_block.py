"""Compiles GPTQ's inner loop for each generation of GPUs; needs none. Run by tests/test_gptq_block.py in a process of
its own, because there kernels must not be interpreted. Prints a line of JSON per compute capability."""

from __future__ import annotations

import json

import triton
from compile_kernels import stack_bytes
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from appliance.kernels import gptq_block

CONSTANTS = {"ROWS": gptq_block._ROWS, "COLUMNS": 128, "LARGEST": 15.0}
TYPES = {"values_ptr": "*u8", **{f"{name}_ptr": "*fp32" for name in ("weight", "original", "factor", "errors")}}
TYPES |= {"scales_ptr": "*fp32", "zeros_ptr": "*fp32"}


def main() -> None:
    names = gptq_block._gptq_block_kernel.arg_names
    signature = {name: "constexpr" if name in CONSTANTS else TYPES.get(name, "i32") for name in names}
    aligned = {
        (at,): [["tt.divisibility", 16]]
        for at, name in enumerate(names)
        if name.endswith("_ptr") or name in ("weight_stride", "original_stride", "columns")
    }
    values = {(at,): CONSTANTS[name] for at, name in enumerate(names) if name in CONSTANTS}
    source = ASTSource(gptq_block._gptq_block_kernel, signature=signature, constexprs=values, attrs=aligned)
    for capability in (75, 80, 86, 89, 90):
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4})
        print(json.dumps({"capability": capability, "stack": stack_bytes(compiled.asm["cubin"])}), flush=True)


if __name__ == "__main__":
    main()
