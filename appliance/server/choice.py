"""One choice of a response: turns an engine's tokens into text deltas, log probabilities and a finish reason.

Knows tokens and text; knows neither HTTP nor where the tokens come from.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from appliance.server.detokenizer import StopChecker
from appliance.server.tokenizer import ServerTokenizer
from appliance.types import EngineOutput, EngineRequest, TokenLogprobs


@dataclass(slots=True)
class Position:
    """A token with its log probabilities and the characters [start, end) that it completed in the choice's text."""

    logprobs: TokenLogprobs
    start: int
    end: int


@dataclass(slots=True)
class Delta:
    """What some outputs added to a choice."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)  # a token that ended generation is included
    positions: list[Position] = field(default_factory=list)  # of tokens whose text was given
    finish_reason: str | None = None  # "stop" or "length"

    @property
    def empty(self) -> bool:
        return not self.text and not self.positions and self.finish_reason is None


def is_plain(output: EngineOutput) -> bool:
    """Whether an output that is not its request's first brings nothing but tokens."""
    return output.finish_reason is None and output.logprobs is None and output.prompt_logprobs is None


class Choice:
    """`take` each output of the request in order. After `matched_stop` the request is to be ended by the caller."""

    def __init__(self, index: int, request: EngineRequest, tokenizer: ServerTokenizer) -> None:
        params = request.params
        self.index = index
        self.request = request
        self.num_tokens = 0
        self.num_cached_tokens = 0
        self.prompt_logprobs: list[TokenLogprobs | None] | None = None
        self.finish_reason: str | None = None
        self.matched_stop: str | None = None
        self._begun = False  # an output came
        self._keep_stop_token = params.include_stop_str_in_output
        self._min_tokens = params.min_tokens
        self._stream = tokenizer.text_stream(request.prompt_token_ids, skip_special_tokens=params.skip_special_tokens)
        self._stops = StopChecker(params.stop, params.include_stop_str_in_output) if params.stop else None
        self._per_token = self._stops is not None or params.logprobs is not None
        self._decoded = 0  # characters out of the text stream
        self._given = 0  # characters given in deltas
        self._waiting: deque[Position] = deque()  # tokens whose text is not given yet

    def take(self, outputs: Sequence[EngineOutput]) -> Delta:
        """What these outputs add. Outputs with an error are the caller's; after the end there is nothing more."""
        delta = Delta()
        for output in outputs:
            if self.finish_reason is not None:
                break
            self._take_one(output, delta)
        self._given += len(delta.text)
        self._release(delta)
        return delta

    @property
    def plain(self) -> bool:
        """An output that only brings tokens does nothing but add their text: it may go through `take_plain`."""
        return self._begun and not self._per_token and self.finish_reason is None

    def take_plain(self, token_ids: Sequence[int]) -> bytes:
        """The text that these tokens complete, written as the inside of a JSON string: `take` for a `plain` choice and
        an output that `is_plain`, at a fraction of the time."""
        self.num_tokens += len(token_ids)
        return self._stream.push_json(token_ids)

    def _take_one(self, output: EngineOutput, delta: Delta) -> None:
        if not self._begun:
            # Later ones would count generated tokens too, found in the prefix cache after a preemption or a restart.
            self.num_cached_tokens = min(output.num_cached_tokens, len(self.request.prompt_token_ids))
            self._begun = True
        if output.prompt_logprobs is not None:
            self.prompt_logprobs = output.prompt_logprobs
        hidden = output.stop_token_id is not None and not self._keep_stop_token
        shown = output.token_ids[:-1] if hidden else output.token_ids
        if self._per_token:
            self._push_each(shown, output.logprobs, delta)
            if self.matched_stop is not None:
                self.finish_reason = delta.finish_reason = "stop"
                return
        else:
            self.num_tokens += len(shown)
            delta.token_ids += shown
            delta.text += self._stream.push(shown)
        if hidden:
            self.num_tokens += 1
            delta.token_ids.append(output.token_ids[-1])
        if output.finish_reason is not None:
            self._finish(output.finish_reason, delta)

    def _push_each(self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs] | None, delta: Delta) -> None:
        """Token by token, so that the result does not depend on how many came together."""
        for index, token_id in enumerate(token_ids):
            text = self._stream.push((token_id,))
            start, self._decoded = self._decoded, self._decoded + len(text)
            if logprobs is not None:
                self._waiting.append(Position(logprobs[index], start, self._decoded))
            self.num_tokens += 1
            delta.token_ids.append(token_id)
            delta.text += self._check_stops(text)
            if self.matched_stop is not None:
                return

    def _check_stops(self, text: str) -> str:
        if self._stops is None or self.num_tokens <= self._min_tokens:
            return text
        text = self._stops.push(text)
        self.matched_stop = self._stops.matched
        return text

    def _finish(self, reason: str, delta: Delta) -> None:
        delta.text += self._check_stops(self._stream.flush())
        if self.matched_stop is not None:
            reason = "stop"
        elif self._stops is not None:
            delta.text += self._stops.flush()
        self.finish_reason = delta.finish_reason = reason

    def _release(self, delta: Delta) -> None:
        """Move the log probabilities of given text into the delta; at the end those of all text that stays."""
        waiting, cut = self._waiting, self.matched_stop is not None
        while waiting:
            position = waiting[0]
            if self.finish_reason is None:
                given = position.end <= self._given
            else:
                given = not cut or position.start < self._given
            if not given:
                break
            delta.positions.append(waiting.popleft())
