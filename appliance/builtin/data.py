"""Training batches of the built-in model: mixes the tasks and packs conversations into flat rows, in worker processes.

Imports no torch, so that worker processes start in a moment. Knows nothing of the network.
"""

from __future__ import annotations

import math
import multiprocessing
import queue
import random
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from appliance.builtin import tasks
from appliance.builtin.tokenizer import MAX_LENGTH, ChatEncoder

# Share of all tokens. Long recall prompts are many tokens and few answers, hence the large share.
SHARES: dict[str, float] = {
    "addition": 0.09,
    "subtraction": 0.09,
    "multiplication": 0.06,
    "sorting": 0.11,
    "copying": 0.05,
    "recall": 0.45,
    "json": 0.05,
    "units": 0.05,
    "small_talk": 0.05,
}
SHORT_TASKS = tuple(task for task in tasks.TASKS if task != "recall")
MULTI_TURN = 0.25  # share of conversations of short tasks that have 2 to 4 turns
_SHORTEST, _FIRST_LONGEST, _LONGEST = 96, 300, 3980  # tokens of a recall conversation
_TOKENS_PER_QUESTION = 26
_SMALLEST_GAP = 40  # a rest of a row smaller than this is padding
_SYSTEM_PROMPTS = (
    "You are the built-in model of the appliance.",
    "You are a helpful assistant.",
    "Answer briefly and exactly.",
    "You are a small model. Solve the task.",
)

Encoded = tuple[list[int], list[tuple[int, int, int]]]  # ids; start, end and task number of each answer


@dataclass(frozen=True)
class Batch:
    """Conversations back to back. A prediction counts for the loss where `task` is not 0."""

    tokens: np.ndarray[Any, np.dtype[np.uint16]]  # [num_tokens]
    task: np.ndarray[
        Any, np.dtype[np.uint8]
    ]  # [num_tokens]: 1 + index in TASKS if the *next* token is part of an answer
    lengths: tuple[int, ...]  # of each conversation; their sum is num_tokens


def recall_plan(rng: random.Random, grown: float, longest: int = _LONGEST) -> tuple[int, int]:
    """(length of the conversation, number of questions); `grown` (0..1): from short tables only to all lengths."""
    limit = min(longest, int(math.exp(math.log(_FIRST_LONGEST) * (1 - grown) + math.log(_LONGEST) * grown)))
    if rng.random() < 0.4:
        length = int(math.exp(rng.uniform(math.log(_SHORTEST), math.log(max(limit, _SHORTEST + 1)))))
    else:
        length = rng.randint(_SHORTEST, max(limit, _SHORTEST))
    questions = 1 if rng.random() < 0.2 else rng.randint(2, max(2, min(48, length // 40)))
    return length, questions


class Packer:
    """Endless batches of one worker, fixed by its seed and by the values of `grown` passed in."""

    def __init__(self, encoder: ChatEncoder, num_tokens: int, seed: int) -> None:
        self._encoder, self._num_tokens = encoder, num_tokens
        self._rng = random.Random(f"training {seed}")
        self._made = dict.fromkeys(tasks.TASKS, 0.0)  # tokens so far
        self._waiting: Encoded | None = None  # did not fit into the last batch

    def _messages(self, task: str, grown: float) -> tuple[tuple[tasks.Message, ...], list[str]]:
        """A conversation led by `task`, and the task of each of its answers."""
        rng = self._rng
        if task == "recall":
            length, questions = recall_plan(rng, grown, min(_LONGEST, self._num_tokens - 64))
            length -= _TOKENS_PER_QUESTION * (questions - 1)
            return tasks.recall_conversation(rng, length, questions), ["recall"] * questions
        messages: list[tasks.Message] = []
        if rng.random() < 0.1:
            messages.append({"role": "system", "content": rng.choice(_SYSTEM_PROMPTS)})
        turns = [task]
        if rng.random() < MULTI_TURN:
            turns += [rng.choice((task, rng.choice(SHORT_TASKS))) for _ in range(rng.randint(1, 3))]
            rng.shuffle(turns)
        for turn in turns:
            drawn = tasks.sample(turn, rng)
            messages += [*drawn.messages, {"role": "assistant", "content": drawn.answer}]
        return tuple(messages), turns

    def _encoded(self, task: str, grown: float) -> Encoded:
        messages, answer_tasks = self._messages(task, grown)
        ids, answers = self._encoder.conversation(messages)
        self._made[task] += len(ids)
        return ids, [
            (start, end, 1 + tasks.TASKS.index(t)) for (start, end), t in zip(answers, answer_tasks, strict=True)
        ]

    def _next(self, grown: float) -> Encoded:
        """The conversation left over from the last batch, or one of the task that is furthest behind its share."""
        if self._waiting is not None:
            waiting, self._waiting = self._waiting, None
            return waiting
        return self._encoded(min(SHARES, key=lambda task: self._made[task] / SHARES[task]), grown)

    def batch(self, grown: float) -> Batch:
        """One batch of exactly `num_tokens` tokens; its end is padding without loss, as one more conversation."""
        tokens = np.full(self._num_tokens, self._encoder.pad, dtype=np.uint16)
        task_of = np.zeros(self._num_tokens, dtype=np.uint8)
        lengths: list[int] = []
        used = misses = 0
        while misses < 4 and self._num_tokens - used > _SMALLEST_GAP:
            item = self._encoded(self._rng.choice(SHORT_TASKS), grown) if misses else self._next(grown)
            ids, answers = item
            if len(ids) > self._num_tokens - used:
                if not misses and len(ids) <= min(MAX_LENGTH, self._num_tokens):
                    self._waiting = item
                misses += 1
                continue
            tokens[used : used + len(ids)] = ids
            for start, end, task in answers:
                task_of[used + start - 1 : used + end - 1] = task
            lengths.append(len(ids))
            used += len(ids)
        if used < self._num_tokens:
            lengths.append(self._num_tokens - used)
        return Batch(tokens, task_of, tuple(lengths))


def _work(tokenizer_json: str, num_tokens: int, seed: int, grown: Any, out: Any) -> None:
    """Body of a worker process: batches into the queue until the parent ends it."""
    packer = Packer(ChatEncoder(Tokenizer.from_str(tokenizer_json)), num_tokens, seed)
    try:
        while True:
            out.put(packer.batch(grown.value))
    except (KeyboardInterrupt, BrokenPipeError):
        return


class BatchSource:
    """Batches from worker processes; where they do not keep up, earlier batches are used again rather than waiting."""

    MIN_REPLAY = 100  # batches kept before any is used again
    KEEP = 2000

    def __init__(self, tokenizer: Tokenizer, num_tokens: int, workers: int, seed: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._grown = context.Value("d", 0.0)
        self._queue = context.Queue(maxsize=4 * workers)
        arguments = (tokenizer.to_str(), num_tokens)
        self._processes = [
            context.Process(target=_work, args=(*arguments, seed * 1000 + i, self._grown, self._queue), daemon=True)
            for i in range(workers)
        ]
        self._kept: list[Batch] = []
        self._random = random.Random(seed)
        self.fresh = self.replayed = 0  # batches handed out
        for process in self._processes:
            process.start()

    def next(self, grown: float) -> Batch:
        """The next batch; `grown` (0..1) is the curriculum of batches made from now on."""
        self._grown.value = grown
        try:
            batch = self._queue.get(block=len(self._kept) < self.MIN_REPLAY, timeout=120)
        except queue.Empty:
            if not self._kept:
                raise RuntimeError("no training batch arrived within 120 s: the worker processes failed") from None
            self.replayed += 1
            return self._random.choice(self._kept)
        assert isinstance(batch, Batch)
        self.fresh += 1
        if len(self._kept) < self.KEEP:
            self._kept.append(batch)
        else:
            self._kept[self._random.randrange(self.KEEP)] = batch
        return batch

    def close(self) -> None:
        """End the worker processes."""
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.join(timeout=5)
        self._queue.close()
        self._queue.cancel_join_thread()
