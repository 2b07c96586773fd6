"""Hands plans to the model runner of this process, and to those of other ranks, and gives results back in order."""

from __future__ import annotations

from collections import deque

from appliance.batching.step import StepPlan, StepResult
from appliance.runtime.model_runner import ModelRunner, RunnerLimits
from appliance.runtime.ranks import Leader, Member, PrepareMore, RunStep
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

    # For ranks whose results nobody asks for.

    @property
    def in_flight(self) -> int:
        """Steps submitted and neither collected nor dropped."""
        return len(self._pending)

    def drop(self, *, wait: bool) -> bool:
        """Forget the oldest step in flight once the device has done it; False if it has not and `wait` is."""
        if not wait and not self._pending[0].ready:
            return False
        self._pending.popleft().wait()
        return True


class ParallelExecutor(LocalExecutor):
    """Rank 0's executor of an engine of several ranks: every plan goes to all of them. All compute the same logits and
    sample the same tokens, so nothing comes back."""

    def __init__(self, runner: ModelRunner, limits: RunnerLimits, num_pages: int, leader: Leader) -> None:
        super().__init__(runner, limits, num_pages)
        self._leader = leader

    def submit(self, plan: StepPlan) -> None:
        """Raises what a rank was lost for, as `collect` does."""
        with self._leader.operation():
            self._leader.send(RunStep(plan))
            super().submit(plan)

    def collect(self) -> StepResult:
        with self._leader.operation():
            result = super().collect()
        self._leader.finished()
        return result

    def prepare_more(self) -> bool:
        with self._leader.operation():
            if not self._runner.can_capture:
                return False
            self._leader.send(PrepareMore())
            done = super().prepare_more()
        self._leader.finished()
        return done


def make_executor(runner: ModelRunner, limits: RunnerLimits, num_pages: int, member: Member) -> LocalExecutor:
    """This rank's executor."""
    if isinstance(member, Leader):
        return ParallelExecutor(runner, limits, num_pages, member)
    return LocalExecutor(runner, limits, num_pages)
