"""The sampler against a slow reference, one row at a time.

Without a GPU the Triton kernels run in the interpreter (conftest sets TRITON_INTERPRET before triton is imported).
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sampling_reference import reference_noise

from appliance.kernels.deferred_scale import DeferredScale, materialize
from appliance.runtime.sampler import Sampler, prompt_logprobs, unpack_logprobs
from appliance.types import SamplingParams

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VOCAB, SLOTS, LENGTH = 60, 8, 64


def random_logits(rows, vocab=VOCAB, seed=0, spread=3.0):
    return (torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * spread).to(DEVICE)


class Rig:
    """A sampler with a token table; every slot holds the same number of known tokens unless told otherwise."""

    def __init__(self, vocab=VOCAB):
        self.vocab = vocab
        self.sampler = Sampler(SLOTS, vocab, LENGTH, DEVICE)
        generator = torch.Generator().manual_seed(11)
        self.table = torch.randint(0, vocab, (SLOTS, LENGTH), generator=generator, dtype=torch.int32).to(DEVICE)

    def set(self, slot, params, seed=1, suppressed=(), num_prompt=5):
        self.sampler.set_slot(slot, params, seed, suppressed, num_prompt)

    def sample(self, logits, slots, positions, **kwargs):
        batch = self.sampler.prepare(np.array(slots), **kwargs)
        dev = [torch.tensor(x, device=DEVICE) for x in (slots, positions)]
        return self.sampler.sample(logits.clone(), *dev, self.table, batch), batch

    def ids(self, logits, slots, positions, **kwargs):
        return self.sample(logits, slots, positions, **kwargs)[0].token_ids.tolist()


# ---------------------------------------------------------------- slow reference


def reference_sample(logits, params, seed, suppressed, num_prompt, tokens, position):
    """One row, in Python floats: logits [vocab] as numpy, tokens: the known ones."""
    x = logits.astype(np.float64).copy()
    for token, value in params.logit_bias.items():
        if token < len(x):
            x[token] += value
    if position < num_prompt + params.min_tokens:
        x[list(suppressed)] = -np.inf
    for token in set(tokens):
        x[token] = x[token] / params.repetition_penalty if x[token] > 0 else x[token] * params.repetition_penalty
    output = list(tokens[num_prompt:])
    for token in set(output):
        x[token] -= params.frequency_penalty * output.count(token) + params.presence_penalty
    if params.greedy:
        return int(np.argmax(x))
    x /= params.temperature
    order = np.argsort(-x, kind="stable")
    kept = list(order[: params.top_k] if params.top_k else order)
    probs = np.exp(x[kept] - x[kept[0]])
    probs /= probs.sum()
    if params.top_p < 1:
        total, cut = 0.0, 0
        while cut == 0 or (cut < len(kept) and total < params.top_p):
            total += probs[cut]
            cut += 1
        kept = kept[:cut]
    kept = [t for t in kept if math.exp(x[t] - x[kept[0]]) >= params.min_p]
    return int(max(kept, key=lambda t: x[t] - math.log(reference_noise(seed, position, int(t)))))


CASES = {
    "greedy": {"temperature": 0.0},
    "plain": {},
    "hot": {"temperature": 3.0},
    "top_k": {"top_k": 4},
    "top_k above the vocabulary": {"top_k": 1000},
    "top_p": {"top_p": 0.6},
    "tiny top_p": {"top_p": 1e-6},
    "min_p": {"min_p": 0.2},
    "top_k and top_p": {"top_k": 6, "top_p": 0.7, "temperature": 0.7},
    "all filters": {"top_k": 8, "top_p": 0.9, "min_p": 0.1, "temperature": 1.3},
    "bias": {"logit_bias": {3: 6.0, 7: -100.0, 10_000: 1.0}},
    "greedy bias": {"logit_bias": {3: 50.0}, "temperature": 0.0},
    "min_tokens": {"min_tokens": 7},
    "repetition": {"repetition_penalty": 1.7},
    "presence": {"presence_penalty": 1.5},
    "frequency": {"frequency_penalty": 0.9},
    "negative penalties": {"presence_penalty": -1.0, "frequency_penalty": -0.5, "repetition_penalty": 0.8},
    "greedy penalties": {"frequency_penalty": 2.0, "repetition_penalty": 1.3, "temperature": 0.0},
    "everything": {
        "temperature": 0.9,
        "top_k": 20,
        "top_p": 0.9,
        "min_p": 0.02,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.3,
        "frequency_penalty": 0.2,
        "logit_bias": {1: 2.0, 2: -3.0},
        "min_tokens": 8,
    },
}
SUPPRESSED = (0, 9, 12)


def run_case(rig, names, position, seed, logits_seed):
    """Rows of the named cases in slots 0.. at one position, compared with the reference."""
    logits = random_logits(len(names), rig.vocab, seed=logits_seed)
    for slot, name in enumerate(names):
        rig.set(slot, SamplingParams(**CASES[name]), seed + slot, SUPPRESSED)
    got = rig.ids(logits, list(range(len(names))), [position] * len(names), max_length=position)
    for slot, name in enumerate(names):
        want = reference_sample(
            logits[slot].cpu().numpy(),
            SamplingParams(**CASES[name]),
            seed + slot,
            SUPPRESSED,
            5,
            rig.table[slot, :position].tolist(),
            position,
        )
        assert got[slot] == want, name


@pytest.mark.parametrize("name", CASES)
def test_each_parameter_matches_the_reference(name):
    rig = Rig()
    for trial in range(12):
        run_case(rig, [name], 8 + trial, seed=2**40 + trial * 1000, logits_seed=trial)


@pytest.mark.parametrize(
    "params", [{}, {"temperature": 0.8}, {"temperature": 0.8, "top_p": 0.7}, {"logit_bias": {1: 50.0}}, {"logprobs": 2}]
)
@pytest.mark.parametrize("form", ["bfloat16", "deferred"])
def test_logits_as_the_product_gives_them(params, form):
    """In the model's dtype, or with scales still to be applied: the same as their float32 numbers."""
    rig, slots, positions = Rig(), [0, 1, 2, 3], [9, 9, 9, 9]
    for slot in slots:
        rig.set(slot, SamplingParams(**({"temperature": 0.0} | params)), seed=slot)
    given = random_logits(4, seed=5, spread=2.0).bfloat16()
    if form == "deferred":
        row_scales, column_scales = random_logits(4, 1, seed=6).abs(), random_logits(1, VOCAB, seed=7).abs()
        given = DeferredScale(given, row_scales, column_scales, None)
    batch = rig.sampler.prepare(np.array(slots))
    dev = [torch.tensor(x, device=DEVICE) for x in (slots, positions)]
    want = rig.sampler.sample(materialize(given, torch.float32), *dev, rig.table, batch)
    got = rig.sampler.sample(given, *dev, rig.table, batch)
    assert got.token_ids.tolist() == want.token_ids.tolist() and got.token_ids.dtype == torch.int64
    assert (got.logprobs is None) == (want.logprobs is None) == ("logprobs" not in params)
    assert got.logprobs is None or torch.equal(got.logprobs, want.logprobs)


def test_mixed_batches_match_the_reference():
    rig, names = Rig(), list(CASES)
    rng = np.random.default_rng(0)
    for trial in range(25):
        run_case(rig, list(rng.choice(names, size=SLOTS)), int(rng.integers(6, LENGTH)), trial * 77, trial)


# ---------------------------------------------------------------- properties


def test_sample_does_not_depend_on_neighbours_or_slot():
    rig = Rig()
    logits = random_logits(4, seed=5)
    params = SamplingParams(temperature=0.8, top_p=0.9)
    rig.set(0, params, seed=123)
    rig.set(3, params, seed=123)
    for slot, name in ((1, "top_k"), (2, "everything")):
        rig.set(slot, SamplingParams(**CASES[name]))
    alone = rig.ids(logits[:1], [0], [20])
    assert rig.ids(logits[[2, 1, 0, 3]], [1, 2, 0, 3], [9, 20, 20, 30])[2] == alone[0]
    assert rig.ids(logits[[0, 1]], [3, 1], [20, 9])[0] == alone[0]


def test_greedy_takes_the_lowest_of_equals():
    rig = Rig()
    logits = torch.zeros(2, VOCAB, device=DEVICE)
    logits[:, [17, 30, 59]] = 4.0
    rig.set(0, SamplingParams(temperature=0.0))
    rig.set(1, SamplingParams())
    assert rig.ids(logits, [0, 0], [5, 6]) == [17, 17]  # the argmax path
    assert rig.ids(logits, [0, 1], [5, 6])[0] == 17  # the drawing path


def test_suppression_ends_with_min_tokens():
    rig = Rig()
    logits = torch.zeros(1, VOCAB, device=DEVICE)
    logits[0, 9] = 10.0
    rig.set(0, SamplingParams(temperature=0.0, min_tokens=3), suppressed=(9,), num_prompt=5)
    assert [rig.ids(logits, [0], [p])[0] == 9 for p in (5, 6, 7, 8, 9)] == [False, False, False, True, True]


def test_slot_is_replaced_completely():
    rig = Rig()
    logits = random_logits(1, seed=3)
    rig.set(0, SamplingParams(**CASES["everything"], logprobs=2), suppressed=(1,))
    rig.ids(logits, [0], [6])
    rig.set(0, SamplingParams(temperature=0.0))
    output, batch = rig.sample(logits, [0], [6])
    assert output.token_ids.tolist() == logits.argmax(1).tolist()
    assert output.logprobs is None
    assert batch.bias is None
    assert batch.penalty_rows is None


def test_slot_that_was_never_set_is_greedy():
    rig = Rig()
    logits = random_logits(2, seed=6)
    batch = rig.sampler.prepare(np.array([7, 7]))
    assert batch.all_greedy
    assert batch.penalty_rows is None
    rig.set(0, SamplingParams(top_p=0.5))
    assert rig.ids(logits, [0, 7], [5, 5])[1] == int(logits[1].argmax())


def test_batch_description_is_kept_while_nothing_changes():
    rig = Rig()
    rig.set(0, SamplingParams(frequency_penalty=1.0))
    rig.set(1, SamplingParams(temperature=0.0))
    first = rig.sampler.prepare(np.array([0, 1]), max_length=10)
    second = rig.sampler.prepare(np.array([0, 1]), max_length=11)
    assert second.penalty_rows is first.penalty_rows
    assert rig.sampler.prepare(np.array([1])).all_greedy
    rig.set(1, SamplingParams())
    assert not rig.sampler.prepare(np.array([1])).all_greedy


def test_penalties_see_tokens_up_to_max_length():
    rig = Rig(vocab=200)
    rig.table[0] = torch.arange(LENGTH, dtype=torch.int32)
    logits = torch.zeros(1, 200, device=DEVICE)
    logits[0, LENGTH - 2] = 1.0  # the last known token
    logits[0, LENGTH - 1] = 0.5  # the position to come: still junk in the table
    rig.set(0, SamplingParams(temperature=0.0, frequency_penalty=2.0))
    assert rig.ids(logits, [0], [LENGTH - 1], max_length=LENGTH - 1) == [LENGTH - 1]


def test_wrong_number_of_rows_is_refused():
    rig = Rig()
    rig.set(0, SamplingParams())
    batch = rig.sampler.prepare(np.array([0, 0]))
    one = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    with pytest.raises(ValueError, match="prepared for 2"):
        rig.sampler.sample(random_logits(1), one, one, rig.table, batch)


# ---------------------------------------------------------------- log probabilities


@pytest.mark.parametrize("name", ["greedy", "everything"])
def test_logprobs_are_of_the_raw_logits(name):
    rig = Rig()
    logits = random_logits(3, seed=13)
    rig.set(0, SamplingParams(**CASES[name], logprobs=3))
    rig.set(1, SamplingParams(**CASES[name]))
    rig.set(2, SamplingParams(**CASES[name], logprobs=0))
    output, batch = rig.sample(logits, [0, 1, 2], [9, 9, 9])
    rows = unpack_logprobs(output.logprobs.cpu().numpy(), batch.logprobs)
    want = logits.double().log_softmax(1).cpu()
    assert rows[1] is None
    assert rows[2].top == ()
    for row in (0, 2):
        token = int(output.token_ids[row])
        assert rows[row].token_id == token
        assert rows[row].logprob == pytest.approx(float(want[row, token]), abs=1e-5)
        assert rows[row].rank == 1 + int((want[row] > want[row, token]).sum())
    values, indices = want[0].topk(3)
    assert [t for t, _ in rows[0].top] == indices.tolist()
    assert [x for _, x in rows[0].top] == pytest.approx(values.tolist(), abs=1e-5)


def test_prompt_logprobs():
    logits = random_logits(4, seed=2)
    targets = torch.tensor([3, 59, 0, 7], device=DEVICE)
    rows = unpack_logprobs(prompt_logprobs(logits, targets, 2).cpu().numpy(), [2] * 4)
    want = logits.double().log_softmax(1).cpu()
    for i, row in enumerate(rows):
        assert row.token_id == int(targets[i])
        assert row.logprob == pytest.approx(float(want[i, targets[i]]), abs=1e-5)
        assert [t for t, _ in row.top] == want[i].topk(2).indices.tolist()


@pytest.mark.gpu
def test_no_step_waits_for_the_device():
    rig = Rig()
    for slot, name in enumerate(list(CASES)[-SLOTS:]):
        rig.set(slot, SamplingParams(**CASES[name], logprobs=2), suppressed=SUPPRESSED)
    slots = torch.arange(SLOTS, device=DEVICE)
    positions, logits = slots + 10, random_logits(SLOTS)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            batch = rig.sampler.prepare(np.arange(SLOTS), max_length=20)
            rig.sampler.sample(logits.clone(), slots, positions, rig.table, batch)
            rig.set(0, SamplingParams(top_k=3))
    finally:
        torch.cuda.set_sync_debug_mode("default")
