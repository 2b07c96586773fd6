"""From a validated request to running choices: limits that need the model, sampling parameters, admission, deltas.

Shared by chat and text completions. Knows tokens and the journal; the wire shapes are the routes'.
"""

from __future__ import annotations

import secrets
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass

import msgspec

from appliance.errors import ContextLengthError, InvalidRequestError, RequestFailedError, UnavailableError
from appliance.server.choice import Choice, Delta
from appliance.server.request_group import RequestGroup
from appliance.server.state import ServerState
from appliance.server.tokenizer import ServerTokenizer
from appliance.server.wire.requests import GenerationRequest
from appliance.server.wire.responses import PromptTokensDetails, Usage
from appliance.types import EngineOutput, EngineRequest, SamplingParams

_SEED_MASK = 2**63 - 1
_QUICK_LOOK = 8  # characters per token of context: twice what a token of usual text has
_BATCH = 32  # outputs of an answer that nobody sees before its end
_CUT_SLACK = 16  # tokens that cutting a text may add at most


@dataclass(frozen=True)
class Prompt:
    token_ids: list[int]
    text: str | None  # as the client gave it; None for token ids


@dataclass(frozen=True)
class Wanted:
    """What a route asks of a generation beyond the fields that all requests share."""

    response_id: str
    param: str  # the field that a too long prompt is blamed on
    max_tokens: int | None  # None: what the context leaves; 0: only score the prompt
    logprobs: int | None = None
    prompt_logprobs: int | None = None


async def encode_prompt(state: ServerState, text: str, param: str, *, add_special_tokens: bool) -> list[int]:
    """Token ids of a prompt. Raises ContextLengthError for a text that is far too long after looking at its beginning
    only: tokenizing megabytes to refuse them would cost seconds."""
    tokenizer, max_model_len = state.require_tokenizer(), state.require_engine().max_model_len
    beginning = _QUICK_LOOK * max_model_len
    if len(text) > 2 * beginning:
        count = len(await tokenizer.encode_async(text[:beginning], add_special_tokens=add_special_tokens))
        if count > max_model_len + _CUT_SLACK:
            raise ContextLengthError(
                f"This model's maximum context length is {max_model_len} tokens. However, the first {beginning} of "
                f"{len(text)} characters of the {param} alone have {count} tokens",
                hint="send a shorter prompt",
                param=param,
            )
    return await tokenizer.encode_async(text, add_special_tokens=add_special_tokens)


def new_id(prefix: str) -> str:
    return f"{prefix}-{uuid.uuid4().hex}"


class Generation:
    """The choices of one HTTP request: `n` for each prompt, prompt by prompt."""

    def __init__(self, group: RequestGroup, choices: Sequence[Choice], prompts: Sequence[Prompt]) -> None:
        self.choices = choices
        self.prompts = prompts
        self._group = group
        self._by_id = {choice.request.request_id: choice for choice in choices}

    def cancel(self) -> None:
        """End what still runs. Idempotent."""
        self._group.cancel()

    def prompt_of(self, choice: Choice) -> Prompt:
        return self.prompts[choice.index * len(self.prompts) // len(self.choices)]

    def usage(self) -> Usage:
        """So far. A prompt counts once, whatever n is."""
        n = len(self.choices) // len(self.prompts)
        prompt_tokens = sum(len(prompt.token_ids) for prompt in self.prompts)
        completion_tokens = sum(choice.num_tokens for choice in self.choices)
        cached = sum(choice.num_cached_tokens for choice in self.choices[::n])
        return Usage(prompt_tokens, prompt_tokens + completion_tokens, completion_tokens, PromptTokensDetails(cached))

    # ------------------------------------------------------------ what comes out

    def listen(self, on_ready: Callable[[], None]) -> None:
        """Call `on_ready` whenever there may be outputs to `take`, or the end has come."""
        self._group.listen(on_ready)

    def take(self) -> list[EngineOutput]:
        """What the engine gave since the last call; may be nothing."""
        return self._group.take()

    @property
    def ended(self) -> bool:
        """All was taken and nothing more comes."""
        return self._group.ended

    def by_choice(self, outputs: Sequence[EngineOutput]) -> list[tuple[Choice, list[EngineOutput]]]:
        """Raises RequestFailedError or UnavailableError if one of the choices failed."""
        ready: dict[str, list[EngineOutput]] = {}
        for output in outputs:
            if output.finish_reason in ("error", "abort"):
                raise _failure(output)
            ready.setdefault(output.request_id, []).append(output)
        return [(self._by_id[request_id], of_choice) for request_id, of_choice in ready.items()]

    def advance(self, choice: Choice, outputs: Sequence[EngineOutput]) -> Delta:
        """What these outputs add to the choice; ends it in the engine where they complete a stop string."""
        delta = choice.take(outputs)
        if choice.matched_stop is not None:
            self._group.finish(choice.request.request_id, "stop")
        return delta

    async def deltas(self) -> AsyncIterator[list[tuple[Choice, Delta]]]:
        """One delta a choice, until every choice has ended, for whoever wants the whole: many tokens at a time, unless
        a stop string may end a choice. Raises as `by_choice`."""
        if not any(choice.request.params.stop for choice in self.choices):
            self._group.batch = _BATCH
        async for outputs in self._group:
            yield [(choice, self.advance(choice, of_choice)) for choice, of_choice in self.by_choice(outputs)]


def start_generation(
    state: ServerState, request: GenerationRequest, prompts: Sequence[Prompt], wanted: Wanted
) -> Generation:
    """Check what needs the model and hand the request to the journal.

    Raises ContextLengthError or InvalidRequestError for what can never run, and as `RequestJournal.submit`.
    """
    tokenizer = state.require_tokenizer()
    max_model_len = state.require_engine().max_model_len
    n = request.n or 1
    requests: list[EngineRequest] = []
    params = _sampling_params(request, wanted, tokenizer)
    seed = request.seed if request.seed is not None else secrets.randbits(62)
    now = time.time()
    for prompt in prompts:
        max_tokens = _check_length(prompt, wanted, max_model_len, tokenizer.vocab_size)
        if params.min_tokens > max_tokens:
            raise InvalidRequestError(
                f"min_tokens is {params.min_tokens}, more than the {max_tokens} tokens allowed", param="min_tokens"
            )
        for choice in range(n):
            own_params = msgspec.structs.replace(params, max_tokens=max_tokens, seed=(seed + choice) & _SEED_MASK)
            requests.append(
                EngineRequest(
                    request_id=f"{wanted.response_id}-{len(requests)}",
                    prompt_token_ids=prompt.token_ids,
                    params=own_params,
                    eos_token_ids=tokenizer.eos_token_ids,
                    arrival_time=now,
                    priority=request.priority or 0,
                )
            )
    group = state.journal.submit(requests)
    choices = [Choice(index, each, tokenizer) for index, each in enumerate(requests)]
    return Generation(group, choices, prompts)


def _check_length(prompt: Prompt, wanted: Wanted, max_model_len: int, vocab_size: int) -> int:
    """The max_tokens to run with. Raises if the prompt is empty, has impossible tokens, or does not fit."""
    length = len(prompt.token_ids)
    if length == 0:
        raise InvalidRequestError(f"{wanted.param} has no tokens, at least one is needed", param=wanted.param)
    if max(prompt.token_ids) >= vocab_size:
        raise InvalidRequestError(
            f"{wanted.param} has token id {max(prompt.token_ids)}, the vocabulary ends at {vocab_size - 1}",
            param=wanted.param,
        )
    limit = f"This model's maximum context length is {max_model_len} tokens"
    if length > max_model_len or (length == max_model_len and wanted.max_tokens != 0):
        raise ContextLengthError(
            f"{limit}. However, the {wanted.param} has {length} tokens"
            + ("" if wanted.max_tokens == 0 else ", and at least one must be left to generate"),
            hint="send a shorter prompt",
            param=wanted.param,
        )
    if wanted.max_tokens is None:
        return max_model_len - length
    if length + wanted.max_tokens > max_model_len:
        raise ContextLengthError(
            f"{limit}. However, you requested {length + wanted.max_tokens} tokens "
            f"({length} in the {wanted.param}, {wanted.max_tokens} in the completion)",
            hint=f"send a shorter prompt, or max_tokens of {max_model_len - length} or less",
            param=wanted.param,
        )
    return wanted.max_tokens


def _sampling_params(request: GenerationRequest, wanted: Wanted, tokenizer: ServerTokenizer) -> SamplingParams:
    logit_bias = request.logit_bias or {}
    stop_token_ids = tuple(request.stop_token_ids or ())
    for param, ids in (("logit_bias", tuple(logit_bias)), ("stop_token_ids", stop_token_ids)):
        for token_id in ids:
            if not 0 <= token_id < tokenizer.vocab_size:
                raise InvalidRequestError(
                    f"{param} has token id {token_id}, allowed are 0 to {tokenizer.vocab_size - 1}", param=param
                )
    top_k, top_p = min(max(0, request.top_k or 0), tokenizer.vocab_size), _or(request.top_p, 1.0)
    if top_p == 0:  # the smallest set of tokens that has any probability: the most likely one
        top_k, top_p = 1, 1.0
    return SamplingParams(
        temperature=_or(request.temperature, 1.0),
        top_k=top_k,
        top_p=top_p,
        min_p=request.min_p or 0.0,
        repetition_penalty=_or(request.repetition_penalty, 1.0),
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        logit_bias=logit_bias,
        min_tokens=request.min_tokens or 0,
        ignore_eos=bool(request.ignore_eos),
        stop_token_ids=stop_token_ids,
        stop=request.stops,
        include_stop_str_in_output=bool(request.include_stop_str_in_output),
        skip_special_tokens=request.skip_special_tokens is not False,
        logprobs=wanted.logprobs,
        prompt_logprobs=wanted.prompt_logprobs,
    )


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def _failure(output: EngineOutput) -> RequestFailedError | UnavailableError:
    if output.finish_reason == "abort":
        return UnavailableError(output.error or "the request was aborted", hint="send it again")
    return RequestFailedError(output.error or "the engine failed on this request")
