"""Hands plans to the model runner of this process, and to those of other ranks, and gives results back in order.

Of several pipeline stages every rank runs its own for each plan. The last one samples: the first of its ranks sends
what came out to rank 0.
"""

from __future__ import annotations

import threading
from collections import deque
from queue import SimpleQueue

import torch

from appliance.batching.step import StepPlan, StepResult
from appliance.runtime.model_runner import ModelRunner, RunnerLimits
from appliance.runtime.ranks import Follower, Leader, Member, PrepareMore, RunStep
from appliance.runtime.results import PendingStep
from appliance.runtime.step_results import ResultWriter


class LocalExecutor:
    """`batching.step.Executor` over one runner in this process."""

    def __init__(self, runner: ModelRunner, limits: RunnerLimits, num_pages: int) -> None:
        self.num_pages = num_pages
        self.page_size = limits.page_size
        self.max_model_len = limits.max_model_len
        self.max_num_seqs = limits.max_num_seqs
        self.max_num_batched_tokens = limits.max_num_batched_tokens
        self.step_sizes = runner.step_sizes
        self.num_stages = runner.num_stages
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


class StagedExecutor(ParallelExecutor):
    """Rank 0's executor of an engine of several pipeline stages, of which this process has the first."""

    def collect(self) -> StepResult:
        with self._leader.operation():
            self._pending.popleft().wait()
            self._leader.finished()  # its own part
            return self._leader.result()


class ReportingExecutor(LocalExecutor):
    """The executor of the last stage's first rank. A thread waits for the device and sends results, while plans go on
    to be enqueued."""

    def __init__(self, runner: ModelRunner, limits: RunnerLimits, num_pages: int, results: ResultWriter) -> None:
        super().__init__(runner, limits, num_pages)
        self._results = results
        self._unsent: SimpleQueue[PendingStep] = SimpleQueue()
        self._failed: Exception | None = None
        gpu = torch.cuda.current_device() if torch.cuda.is_initialized() else None
        threading.Thread(target=self._send, args=(gpu,), name="results", daemon=True).start()

    def submit(self, plan: StepPlan) -> None:
        super().submit(plan)
        self._unsent.put(self._pending[-1])

    def drop(self, *, wait: bool) -> bool:
        """Raises why results could not be sent."""
        if self._failed is not None:
            raise self._failed
        return super().drop(wait=wait)

    def _send(self, gpu: int | None) -> None:
        try:
            if gpu is not None:
                torch.cuda.set_device(gpu)  # a thread's own; else waiting would open a context on the first GPU
            while True:
                self._results.send(self._unsent.get().result())
        except Exception as error:
            self._failed = error


def make_executor(runner: ModelRunner, limits: RunnerLimits, num_pages: int, member: Member) -> LocalExecutor:
    """This rank's executor."""
    if isinstance(member, Leader):
        cls = ParallelExecutor if member.pp_size == 1 else StagedExecutor
        return cls(runner, limits, num_pages, member)
    if isinstance(member, Follower) and member.results is not None:
        return ReportingExecutor(runner, limits, num_pages, member.results)
    return LocalExecutor(runner, limits, num_pages)
