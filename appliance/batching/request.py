"""A request inside the batching core: which requests can be served at all, and the state of one sequence.

Knows lengths, stop conditions and order. Does not know pages (`kv_cache.py`), when something runs (`scheduler.py`),
text, or what the tokens mean.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

from appliance.errors import ContextLengthError, InvalidRequestError
from appliance.types import EngineRequest, FinishReason, SamplingParams, TokenLogprobs

_MAX_TOKEN_ID = 2**31 - 1  # page digests and executors hold token ids as int32


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """What decides whether a request can ever be served. The server makes one from `EngineInfo`, so that it refuses a
    request for the same reason and in the same words as the engine would."""

    max_model_len: int  # tokens, prompt and output together
    num_pages: int  # of the whole KV cache
    page_size: int  # tokens

    @property
    def max_length(self) -> int:
        """Tokens, prompt and output together, that one sequence can have when it has the KV cache to itself."""
        return min(self.max_model_len, self.num_pages * self.page_size)

    def validate(self, request: EngineRequest) -> None:
        """Raises InvalidRequestError, or ContextLengthError with the limit, if the request can never be served.

        A `max_tokens` beyond the limit is no error here: such a sequence ends at the limit, with "length".
        """
        params, prompt = request.params, request.prompt_token_ids
        if not prompt:
            raise InvalidRequestError("the prompt is empty; it needs at least one token", param="prompt")
        if min(prompt) < 0 or max(prompt) > _MAX_TOKEN_ID:
            raise InvalidRequestError(f"token ids must be from 0 to {_MAX_TOKEN_ID}", param="prompt")
        if not 0 <= request.num_resumed_tokens < len(prompt):
            raise InvalidRequestError(
                f"num_resumed_tokens is {request.num_resumed_tokens}; it must be from 0 to {len(prompt) - 1}, "
                "since one token at least is the client's own"
            )
        if params.max_tokens is not None and params.max_tokens < 0:
            raise InvalidRequestError(f"max_tokens is {params.max_tokens}; it must be at least 0", param="max_tokens")
        if params.min_tokens < 0 or (params.max_tokens is not None and params.min_tokens > params.max_tokens):
            allowed = "at least 0" if params.max_tokens is None else f"from 0 to max_tokens, {params.max_tokens}"
            raise InvalidRequestError(f"min_tokens is {params.min_tokens}; it must be {allowed}", param="min_tokens")
        self._validate_length(len(prompt), request.num_resumed_tokens, scoring=params.max_tokens == 0)

    def _validate_length(self, total: int, resumed: int, *, scoring: bool) -> None:
        num_prompt = total - resumed
        if total <= self.max_length and num_prompt + (0 if scoring else 1) <= self.max_length:
            return
        if self.max_length == self.max_model_len:
            limit = f"the context limit is {self.max_length} tokens, prompt and output together"
        else:
            limit = f"the KV cache holds {self.max_length} tokens ({self.num_pages} pages of {self.page_size})"
        raise ContextLengthError(
            f"the prompt has {num_prompt} tokens, but {limit}, so a prompt can have at most {self.max_length - 1}",
            hint="shorten the prompt",
            param="prompt",
        )


@dataclass(eq=False, slots=True)
class Sequence:
    """An accepted request. Owned by the scheduler; `kv_cache.py` alone changes the fields of the last group."""

    request_id: str
    params: SamplingParams
    token_ids: list[int]  # all known tokens: prompt, then output
    num_prompt_tokens: int  # resumed tokens excluded: they are output
    max_length: int  # tokens; it ends when it has so many
    min_length: int  # tokens; a stop id counts only as a token behind so many
    stop_ids: frozenset[int]
    suppressed_token_ids: tuple[int, ...]  # see NewSequence
    seed: int
    rank: tuple[int, float, int]  # (priority, arrival time, serial number): the smallest runs first, is preempted last
    queue_rank: tuple[int, int, float, int]  # order in the waiting queue; preempted ones precede within a priority

    slot: int = -1  # -1: not running
    lane: int = 0  # of those that run, see `lanes.py`
    num_computed: int = 0  # leading tokens whose K/V a submitted step has computed or will
    num_in_flight: int = 0  # sampled by submitted steps, not yet collected, so not in token_ids
    prefill_end: int = 0  # while not decoding: tokens to run before the first decode step
    decoding: bool = False  # the step that samples the first new token has been scheduled
    finished: bool = False  # results still in flight are discarded
    detailed: bool = True  # the next output has more to it than one token
    started: bool = False  # the first output has been returned
    accepted_at: float = 0.0  # monotonic seconds
    queue_seconds: float = -1.0  # from there to its first step; negative: that is still to come
    admitted: bool = False  # has run before, so an admission is one after preemption
    num_cached_tokens: int = 0  # prompt tokens from the prefix cache at the first admission
    # [num_prompt_tokens], entry 0 None; None: not asked for, or already returned. Entries come by chunks.
    prompt_logprobs: list[TokenLogprobs | None] | None = None

    pages: list[int] = field(default_factory=list)
    capacity: int = 0  # tokens that the pages hold
    digests: list[bytes] = field(default_factory=list)  # of leading full pages; survives preemption
    num_registered: int = 0  # leading pages that the prefix cache has under their digest, hits included
    chain_open: bool = True  # False: another sequence owns the digest of a page of this one; see KvCache.register

    def finish_reason(self, token_id: int) -> FinishReason | None:
        """Why the sequence ends with `token_id`, which is the last of `token_ids`; None if it goes on."""
        length = len(self.token_ids)
        if token_id in self.stop_ids and length > self.min_length:
            return "stop"
        return "length" if length >= self.max_length else None


def make_sequence(request: EngineRequest, limits: RequestLimits, *, serial: int, engine_seed: int) -> Sequence:
    """The sequence of a validated request. `serial` orders requests that arrived at the same time."""
    params = request.params
    num_prompt = len(request.prompt_token_ids) - request.num_resumed_tokens
    max_length = limits.max_length
    if params.max_tokens is not None:
        max_length = min(max_length, num_prompt + params.max_tokens)
    stop_ids = frozenset(params.stop_token_ids) | frozenset(() if params.ignore_eos else request.eos_token_ids)
    wants_prompt_logprobs = params.prompt_logprobs is not None and request.num_resumed_tokens == 0
    return Sequence(
        request_id=request.request_id,
        params=params,
        token_ids=list(request.prompt_token_ids),
        num_prompt_tokens=num_prompt,
        max_length=max_length,
        min_length=num_prompt + params.min_tokens,
        stop_ids=stop_ids,
        suppressed_token_ids=tuple(sorted(stop_ids)) if params.min_tokens > 0 else (),
        seed=derive_seed(engine_seed, request.request_id) if params.seed is None else params.seed,
        rank=(request.priority, request.arrival_time, serial),
        queue_rank=(request.priority, 1, request.arrival_time, serial),
        prompt_logprobs=[None] * num_prompt if wants_prompt_logprobs else None,
    )


def derive_seed(engine_seed: int, request_id: str) -> int:
    """The seed of a request that brings none, 0 <= seed < 2**63. A function of both and not drawn from a generator, so
    that a request resubmitted after an engine restart goes on with its own random stream."""
    digest = hashlib.blake2b(f"{engine_seed}:{request_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
