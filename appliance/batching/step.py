"""The hand-off between the batching core and an executor. Knows neither torch nor the model.

Sequences live in *slots*: rows of the executor's persistent batch (token table, page table, sampling parameters).
`NewSequence` fills a slot completely, whatever was in it before; `ScheduledSequence` runs some of its tokens.

Steps are pipelined: the core may submit step N+1 before the result of step N is known. A token sampled in step N is
written by the executor into its token table right behind the sequence's last token, on the device, so step N+1 reads it
from there and the core does not send it. Where the device that samples is not the one that reads, as with several
pipeline stages, the core waits for a sequence's token before it plans its next step, which brings it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from appliance.types import SamplingParams, TokenLogprobs


@dataclass(slots=True)
class NewSequence:
    """Fills a slot: a request that starts, or goes on after preemption."""

    slot: int  # 0 .. max_num_seqs - 1
    token_ids: list[int]  # all known tokens: prompt and, after preemption or restart, output so far
    num_prompt_tokens: int  # token_ids[num_prompt_tokens:] are output (penalties, random stream)
    params: SamplingParams
    seed: int  # of this request's random stream; the token at position p depends on (seed, p) only
    suppressed_token_ids: tuple[int, ...]  # not to be sampled before min_tokens: eos and stop ids
    page_ids: list[int]  # pages it holds at the start: prefix-cache hits, then fresh pages


@dataclass(slots=True)
class ScheduledSequence:
    """Tokens [start, start + length) of a slot's sequence run in this step."""

    slot: int
    start: int  # position of the first token run; K/V of earlier ones are in the cache
    length: int  # >= 1
    new_page_ids: list[int]  # appended to the slot's page table before the step (not for a NewSequence of this step)
    samples: bool  # the last token run is the last known one, so its logits give a new token
    prompt_logprobs: bool = False  # return log probabilities of tokens start+1 .. start+length (those that are prompt)


@dataclass(slots=True)
class StepPlan:
    """One forward pass. `scheduled` is in row order: sequences with length 1 first, then longer ones."""

    step_id: int
    new: list[NewSequence] = field(default_factory=list)
    scheduled: list[ScheduledSequence] = field(default_factory=list)
    # To executors of several stages: the tokens that the first rows run, those of decoding sequences, one each.
    token_ids: list[int] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return sum(s.length for s in self.scheduled)


@dataclass(slots=True)
class StepResult:
    """What came out, aligned with `StepPlan.scheduled`."""

    step_id: int
    token_ids: list[int]  # sampled token, -1 where the sequence did not sample
    logprobs: list[TokenLogprobs | None]  # where the request asked for them
    # Where asked for: one entry per prompt token start+1 .. start+length inside the prompt.
    prompt_logprobs: list[list[TokenLogprobs] | None]


class Executor(Protocol):
    """Runs steps. `submit` returns without waiting for the device where the device allows it; results are collected in
    the order of submission. An exception from either means that the engine is lost."""

    num_pages: int  # of the KV cache
    page_size: int  # tokens
    max_model_len: int  # tokens, prompt + output
    max_num_seqs: int  # slots
    max_num_batched_tokens: int  # tokens a step
    # Ascending numbers of tokens that steps with prefill are padded to; beyond the largest they are not.
    step_sizes: tuple[int, ...]
    num_stages: int  # that a step runs through, one behind the other, each busy with one step at a time

    def submit(self, plan: StepPlan) -> None: ...

    def collect(self) -> StepResult: ...
