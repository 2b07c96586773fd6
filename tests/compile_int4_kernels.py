"""Compiles the Triton kernels of INT4 products for GPUs from Ampere to Hopper, with none of them here. Run by
tests/test_int4_linear.py in a process of its own, because there kernels must not be interpreted. Prints a line of JSON
per kernel: bytes of registers spilled, products of the tensor cores, waits for the kernel in front."""

from __future__ import annotations

import json
from typing import Any

import triton
from compile_kernels import stack_bytes, type_of
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from appliance.kernels import int4_triton
from appliance.kernels.int4_triton import default_config

TYPES = {"x": "*bf16", "out": "*bf16", "bias": "*bf16", "weight": "*i32", "scale_zero": "*fp16"}


def compile_for(arch: int, kernel: Any, constants: dict[str, Any], num_warps: int, num_stages: int) -> None:
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else type_of(name, TYPES) for name in names}
    whole = [name for name in names if signature[name][0] == "*" or (signature[name] == "i32" and name != "m")]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in whole},
    )
    options = {"num_warps": num_warps, "num_stages": num_stages, "launch_pdl": arch >= 90}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    ptx = compiled.asm["ptx"]
    line = {
        "arch": arch,
        "kernel": kernel.__name__,
        "stack": stack_bytes(compiled.asm["cubin"]),
        "tensor_products": ptx.count("mma.sync") + ptx.count("wgmma.mma_async"),
        "waits": ptx.count("griddepcontrol.wait"),
    }
    print(json.dumps(line), flush=True)


def main() -> None:
    for arch, sms in ((80, 108), (86, 84), (89, 142), (90, 132)):
        pdl = arch >= 90
        for m in (8, 128):
            config = default_config(4096, 4096, m, sms)
            constants = {
                "BLOCK_M": config.rows_of_x(m),
                "BLOCK_N": config.block_n,
                "BLOCK_K": config.block_k,
                "GROUP": 128,
                "SPLIT": config.split,
                "BIASED": True,
                "PDL": pdl,
            }
            kernel = int4_triton._int4_linear_kernel
            compile_for(arch, kernel, constants, config.num_warps, config.num_stages)
        constants = {"GROUP_WORDS": 16, "ROWS": 16, "WORDS": 64, "PDL": pdl}
        compile_for(arch, int4_triton._dequantize_kernel, constants, 4, 3)


if __name__ == "__main__":
    main()
