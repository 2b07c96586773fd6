"""Hands plans to the model runner of this process and gives results back in order."""

from __future__ import annotations

from collections import deque

from appliance.batching.step import StepPlan, StepResult
from appliance.runtime.model_runner import ModelRunner, RunnerLimits
from appliance.runtime.results import PendingStep


class LocalExecutor:
    """`batching.step.Executor` over one runner in this process."""

    def __init__(self, runner: ModelRunner, limits: RunnerLimits, num_pages: int) -> None:
        self.num_pages = num_pages
        self.page_size = limits.page_size
        self.max_model_len = limits.max_model_len
        self.max_num_seqs = limits.max_num_seqs
        self.max_num_batched_tokens = limits.max_num_batched_tokens
        self.step_sizes = runner.step_sizes
        self._runner = runner
        self._pending: deque[PendingStep] = deque()

    def submit(self, plan: StepPlan) -> None:
        self._pending.append(self._runner.execute(plan))

    def collect(self) -> StepResult:
        return self._pending.popleft().result()

    def prepare_more(self) -> bool:
        """One piece of work, some 20 ms, that a start put off: the CUDA graph of one more batch size. Between steps.
        False: nothing is left."""
        return self._runner.capture_next()
