"""What a step gives, on its way to the host. `PendingStep.result` is where the host waits for the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from appliance.batching.step import StepPlan, StepResult
from appliance.runtime.sampler import SamplerOutput, SamplingBatch, unpack_logprobs
from appliance.runtime.sharded_sampler import ShardedBatch
from appliance.types import TokenLogprobs


def to_host(tensor: Tensor) -> Tensor:
    """A copy in host memory, started now: valid once an event recorded afterwards has happened."""
    if tensor.device.type != "cuda":
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    return host


@dataclass(slots=True)
class PromptChunk:
    """Packed log probabilities of prompt tokens of one sequence, on the way to the host."""

    parts: list[Tensor]  # int32 [rows, 3 + 2n] each, see `sampler.prompt_logprobs`
    num_top: int

    def entries(self) -> list[TokenLogprobs]:
        values = [v for part in self.parts for v in unpack_logprobs(part.numpy(), [self.num_top] * part.shape[0])]
        return [value for value in values if value is not None]


class PendingStep:
    """A submitted step. Host copies of its results were started before `done` was recorded."""

    def __init__(
        self,
        plan: StepPlan,
        sampled: SamplerOutput | None,
        batch: SamplingBatch | ShardedBatch | None,
        prompt_chunks: list[PromptChunk | None] | None,
        cuda: bool,
    ) -> None:
        self._plan = plan
        self._batch = batch
        self._token_ids = None if sampled is None else to_host(sampled.token_ids)
        self._logprobs = None if sampled is None or sampled.logprobs is None else to_host(sampled.logprobs)
        self._prompt_chunks = prompt_chunks
        self._done = torch.cuda.Event() if cuda else None
        if self._done is not None:
            self._done.record()

    @property
    def ready(self) -> bool:
        """Whether waiting would take no time."""
        return self._done is None or bool(self._done.query())

    def wait(self) -> None:
        """Until the device has done the step."""
        if self._done is not None:
            self._done.synchronize()

    def result(self) -> StepResult:
        """Waits for the step."""
        self.wait()
        scheduled = self._plan.scheduled
        rows = len(scheduled)
        token_ids = [-1] * rows
        if self._token_ids is not None:
            sampled = self._token_ids.tolist()
            token_ids = [token if s.samples else -1 for token, s in zip(sampled, scheduled, strict=True)]
        logprobs: list[TokenLogprobs | None] = [None] * rows
        if self._logprobs is not None and self._batch is not None:
            wanted = [n if s.samples else None for n, s in zip(self._batch.logprobs, scheduled, strict=True)]
            logprobs = unpack_logprobs(self._logprobs.numpy(), wanted)
        chunks = self._prompt_chunks or [None] * rows
        return StepResult(
            step_id=self._plan.step_id,
            token_ids=token_ids,
            logprobs=logprobs,
            prompt_logprobs=[None if chunk is None else chunk.entries() for chunk in chunks],
        )
