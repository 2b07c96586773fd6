"""`--batch-invariant`: what it refuses, and that a request's numbers have the same bits alone and in any batch."""

from __future__ import annotations

import msgspec
import pytest

from appliance.errors import SettingsError
from appliance.llm import LLM
from appliance.types import SamplingParams

PROMPTS = ["What is 17 + 25?", "Sort: 9 3 7 1", "Say hello.", "What is 12 * 12? " * 40]


def test_the_cpu_backend_refuses_it(tmp_path) -> None:
    with pytest.raises(SettingsError, match="--batch-invariant is not supported by the cpu backend"):
        LLM(backend="cpu", cache=tmp_path, batch_invariant=True)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "fp8", "int8"])
def test_numbers_do_not_depend_on_the_batch(precision: str, tmp_path) -> None:
    """Log probabilities are compared as they are: any other order of summation shows."""
    params = SamplingParams(temperature=0.0, max_tokens=48, ignore_eos=True, logprobs=3, prompt_logprobs=1)
    fields = ("token_ids", "logprobs", "prompt_logprobs")
    answers = []
    for tokens in (8192, 96):  # prompts whole, and in chunks beside decodes
        with LLM(
            precision=precision,
            cache=tmp_path,
            batch_invariant=True,
            max_num_batched_tokens=tokens,
            max_num_seqs=64,
            prefix_caching=False,
        ) as llm:
            alone = [llm.generate([prompt], params)[0] for prompt in PROMPTS]
            crowd = llm.generate(PROMPTS * 12, params)
            answers += [alone, crowd[:4], crowd[-4:]]
    first = [[getattr(answer, name) for name in fields] for answer in answers[0]]
    for other in answers[1:]:
        found = [[getattr(answer, name) for name in fields] for answer in other]
        assert msgspec.json.encode(found) == msgspec.json.encode(first)
