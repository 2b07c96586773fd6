"""The persistent kernel as C++ on the CPU, thread by thread, alone and as ranks that write into each other's memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from persistent_emulation import MISSING, emulate
from persistent_models import Step, error, exact, random_model

from appliance.distributed import TensorParallel
from appliance.kernels.fp8_linear import FP8
from appliance.kernels.persistent.exchange import Exchange, inbox_bytes
from appliance.runtime.persistent_decode import PersistentDecode

pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
BLOCKS = 3  # with which products begin at different ones
SMALL: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 301,
    "max_position_embeddings": 512,
}
INT4 = {"head": "bf16"}
BIASES = {"attention_bias": True, "output_bias": True, "mlp_bias": True}


class Reducer:
    """All that a rank asks of it is whether it is there."""

    own = object()


class Ranks:
    """Ranks of one model in this process: steps over the same sequences, inboxes in memory that all see."""

    def __init__(
        self,
        size: int,
        scheme: str,
        parameters: dict[str, Any] | None,
        rows: int,
        lengths: list[int],
        kv_dtype: torch.dtype,
        **shape: Any,
    ) -> None:
        wanted = SMALL | shape
        self.rows, self.count, self.vocab = rows, len(lengths), wanted["vocab_size"]
        whole = Step(random_model(scheme, parameters, device="cpu", **wanted), lengths, kv_dtype)
        self.truth = exact(whole, rows)[: self.count]
        hidden = wanted["hidden_size"]
        inboxes = [torch.zeros(inbox_bytes(size, hidden, rows), dtype=torch.uint8) for _ in range(size)]
        addresses = [inbox.data_ptr() for inbox in inboxes]
        self.exchanges, self.steps = [], []
        self.decodes: list[PersistentDecode] = []
        for rank in range(size):
            collectives: Any = Reducer()
            tp = TensorParallel(rank, size, collectives if size > 1 else None)
            step = Step(random_model(scheme, parameters, tp=tp, device="cpu", **wanted), lengths, kv_dtype)
            exchange = Exchange(rank, addresses, hidden, [rows], torch.device("cpu"), inboxes) if size > 1 else None
            self.exchanges.append(exchange)
            self.steps.append(step)
            self.decodes.append(step.persistent(rows, exchange))

    def give_token(self, token: int | None) -> None:
        """To every sequence as its newest one; None: what it was at first."""
        for step in self.steps:
            for new in step.plan.new:
                at = new.num_prompt_tokens - 1
                step.runner._batch.token_table[new.slot, at] = new.token_ids[at] if token is None else token

    def logits(self) -> torch.Tensor:
        """Of one step, of all ranks side by side."""
        columns = [decode.logits(step.inputs(self.rows)) for decode, step in zip(self.decodes, self.steps, strict=True)]
        return torch.cat(columns, 1)[: self.count, : self.vocab].clone()


# Ranks, scheme, its parameters, rows, lengths, cache, shape, and how far from float32 the result may be.
CASES: list[tuple[int, str, dict[str, Any] | None, int, list[int], torch.dtype, dict[str, Any], float]] = [
    (1, "fp8", None, 1, [300], torch.bfloat16, {"sliding_window": 100}, 0.07),
    (2, "fp8", None, 2, [17, 40], FP8, {"intermediate_size": 12800}, 0.11),  # down in several passes
    (2, "int4_awq", INT4, 4, [1, 33, 20], torch.bfloat16, {"qk_norm": True}, 0.01),
    # Fewer K/V heads than ranks, a vocabulary that they cannot share, biases that count once; so few sums that words of
    # the last step have the places of this one's.
    (4, "none", None, 1, [20], torch.bfloat16, BIASES | {"num_hidden_layers": 1}, 0.01),
]


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("size", "scheme", "parameters", "rows", "lengths", "kv_dtype", "shape", "limit"),
    CASES,
    ids=[f"{size}-{scheme}" for size, scheme, *_ in CASES],
)
def test_agrees_with_the_model_in_float32(
    size: int,
    scheme: str,
    parameters: dict[str, Any] | None,
    rows: int,
    lengths: list[int],
    kv_dtype: torch.dtype,
    shape: dict[str, Any],
    limit: float,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    emulate(monkeypatch, tmp_path, BLOCKS)
    ranks = Ranks(size, scheme, parameters, rows, lengths, kv_dtype, **shape)
    first = ranks.logits()
    assert error(first, ranks.truth) < limit
    # What other steps leave behind is in nobody's way.
    ranks.give_token(7)
    assert error(ranks.logits(), first) > 0.2
    ranks.give_token(None)
    assert torch.equal(ranks.logits(), first)


@pytest.mark.timeout(120)
def test_a_rank_whose_others_are_gone_ends(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    emulate(monkeypatch, tmp_path, BLOCKS)
    ranks = Ranks(2, "none", None, 1, [3], torch.bfloat16)
    alone, exchange = ranks.decodes[0], ranks.exchanges[0]
    assert exchange is not None
    alone._kernels[1].present = 1  # type: ignore[attr-defined]
    exchange.abort()
    alone.logits(ranks.steps[0].inputs(1))  # asserts that the kernel ends
