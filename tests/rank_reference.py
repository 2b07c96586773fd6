"""What ranks should answer: computed on the CPU in float32, by the plain references of all kernels. The ranks are
threads, which scale their own shares of 8-bit activations as those of an engine do, and whose shares of the weights are
cut from the checkpoint anew.

How near an answer has to be is not a number that somebody chose: bfloat16 moves roundings to 8 bits, and a model of
random numbers answers that by a certain distance, which the same ranks show on the CPU when they compute in bfloat16.
Half as far again is wrong. With another rank's share of one layer, answers are over three times as far in the roughest
precision (`test_rank_reference.py`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from model_helpers import PagedRunner, PagedSequence
from tensor_parallel_pool import Job, make_model
from thread_ranks import Meeting
from torch import Tensor

from appliance.distributed import TensorParallel

NUM_BEST = 5  # tokens of a position that are compared
FAR = 1.5  # times as far as bfloat16 on the CPU


@dataclass(frozen=True)
class Answer:
    """Greedy tokens after a prompt, and the most likely ones at each of these positions with log probabilities."""

    prompt: list[int]
    token_ids: list[int]
    best: Sequence[Mapping[int, float]]

    @property
    def scored(self) -> list[int]:
        """What was read when the last token was chosen."""
        return self.prompt + self.token_ids[:-1]


def log_probabilities(job: Job, sequences: Sequence[list[int]]) -> list[Tensor]:
    """Of every position of each sequence, float32 [tokens, vocab]."""

    def run(tp: TensorParallel) -> list[Tensor]:
        runner = PagedRunner(make_model(job, tp), num_pages=sum(-(-len(tokens) // 4) for tokens in sequences))
        with torch.inference_mode():
            return runner.step([(PagedSequence(), tokens) for tokens in sequences])

    logits = run(TensorParallel()) if job.size == 1 else Meeting(job.size).run(run)[0]
    return [part.float().log_softmax(-1) for part in logits]


def distance(answers: Sequence[Answer], exact: Sequence[Tensor]) -> float:
    """Mean difference of the log probabilities of the most likely tokens; `exact`: of the positions of each answer."""
    apart = [
        abs(logprob - float(row[token]))
        for answer, rows in zip(answers, exact, strict=True)
        for best, row in zip(answer.best, rows, strict=True)
        for token, logprob in best.items()
    ]
    return sum(apart) / len(apart)


def reference(job: Job, answers: Sequence[Answer]) -> tuple[list[Tensor], float]:
    """Exact log probabilities at the positions of these answers, and how far from them answers may be. `job`: its dtype
    does not count, `stored` does."""
    scored = [answer.scored for answer in answers]
    starts = [len(answer.prompt) - 1 for answer in answers]
    exact, rough = (
        [rows[start:] for rows, start in zip(log_probabilities(replace(job, dtype=dtype), scored), starts, strict=True)]
        for dtype in ("float32", "bfloat16")
    )
    return exact, FAR * distance([as_answer(*pair) for pair in zip(answers, rough, strict=True)], exact)


def as_answer(answer: Answer, rows: Tensor) -> Answer:
    """The same tokens with the log probabilities of `rows`."""
    values, tokens = rows.topk(NUM_BEST)
    best = [dict(zip(ids, numbers)) for ids, numbers in zip(tokens.tolist(), values.tolist(), strict=True)]
    return replace(answer, best=best)


def assert_near(answers: Sequence[Answer], job: Job) -> None:
    exact, limit = reference(job, answers)
    assert (off := distance(answers, exact)) < limit, (job, off, limit)
