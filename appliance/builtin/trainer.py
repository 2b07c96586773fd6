"""The training loop of the built-in model: batches in, checkpoint out, within a wall-clock budget.

The learning rate and the curriculum follow elapsed time, so that a run of any speed ends in time with
both at their end.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from appliance.builtin import attention, generate, tasks
from appliance.builtin.data import Batch, BatchSource
from appliance.builtin.network import Network, NetworkConfig
from appliance.builtin.optimizer import Optimizer
from appliance.builtin.tokenizer import ChatEncoder, save_tokenizer

# Weight of an answer token in the loss: tasks with few or hard answer tokens count more.
LOSS_WEIGHTS: dict[str, float] = {
    "addition": 2.0,
    "subtraction": 2.0,
    "multiplication": 1.0,
    "sorting": 1.0,
    "copying": 0.5,
    "recall": 4.0,
    "json": 0.5,
    "units": 1.0,
    "small_talk": 0.5,
}
WARMUP_STEPS = 100
DECAY_FROM = 0.5  # share of the run after which the learning rate falls linearly to zero
MATRIX_LR, ADAM_LR, WEIGHT_DECAY = 0.02, 0.003, 0.1
_STEPS_IN_FLIGHT = 3


@dataclass(frozen=True)
class Plan:
    """What a run may use. Exactly one of `deadline` and `steps` ends it."""

    out: Path
    device: torch.device
    deadline: float | None  # time.monotonic() at which the last step is done
    steps: int | None
    batch_tokens: int
    compile: bool
    evaluation_samples: int
    recall_lengths: tuple[int, ...]
    report_seconds: float
    seed: int


def schedule(progress: float, step: int) -> float:
    """Relative learning rate: short warm-up by steps, constant, then linear to zero (a trapezoid)."""
    warmup = min(1.0, (step + 1) / WARMUP_STEPS)
    return warmup * min(1.0, max(0.0, (1.0 - progress) / (1.0 - DECAY_FROM)))


class Curriculum:
    """How long recall tables may be. The circuit that finds an entry forms suddenly, and only on short tables: they
    stay short until the loss says that it is there, then grow steadily."""

    FOUND = 0.15  # mean loss of recall's answer tokens; guessing the value among those of the table gives about 0.5
    LATEST = 0.5  # share of the run at which tables grow in any case
    GROWTH = 0.25  # share of the run that growing takes

    def __init__(self) -> None:
        self._since: float | None = None  # share of the run at which growing began

    def observe(self, progress: float, recall_loss: float) -> None:
        """Take in the loss of the last interval."""
        if self._since is None and (recall_loss < self.FOUND or progress > self.LATEST):
            self._since = progress

    def grown(self, progress: float) -> float:
        """0: short tables only; 1: all lengths."""
        return 0.0 if self._since is None else min(1.0, (progress - self._since) / self.GROWTH)


class _Losses:
    """Sums of answer-token losses per task since the last report; read only then, so the GPU is not waited for."""

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(len(tasks.TASKS) + 1, device=device)
        self.right = torch.zeros(len(tasks.TASKS) + 1, device=device)
        self.counts = np.zeros(len(tasks.TASKS) + 1)

    def add(self, losses: Tensor, task: Tensor, counts: Any) -> None:
        self.sums.index_add_(0, task, losses)
        # A token of probability above one half is certainly the greedy choice.
        self.right.index_add_(0, task, (losses < 0.6931).float())
        self.counts += counts

    def take(self) -> dict[str, tuple[float, float]]:
        """Per task that was seen: mean loss, and the share of answer tokens given more than half the probability.
        Starts anew."""
        sums, right, counts = self.sums.tolist(), self.right.tolist(), self.counts
        self.sums.zero_(), self.right.zero_()
        self.counts = np.zeros(len(tasks.TASKS) + 1)
        return {t: (sums[i] / counts[i], right[i] / counts[i]) for i, t in enumerate(tasks.TASKS, 1) if counts[i]}


class Trainer:
    """Owns network, optimizer and progress of one run."""

    def __init__(self, plan: Plan, tokenizer: Tokenizer, source: BatchSource, config: NetworkConfig) -> None:
        self.plan, self.source, self.tokenizer = plan, source, tokenizer
        self.encoder = ChatEncoder(tokenizer)
        cuda = plan.device.type == "cuda"
        self.network = Network(config, torch.bfloat16 if cuda else torch.float32, plan.seed).to(plan.device)
        self.kernel = attention.choose(plan.device, config.num_heads, config.num_kv_heads, config.head_dim)
        self.optimizer = Optimizer(self.network, matrix_lr=MATRIX_LR, adam_lr=ADAM_LR, weight_decay=WEIGHT_DECAY)
        weights = [0.0, *(LOSS_WEIGHTS[t] for t in tasks.TASKS)]
        self._weight_of = np.array(weights)
        self._weights = torch.tensor(weights, device=plan.device)
        self._losses = _Losses(plan.device)
        self._curriculum = Curriculum()
        self.tokens = 0

    def _loss(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Any]:
        """Weighted mean loss of a batch; per-token losses, task numbers, and the count of each task number."""
        device = self.plan.device
        host = torch.from_numpy(batch.tokens.astype(np.int64))
        task_host = torch.from_numpy(batch.task.astype(np.int64))
        if device.type == "cuda":
            host, task_host = host.pin_memory(), task_host.pin_memory()
        tokens, task = host.to(device, non_blocking=True), task_host.to(device, non_blocking=True)
        packed = attention.pack(batch.lengths, device)
        hidden = self.network.hidden(tokens, packed.positions, attention.attention_over(self.kernel, packed))
        losses = self.network.token_losses(hidden, tokens.roll(-1))
        counts = np.bincount(batch.task, minlength=len(self._weight_of))
        total = (losses * self._weights[task]).sum() / float((counts * self._weight_of).sum() + 1e-9)
        return total, losses.detach(), task, counts

    def warm_up(self) -> None:
        """Compile, on one batch whose gradients are thrown away; without compilation where that fails."""
        batch = self.source.next(0.0)
        if self.plan.compile:
            self.network.compile_parts()
        try:
            self._loss(batch)[0].backward()
        except Exception as error:
            if not self.plan.compile:
                raise
            print(f"compilation failed, going on without: {type(error).__name__}: {str(error)[:300]}", flush=True)
            self._uncompile()
            self._loss(batch)[0].backward()
        for parameter in self.network.parameters():
            parameter.grad = None

    def _uncompile(self) -> None:
        for layer in self.network.model.layers:
            del layer.before_attention, layer.after_attention
        del self.network.token_losses

    def run(self, stopped: Callable[[], bool]) -> None:
        """Train to the deadline or the number of steps, or until `stopped()`."""
        plan = self.plan
        started = reported = time.monotonic()
        in_flight: deque[Any] = deque()
        step = reported_tokens = 0
        norm = torch.zeros(())
        while not stopped():
            now = time.monotonic()
            if plan.steps is not None:
                progress = step / plan.steps
            else:
                assert plan.deadline is not None
                progress = (now - started) / max(1e-3, plan.deadline - started)
            if progress >= 1.0:
                break
            if now - reported > plan.report_seconds:
                self._report(step, progress, (self.tokens - reported_tokens) / (now - reported), now - started, norm)
                reported, reported_tokens = now, self.tokens
            loss, losses, task, counts = self._loss(self.source.next(self._curriculum.grown(progress)))
            loss.backward()
            norm = self.optimizer.step(schedule(progress, step))
            self._losses.add(losses, task, counts)
            self.tokens += plan.batch_tokens
            step += 1
            if plan.device.type == "cuda":
                event = torch.cuda.Event()
                event.record()
                in_flight.append(event)
                if len(in_flight) > _STEPS_IN_FLIGHT:
                    in_flight.popleft().synchronize()
        seconds = time.monotonic() - started
        self._report(step, 1.0, self.tokens / max(seconds, 1e-3), seconds, norm)
        self.steps = step

    def _report(self, step: int, progress: float, speed: float, seconds: float, norm: Tensor) -> None:
        """One line: losses per task with the share of sure answer tokens, speed, remaining time."""
        remaining = seconds / progress - seconds if progress > 0 else 0.0
        taken = self._losses.take()
        losses = " ".join(f"{t[:8]}={loss:.3f}/{right:.1%}" for t, (loss, right) in taken.items())
        if "recall" in taken:
            self._curriculum.observe(progress, taken["recall"][0])
        print(
            f"step {step} {progress:.0%} left={remaining:.0f}s tok/s={speed / 1e6:.3f}M norm={float(norm):.2f} "
            f"lr={schedule(progress, step):.2f} tables={self._curriculum.grown(progress):.2f} "
            f"fresh={self.source.fresh} replayed={self.source.replayed} {losses}",
            flush=True,
        )

    def save(self) -> None:
        """Write the checkpoint with its tokenizer."""
        self.plan.out.mkdir(parents=True, exist_ok=True)
        encoder = self.encoder
        self.network.save(self.plan.out, begin=encoder.begin, end=encoder.end, pad=encoder.pad)
        save_tokenizer(self.tokenizer, self.plan.out)

    def evaluate(self) -> dict[str, float]:
        """Print the accuracy table of the weights as saved (rounded to bf16); returns accuracy per task."""
        with torch.no_grad():
            for parameter in self.network.parameters():
                parameter.copy_(parameter.to(torch.bfloat16))
        if self.plan.compile:
            self._uncompile_if_needed()
        results = generate.evaluate(
            self.network, self.encoder, self.plan.evaluation_samples, recall_lengths=self.plan.recall_lengths
        )
        generate.print_table(results)
        return {r.name: round(r.correct / r.total, 4) for r in results}

    def _uncompile_if_needed(self) -> None:
        if "token_losses" in self.network.__dict__:
            self._uncompile()


def train(
    plan: Plan, tokenizer: Tokenizer, source: BatchSource, config: NetworkConfig, stopped: Callable[[], bool]
) -> None:
    """One whole run: warm up, train, save, evaluate. The last line printed is one JSON object."""
    begun = time.monotonic()
    trainer = Trainer(plan, tokenizer, source, config)
    parameters = sum(p.numel() for p in trainer.network.parameters())
    trainer.warm_up()
    print(
        f"device={plan.device} parameters={parameters} attention={trainer.kernel} batch_tokens={plan.batch_tokens} "
        f"ready after {time.monotonic() - begun:.1f}s",
        flush=True,
    )
    trainer.run(stopped)
    source.close()
    trainer.save()
    print(f"saved {plan.out} after {time.monotonic() - begun:.1f}s", flush=True)
    accuracy = {} if stopped() else trainer.evaluate()
    summary = {
        "steps": trainer.steps,
        "tokens": trainer.tokens,
        "parameters": parameters,
        "fresh_batches": source.fresh,
        "replayed_batches": source.replayed,
        "interrupted": stopped(),
        "accuracy": accuracy,
    }
    print(json.dumps(summary), flush=True)
