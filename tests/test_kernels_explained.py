"""What the explanation says of kernels: the recorded GPUs that take INT4, and that its claims are those of the code."""

from __future__ import annotations

import pytest
from selection_cases import FACTS, FULL, LLAMA_8B, PROFILES, choose, machine
from test_triton_compile import SHARED_KIB

from appliance.profiles import capabilities, explain_json, kernels, reasons, select
from appliance.profiles.overrides import Overrides
from appliance.profiles.select import Selection


def chosen(name: str, **asked: str) -> Selection:
    """By what this build really contains."""
    overrides = Overrides(**asked)  # type: ignore[arg-type]
    return select(
        machine(name), LLAMA_8B, PROFILES, "throughput", overrides, capabilities=capabilities(), gpu_facts=FACTS
    )


def kernels_line(selection: Selection) -> str:
    (line,) = (line for line in reasons(selection) if line.startswith("kernels: "))
    assert line in explain_json(selection)["reasons"]
    return line


@pytest.mark.parametrize(
    ("name", "capability", "words"),
    [
        (
            "a100-80gb-x1",
            "8.0",
            ["bfloat16 activations", "own CUDA C++ and Triton", "lm_head in bfloat16", "FlashInfer"],
        ),
        ("l40s", "8.9", ["bfloat16 activations", "own CUDA C++ and Triton", "lm_head in FP8", "FlashInfer"]),
        ("rtx-4090", "8.9", ["bfloat16 activations", "own CUDA C++ and Triton", "lm_head in FP8", "FlashInfer"]),
        ("a10", "8.6", ["bfloat16 activations", "own CUDA C++ and Triton", "lm_head in bfloat16", "FlashInfer"]),
        ("t4", "7.5", ["float16 activations", "without tensor cores", "lm_head in float16", "attention in Triton"]),
    ],
)
def test_recorded_gpus_take_int4_and_know_what_that_means(name: str, capability: str, words: list[str]) -> None:
    selection = chosen(name)
    assert selection.selected is not None and selection.selected.name == "int4-tp1"
    assert selection.selected.scheme == "int4_awq" and selection.selected.max_kl == 0.4
    line = kernels_line(selection)
    assert [word for word in words if word not in line] == []
    assert (
        f"compile its kernels for compute capability {capability}, but it never ran on such a GPU, only on an H200"
        in line
    )
    assert ("bfloat16" in line) == (name != "t4")


def test_where_it_ran_and_where_nobody_knows() -> None:
    line = kernels_line(chosen("h200-x1"))
    assert "FP8 weights and activations" in line and "run and measured on an H200" in line
    assert "nobody has compiled or run it for compute capability 10.0" in kernels_line(chosen("b200-x8"))
    cpu = chosen("none-small", precision="bf16", backend="cpu")
    assert not any(line.startswith("kernels: ") for line in reasons(cpu))


def test_sums_over_ranks_and_what_stages_do_without() -> None:
    def said(name: str, **asked: object) -> str:
        return kernels_line(choose(name, LLAMA_8B, build=FULL, **asked))

    assert "sums over ranks" not in said("h200-x4") and "one persistent kernel" in said("h200-x4")
    joined = said("h200-x4", tp_size=2)
    assert "sums over ranks by own kernels and NCCL" in joined and "one persistent kernel" in joined
    assert "sums over ranks by NCCL" in said("rtx-4090-x2", tp_size=2)
    stages = said("h200-x4", tp_size=1, pp_size=2)
    assert "sums over ranks" not in stages and "one persistent kernel" not in stages


def test_ranks_that_never_ran_are_named() -> None:
    def said(name: str, **asked: object) -> list[str]:
        lines = reasons(choose(name, LLAMA_8B, build=FULL, **asked))
        return [line for line in lines if line.startswith("ranks: ")]

    for measured in ({}, {"tp_size": 2}, {"tp_size": 4}, {"tp_size": 1, "pp_size": 2}):
        assert said("h200-x8", **measured) == [], measured
    words = "ranks in these numbers only ran as tests on the CPU so far; TP2, TP4, PP2 on one host are what ran on GPUs"
    assert said("h200-x8", tp_size=8) == said("h200-x8", tp_size=2, pp_size=2) == [f"ranks: {words}"]
    (line,) = said("h200-x8", tp_size=1, nodes=2)
    assert line.startswith("ranks: several machines only ran as tests on the CPU")
    assert said("a100-80gb-x8", tp_size=8, precision="bf16") == []  # nothing ran there, which is said


def test_its_claims_are_those_of_tests_and_code() -> None:
    compiled = {divmod(arch, 10) for arch in SHARED_KIB} | {(9, 0)}  # compile_kernels.py compiles for Hopper
    assert set(kernels.COMPILED) == compiled and set(kernels.MEASURED) <= compiled
    for precision in ("int4", "int8", "fp8", "bf16", "fp16", "fp32"):
        for capability in kernels.COMPILED:
            activations = precision if precision.startswith(("bf", "fp1", "fp3")) else "bf16"
            said = kernels.described(precision, activations, capability, None)
            assert ("FlashInfer" in said) == (capability >= (8, 0) and precision != "fp32")
