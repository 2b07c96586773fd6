"""What `LLM` gives: generations, and the stream of their chunks. Knows tokens and text; runs nothing itself."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from appliance.errors import RequestFailedError
from appliance.server.choice import Choice
from appliance.server.tokenizer import ServerTokenizer
from appliance.types import EngineOutput, EngineRequest, FinishReason, TokenLogprobs


@dataclass
class Generation:
    """What one prompt gave."""

    index: int  # of the prompt
    prompt_token_ids: list[int]
    token_ids: list[int] = field(default_factory=list)  # a token that ended it is included
    text: str = ""  # without the token or the string that ended it
    finish_reason: FinishReason | None = None  # "stop" or "length"
    logprobs: list[TokenLogprobs] = field(default_factory=list)  # one per token id; empty if not asked for
    prompt_logprobs: list[TokenLogprobs | None] | None = None  # one per prompt token, the first None
    num_cached_tokens: int = 0  # prompt tokens that the prefix cache served


@dataclass(frozen=True)
class GenerationChunk:
    """What one step gave one prompt, when streaming. The texts of a prompt, put together, are its `Generation.text`."""

    index: int  # of the prompt
    text: str  # empty while a character or a possible stop string is incomplete
    token_ids: list[int]
    finish_reason: FinishReason | None  # set in the last chunk of a prompt
    logprobs: list[TokenLogprobs] | None = None  # one per token id


class Running:
    """One prompt in the engine: collects what comes; text and stop strings are the server's `Choice`."""

    def __init__(self, index: int, request: EngineRequest, tokenizer: ServerTokenizer) -> None:
        self.generation = Generation(index, request.prompt_token_ids)
        self._choice = Choice(index, request, tokenizer)

    def take(self, output: EngineOutput) -> GenerationChunk:
        """Add an engine output. RequestFailedError if it is a failure."""
        generation, choice = self.generation, self._choice
        if output.finish_reason in ("error", "abort"):
            raise RequestFailedError(f"prompt {generation.index}: {output.error or 'the engine ended it'}")
        delta = choice.take([output])
        finish: FinishReason | None = None
        if delta.finish_reason is not None:
            finish = "stop" if delta.finish_reason == "stop" else "length"
        generation.text += delta.text
        generation.token_ids += output.token_ids
        generation.logprobs += output.logprobs or []
        generation.prompt_logprobs = choice.prompt_logprobs
        generation.num_cached_tokens = choice.num_cached_tokens
        generation.finish_reason = finish
        return GenerationChunk(generation.index, delta.text, output.token_ids, finish, output.logprobs)


class GenerationStream(Iterator[GenerationChunk]):
    """Chunks of the prompts of one call, as steps give them. Reading it runs the engine.

    A stream that is closed, left as a `with` block, or no longer referred to cancels what has not ended.
    """

    def __init__(
        self,
        running: Mapping[str, Running],
        step: Callable[[], None],
        cancel: Callable[[Collection[str]], None],
    ) -> None:
        """`running`: by request id. `step` runs the engine, which gives each stream its outputs with `take`; `cancel`
        takes requests back."""
        self._step = step
        self._cancel = cancel
        self._running = running
        self.unfinished = set(running)  # request ids
        self._chunks: deque[GenerationChunk] = deque()
        self._failure: RequestFailedError | None = None

    def __next__(self) -> GenerationChunk:
        try:
            while not self._chunks:
                if self._failure is not None:
                    raise self._failure
                if not self.unfinished:
                    raise StopIteration
                self._step()
        except BaseException:
            self.close()
            raise
        return self._chunks.popleft()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Cancel what has not ended; its pages are free afterwards. Chunks that came already can still be read."""
        unfinished, self.unfinished = self.unfinished, set()
        if unfinished:
            self._cancel(unfinished)

    def take(self, output: EngineOutput) -> None:
        """An output of one of its requests, from the step of whichever stream is being read."""
        if output.request_id not in self.unfinished:
            return
        try:
            chunk = self._running[output.request_id].take(output)
        except RequestFailedError as error:  # for the reader of this stream, whoever ran the step
            self._failure = error
            self.unfinished.discard(output.request_id)
            return
        self._chunks.append(chunk)
        if chunk.finish_reason is not None:
            self.unfinished.discard(output.request_id)
            if output.finish_reason is None:  # a stop string: the engine does not know of it
                self._cancel([output.request_id])
