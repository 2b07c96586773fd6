"""Models, builds and recorded machines that the profile tests share."""

from __future__ import annotations

from pathlib import Path

import msgspec

from appliance import hardware
from appliance.profiles import (
    BackendFacts,
    Capabilities,
    Overrides,
    SchemeFacts,
    Selection,
    load_gpu_facts,
    load_profiles,
    predict,
    select,
)
from appliance.types import Hardware, ModelConfig, Objective

GIB = 2**30
PROFILES = load_profiles()
FACTS = load_gpu_facts()

LLAMA_8B = ModelConfig("LlamaForCausalLM", 128256, 4096, 14336, 32, 32, 8, 128, 131072)
LLAMA_70B = ModelConfig("LlamaForCausalLM", 128256, 8192, 28672, 80, 64, 8, 128, 131072)
LLAMA_405B = ModelConfig("LlamaForCausalLM", 128256, 16384, 53248, 126, 128, 8, 128, 131072)
BUILTIN = ModelConfig("LlamaForCausalLM", 4096, 256, 768, 6, 8, 2, 32, 8192, tie_word_embeddings=True)
QWEN_2KV = ModelConfig("Qwen2ForCausalLM", 151936, 1536, 8960, 28, 12, 2, 128, 32768, attention_bias=True)
ODD = ModelConfig("LlamaForCausalLM", 1000, 200, 600, 4, 5, 5, 40, 2048)  # 200 and 600 are no multiples of 16

_INT4 = SchemeFacts((7, 5), head=(((0, 0), "bf16"), ((8, 9), "fp8")))
_PLAIN = {name: SchemeFacts((7, 0)) for name in ("fp32", "fp16", "bf16")}
_NOW = ("fp32", "fp16", "bf16", "fp8")
# What the first release contains, and everything that later ones add.
FIRST = Capabilities(
    schemes={**_PLAIN, "fp8": SchemeFacts((8, 9), 16)},
    backends={
        "cuda": BackendFacts("gpu", _NOW, ("bf16", "fp16", "fp32"), min_compute_capability=(7, 5)),
        "cpu": BackendFacts("cpu", _NOW, ("fp32",)),
    },
)
FULL = Capabilities(
    schemes={**FIRST.schemes, "int8": SchemeFacts((7, 5), 16), "int4": _INT4},
    backends={
        "cuda": BackendFacts(
            "gpu",
            (*_NOW, "int8", "int4"),
            ("bf16", "fp16", "fp32", "fp8"),
            max_tp=8,
            max_pp=2,
            kv_cache_capability={"fp8": (8, 9)},
        ),
        "cpu": BackendFacts("cpu", (*_NOW, "int4"), ("fp32", "fp8"), packed=("int4",)),
    },
    named={"int4_awq": _INT4, "int4_gptq": _INT4},
)
# And a launcher that serves several copies of an engine.
ALL = msgspec.structs.replace(FULL, replicas=True)


def machine(name: str) -> Hardware:
    return hardware.load(Path(__file__).parent / "hardware" / f"{name}.yaml")


def choose(
    where: str | Hardware,
    model: ModelConfig = LLAMA_8B,
    objective: Objective = "throughput",
    build: Capabilities = FIRST,
    **overrides: object,
) -> Selection:
    found = machine(where) if isinstance(where, str) else where
    asked = Overrides(**overrides)  # type: ignore[arg-type]
    return select(found, model, PROFILES, objective, asked, capabilities=build, gpu_facts=FACTS)


def names(selection: Selection) -> tuple[str | None, str | None]:
    """(selected, wanted)"""
    selected, wanted = selection.selected, selection.wanted
    return selected.name if selected else None, wanted.name if wanted else None


def linear_bytes(model: ModelConfig, stored: predict.Stored, tp_size: int) -> int:
    """Predicted, of the linear layers (lm_head included) of one rank: what a decode step reads."""
    return sum(product.nbytes for product in predict.rank_products(model, stored, tp_size))
