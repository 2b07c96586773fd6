"""Ranks that sample from their columns of the logits give the tokens and log probabilities, bit for bit, of one that
has all of them. The ranks are threads that meet in every collective operation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from test_sampler import CASES, LENGTH, SLOTS, SUPPRESSED, VOCAB
from thread_ranks import Meeting
from torch import Tensor

from appliance.distributed import TensorParallel
from appliance.kernels.deferred_scale import DeferredScale, Product
from appliance.runtime.sampler import Sampler, SamplerOutput
from appliance.runtime.sharded_sampler import WORTH, ShardedSampler
from appliance.types import SamplingParams

Row = tuple[SamplingParams, int]  # parameters and seed of a row; its slot is its number


def columns(logits: Product, rank: int, size: int, vocab: int) -> Product:
    """A rank's, padded with what must never be taken."""
    share = -(-vocab // size)
    part = slice(rank * share, (rank + 1) * share)

    def cut(x: Tensor, fill: float) -> Tensor:
        return torch.nn.functional.pad(x[:, part], (0, share - x[:, part].shape[1]), value=fill)

    if isinstance(logits, Tensor):
        return cut(logits, 1000.0)
    return DeferredScale(cut(logits.values, 1000.0), logits.row_scales.clone(), cut(logits.column_scales, 9.0), None)


def run(
    make: Callable[[], Sampler | ShardedSampler], logits: Product, rows: list[Row], positions: list[int]
) -> tuple[SamplerOutput, Any]:
    sampler = make()
    table = torch.randint(0, VOCAB, (SLOTS, LENGTH), generator=torch.Generator().manual_seed(11), dtype=torch.int32)
    for slot, (params, seed) in enumerate(rows):
        sampler.set_slot(slot, params, seed, SUPPRESSED, 5)
    slots = list(range(len(rows)))
    for _ in range(2):  # the second description is a kept one
        batch = sampler.prepare(np.array(slots), max(positions) + 1)
    return sampler.sample(logits, torch.tensor(slots), torch.tensor(positions), table, batch), batch  # type: ignore[arg-type]


def compare(
    size: int, logits: Product, rows: list[Row], positions: list[int], vocab: int = VOCAB, *, worth: int = 0
) -> Meeting:
    """All ranks with one that has all logits. `worth` 0: nothing is gathered."""
    limits = (SLOTS, vocab, LENGTH, "cpu")
    meeting = Meeting(size)
    parts = [columns(logits, rank, size, vocab) for rank in range(size)]

    found = meeting.run(lambda tp: run(lambda: ShardedSampler(*limits, tp, worth), parts[tp.rank], rows, positions)[0])
    expected, batch = run(lambda: Sampler(*limits), logits, rows, positions)
    wanted = torch.tensor([n is not None for n in batch.logprobs])
    for output in found:
        assert output.token_ids.tolist() == expected.token_ids.tolist() and output.token_ids.dtype == torch.int64
        assert (output.logprobs is None) == (expected.logprobs is None)
        if output.logprobs is not None and expected.logprobs is not None:
            assert torch.equal(output.logprobs[wanted], expected.logprobs[wanted])
    return meeting


def random_logits(rows: int, seed: int, vocab: int = VOCAB, form: str = "float32") -> Product:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(rows, vocab, generator=generator)
    if form == "float32":
        return logits
    if form == "bfloat16":
        return logits.bfloat16()
    row_scales, column_scales = torch.rand(rows, 1, generator=generator), torch.rand(1, vocab, generator=generator)
    return DeferredScale(logits.bfloat16(), row_scales, column_scales, None)


@pytest.mark.parametrize("form", ["float32", "bfloat16", "deferred"])
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("worth", [0, WORTH])
def test_every_parameter_gives_what_one_rank_does(size: int, form: str, worth: int) -> None:
    for seed, name in enumerate(CASES):
        rows = [(SamplingParams(**CASES[name]), seed), (SamplingParams(**CASES[name], logprobs=3), seed + 9)]
        compare(size, random_logits(2, seed, form=form), rows, [9, 12], worth=worth)


@pytest.mark.parametrize("worth", [0, 2, WORTH])
@pytest.mark.parametrize("size", [2, 4, 8])
def test_mixed_batches(size: int, worth: int) -> None:
    """One of a batch's rows, none, all need whole rows; more and fewer than ranks, and than are gathered."""
    rng = np.random.default_rng(size)
    names = [*CASES, "greedy", "plain", "hot", "greedy", "plain"]
    for trial in range(16):
        count = int(rng.integers(1, SLOTS + 1))
        rows = []
        for at in range(count):
            logprobs = int(rng.integers(0, 4)) if rng.random() < 0.2 else None
            rows.append((SamplingParams(**CASES[str(rng.choice(names))], logprobs=logprobs), trial * 100 + at))
        positions = [int(p) for p in rng.integers(6, LENGTH, count)]
        compare(size, random_logits(count, trial), rows, positions, worth=worth)


@pytest.mark.parametrize("vocab", [5, 9, 61, 64])
def test_vocabularies_that_ranks_do_not_divide(vocab: int) -> None:
    """Of 5 tokens the last of four ranks has none, and neither has the last of 9 more than padding."""
    for seed in range(6):
        logits = random_logits(3, seed, vocab)
        plain: list[Row] = [(SamplingParams(temperature=t), seed) for t in (0.0, 1.0, 2.5)]
        compare(4, logits, plain, [7, 8, 9], vocab)
        filtered: list[Row] = [
            (SamplingParams(temperature=2.0, top_p=0.8), seed),
            plain[1],
            (SamplingParams(logprobs=2), 4),
        ]
        for worth in (0, WORTH):
            compare(4, logits, filtered, [7, 8, 9], vocab, worth=worth)


def test_equal_logits_give_the_lowest_token_and_nan_counts_for_nothing() -> None:
    logits = torch.zeros(3, VOCAB)
    logits[0, [17, 31, 59]] = 4.0
    logits[1] = float("nan")
    logits[2, :31] = float("nan")
    greedy: list[Row] = [(SamplingParams(temperature=0.0), 0)] * 3
    compare(4, logits, greedy, [6, 6, 6])
    compare(4, logits, [greedy[0], (SamplingParams(), 3), greedy[0]], [6, 6, 6])


def test_what_travels() -> None:
    """A number per row and rank for rows that each token decides alone; a rank's share of the rows for others."""
    plain: Row = (SamplingParams(temperature=0.7), 1)
    meeting = compare(4, random_logits(8, 1), [plain] * 8, list(range(8, 16)))
    assert meeting.calls == ["all_gather"] and meeting.numbers == 4 * 8
    filtered: Row = (SamplingParams(temperature=0.7, top_p=0.5), 1)
    meeting = compare(4, random_logits(8, 1), [plain, *[filtered] * 2, *[plain] * 5], list(range(8, 16)))
    assert meeting.calls == ["all_gather", "all_to_all", "all_gather"]
    assert meeting.numbers == 4 * 8 + VOCAB + 4
    meeting = compare(4, random_logits(8, 1), [filtered] * 8, list(range(8, 16)))
    assert meeting.calls == ["all_to_all", "all_gather"] and meeting.numbers == 2 * VOCAB + 8


def test_few_rows_are_gathered() -> None:
    """At once where that is all of a small batch; of a larger one those that need it, and the others by columns."""
    plain: Row = (SamplingParams(temperature=0.7), 1)
    filtered: Row = (SamplingParams(temperature=0.7, top_p=0.5), 1)
    logits, positions = random_logits(8, 1), list(range(8, 16))
    meeting = compare(4, logits, [filtered] * 8, positions, worth=WORTH)
    assert meeting.calls == ["all_gather"] and meeting.numbers == 8 * VOCAB
    meeting = compare(4, logits, [plain, *[filtered] * 2, *[plain] * 5], positions, worth=WORTH)
    assert meeting.calls == ["all_gather"] and meeting.numbers == 8 * VOCAB
    meeting = compare(4, logits, [plain] * 8, positions, worth=WORTH)
    assert meeting.calls == ["all_gather"] and meeting.numbers == 4 * 8, "no row needs its logits"
    meeting = compare(4, logits, [plain, *[filtered] * 2, *[plain] * 5], positions, worth=4)
    assert meeting.calls == ["all_gather", "all_gather"] and meeting.numbers == 4 * 8 + 2 * VOCAB
    meeting = compare(4, logits, [*[filtered] * 7, plain], positions, worth=4)
    assert meeting.calls == ["all_gather", "all_to_all", "all_gather"]


@pytest.mark.parametrize(("size", "most"), [(2, 13), (4, 9), (8, 7)])
def test_up_to_how_many_rows_are_gathered(size: int, most: int) -> None:
    """As sharing out spares ranks the more, the more they are: 8 rows over four make no difference on the GPU."""
    limits = (64, VOCAB, LENGTH, "cpu")
    meeting = Meeting(size)
    filtered = SamplingParams(temperature=0.7, top_k=5)
    for count, gathered in ((1, True), (most, True), (most + 1, False), (64, False)):
        sampler = ShardedSampler(*limits, meeting.rank(0))
        for slot in range(count):
            sampler.set_slot(slot, filtered, slot, (), 5)
        whole = sampler.prepare(np.arange(count)).whole
        assert whole is not None and whole.gathered == gathered, count


def test_slots_that_change_are_described_anew() -> None:
    meeting = Meeting(2)

    def sample(tp: TensorParallel) -> list[int]:
        sampler = ShardedSampler(SLOTS, VOCAB, LENGTH, "cpu", tp)
        found = []
        logits = columns(random_logits(1, 3), tp.rank, 2, VOCAB)
        for params in (SamplingParams(temperature=0.0), SamplingParams(logit_bias={7: 99.0}), SamplingParams(top_k=1)):
            sampler.set_slot(0, params, 1, (), 5)
            batch = sampler.prepare(np.array([0]))
            one = torch.zeros(1, dtype=torch.int64)
            found.append(int(sampler.sample(logits, one, one + 8, torch.zeros(SLOTS, LENGTH), batch).token_ids))
        return found

    found = meeting.run(sample)
    best = int(random_logits(1, 3).argmax())  # type: ignore[union-attr]
    assert found == [[best, 7, best]] * 2


@pytest.mark.parametrize("rows", [1, 4, 7])
def test_prompt_logprobs(rows: int) -> None:
    logits, targets = random_logits(rows, 5), torch.arange(rows) * 3
    expected = Sampler(SLOTS, VOCAB, LENGTH, "cpu").prompt_logprobs(logits, targets, 2)

    def sample(tp: TensorParallel) -> Tensor:
        sampler = ShardedSampler(SLOTS, VOCAB, LENGTH, "cpu", tp)
        return sampler.prompt_logprobs(columns(logits, tp.rank, 4, VOCAB), targets, 2)

    for found in Meeting(4).run(sample):
        assert torch.equal(found, expected)


def test_wrong_number_of_rows_is_refused() -> None:
    sampler = ShardedSampler(SLOTS, VOCAB, LENGTH, "cpu", Meeting(2).rank(0))
    batch = sampler.prepare(np.array([0, 0]))
    one = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="prepared for 2"):
        sampler.sample(torch.zeros(1, VOCAB), one, one, torch.zeros(SLOTS, LENGTH), batch)
