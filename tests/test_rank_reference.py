"""The measure by which the tests of ranks on GPUs judge what they answer tells a wrong share from rounding."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from calibrated_models import SHAPE, make_source
from rank_reference import Answer, as_answer, assert_near, distance, log_probabilities, reference
from tensor_parallel_pool import Job
from transformers import LlamaConfig

CONFIG = LlamaConfig(**SHAPE | {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8})
PROMPTS = [[(7 * i + 13 * j) % 288 for j in range(5 + 20 * i)] for i in range(4)]
GENERATED = [[(11 * i + 5 * j) % 288 for j in range(24)] for i in range(4)]
SCHEMES: dict[str, tuple[str, dict[str, Any]]] = {
    "bf16": ("none", {}),
    "fp8": ("fp8", {}),
    "int8": ("int8_smoothquant", {"head": "fp8"}),
    "int4": ("int4_awq", {"group_size": 32, "head": "fp8"}),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_source(tmp_path_factory.mktemp("source") / "m", CONFIG, outliers=1.0)


def answer_of(job: Job) -> list[Answer]:
    asked = [Answer(prompt, tokens, []) for prompt, tokens in zip(PROMPTS, GENERATED, strict=True)]
    found = log_probabilities(job, [one.scored for one in asked])
    return [as_answer(one, rows[len(one.prompt) - 1 :]) for one, rows in zip(asked, found, strict=True)]


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("precision", SCHEMES)
def test_a_wrong_share_is_far_from_rounding(precision: str, size: int, source: Path) -> None:
    name, parameters = SCHEMES[precision]
    job = Job(source, size, name, parameters, "bfloat16", stored="bfloat16")
    assert_near(answer_of(replace(job, dtype="float32")), job)
    right = answer_of(job)
    assert_near(right, job)
    exact, limit = reference(job, right)
    for layer in ("layers.0.mlp.gate_up", "layers.1.attention.o", "layers.2.mlp.down"):
        wrong = answer_of(replace(job, mistaken=layer))
        assert distance(wrong, exact) > 2 * limit, (layer, distance(wrong, exact), limit)
        with pytest.raises(AssertionError):
            assert_near(wrong, job)
