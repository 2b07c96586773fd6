"""Compiles the all-reduce kernels for GPUs that are not here, with their waits; run by test_all_reduce_compile.py in a
process of its own, because there kernels must not be interpreted. Prints a line of JSON per kernel."""

from __future__ import annotations

import json
import sys
from typing import Any

import triton
from compile_kernels import FP8, TO_FP8, stack_bytes, type_of
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from appliance.kernels import all_reduce, all_reduce_norm, exchange, sharded_draw

COMMON: dict[str, Any] = {
    "STEPS": all_reduce.ALL_STEPS,
    "SYNC": True,
    "FIRST": all_reduce.FLAG_BYTES,
    "SLOTS": all_reduce.MAX_SLOTS,
    "STRIDE": max(all_reduce.SIZES),
    "ASSEMBLY": all_reduce._MEET,
}
ADDRESSES = {"addresses": "*i64", "epochs": "*i32"}
HIDDEN = 8192


def cases(arch: int) -> list[tuple[Any, dict[str, Any], int, dict[str, str]]]:
    found = []
    for ranks in all_reduce.SIZES:
        for two_shot in (False, True):
            common = {**COMMON, "RANKS": ranks, "TWO_SHOT": two_shot, "PDL": arch >= 90}
            plain = {**common, "PART": 4096}
            # 8.0 has no FP8: what it has is a norm in 16 bits.
            fused = {**common, **FP8, "PART": HIDDEN // ranks, "QUANTIZE": arch >= 89, "DEFERRED": True, "BIASED": True}
            out = TO_FP8 if arch >= 89 else {"out": "*bf16"}
            found.append((all_reduce._all_reduce_kernel, plain, 16, ADDRESSES))
            found.append((all_reduce_norm._all_reduce_rms_norm_kernel, fused, 16, ADDRESSES | out))
        common = {**COMMON, "RANKS": ranks, "PDL": arch >= 90, "TWO_SHOT": False}
        moved = ADDRESSES | {"x": "*bf16", "out": "*bf16"}
        for to_each in (False, True):
            found.append((exchange._exchange_kernel, {**common, "PART": 2048, "TO_EACH": to_each}, 4, moved))
        keys = {"scores": "*fp32", "tokens": "*i64", "keys": "*i64", "out": "*i64"}
        found.append((sharded_draw._best_tokens_kernel, {**common, "BLOCK": 16}, 1, ADDRESSES | keys))
    return found


def main() -> None:
    arch = int(sys.argv[1])
    for kernel, constants, num_warps, own in cases(arch):
        names = kernel.arg_names
        two_shot, pdl = constants["TWO_SHOT"], constants["PDL"]
        constants = {name: value for name, value in constants.items() if name in names}
        signature = {name: "constexpr" if name in constants else type_of(name, own) for name in names}
        unknown = {"rank", "n", "m", "eps"}  # everything else is a multiple of 16 in launches
        whole = [name for name in names if signature[name] != "constexpr" and name not in unknown]
        source = ASTSource(
            fn=kernel,
            signature=signature,
            constexprs={(names.index(name),): value for name, value in constants.items()},
            attrs={(names.index(name),): [["tt.divisibility", 16]] for name in whole},
        )
        options = {"num_warps": num_warps, "launch_pdl": pdl}
        compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
        lines = [
            line.split()[0 if line.split()[0][0] != "@" else 1]
            for line in compiled.asm["ptx"].splitlines()
            if line.strip()
        ]
        line = {
            "kernel": kernel.__name__,
            "ranks": constants["RANKS"],
            "two_shot": two_shot,
            "releases": lines.count("st.release.sys.global.u32"),
            "acquires": lines.count("ld.acquire.sys.global.u32"),
            "wide_loads": lines.count("ld.global.v4.b32") + lines.count("ld.global.v2.b64"),
            "cached_loads": sum(name.startswith("ld.global.nc") for name in lines),
            "single_loads": lines.count("ld.global.b16"),
            "order": [
                name for name in lines if name in ("bar.sync", "st.release.sys.global.u32", "ld.acquire.sys.global.u32")
            ],
            "waits": sum(name.startswith("griddepcontrol.wait") for name in lines),
            "stack": stack_bytes(compiled.asm["cubin"]),
        }
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
