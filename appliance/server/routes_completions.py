"""POST /v1/completions: prompts as text or tokens, echo with log probabilities. Knows their wire shapes."""

from __future__ import annotations

from fastapi import APIRouter
from msgspec import UNSET
from starlette.requests import Request
from starlette.responses import Response

from appliance.server.answer import Answer
from appliance.server.choice import Choice, Delta, Position
from appliance.server.errors import parse
from appliance.server.generation import Prompt, Wanted, encode_prompt, new_id, start_generation
from appliance.server.logprobs import completion_logprobs, echo_logprobs, joined
from appliance.server.sse import event
from appliance.server.state import ServerState
from appliance.server.wire.requests import CompletionRequest
from appliance.server.wire.responses import Completion, CompletionChoice, CompletionLogprobs, encode
from appliance.server.wire.unsupported import check_extra_fields

router = APIRouter()

_DEFAULT_MAX_TOKENS = 16  # OpenAI's


@router.post(
    "/v1/completions",
    tags=["OpenAI"],
    openapi_extra={
        "requestBody": {"content": {"application/json": {"schema": {"$ref": "#/components/schemas/CompletionRequest"}}}}
    },
)
async def completions(request: Request) -> Response:
    """Continue one or several prompts; with `stream` as server-sent events."""
    state: ServerState = request.app.state.server
    body = parse(CompletionRequest, await request.body())
    headers = check_extra_fields(body)
    model = state.resolve_model(body.model)
    state.journal.check_accepting((body.n or 1) * len(body.prompts))
    tokenizer = state.require_tokenizer()
    prompts = [await _prompt(state, body, given) for given in body.prompts]
    wanted = Wanted(
        response_id=new_id("cmpl"),
        param="prompt",
        max_tokens=body.max_tokens if body.max_tokens is not None else _DEFAULT_MAX_TOKENS,
        logprobs=body.logprobs,
        prompt_logprobs=body.logprobs if body.echo else None,
    )
    generation = start_generation(state, body, prompts, wanted)
    answer = _Answer(body, generation, tokenizer, wanted.response_id, model, state.system_fingerprint)
    return await answer.respond(request, headers)


async def _prompt(state: ServerState, body: CompletionRequest, given: str | list[int]) -> Prompt:
    if isinstance(given, list):
        return Prompt(given, None)
    add = body.add_special_tokens is not False
    return Prompt(await encode_prompt(state, given, "prompt", add_special_tokens=add), given)


class _Answer(Answer[CompletionRequest]):
    """An answer as completion."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._skip_special = self.body.skip_special_tokens is not False
        self._echoes: dict[int, str] = {}  # by prompt, as a prompt has n choices

    async def collect(self) -> Completion:
        gathered = await self.gather()
        choices = []
        for choice in self.generation.choices:
            wire = CompletionChoice(
                choice.index,
                self._echo(choice) + gathered[choice.index].text,
                self._logprobs(choice, gathered[choice.index].positions, first=True),
                choice.finish_reason or "stop",
            )
            if self._token_ids:
                wire.token_ids = gathered[choice.index].token_ids
                wire.prompt_token_ids = self.generation.prompt_of(choice).token_ids
            choices.append(wire)
        return Completion(self.id, self.created, self.model, choices, self.fingerprint, usage=self.generation.usage())

    def chunk(self, choice: Choice, delta: Delta, *, first: bool) -> bytes:
        text = self._echo(choice) + delta.text if first else delta.text
        if not text and delta.empty and not (self._token_ids and delta.token_ids):
            return b""
        logprobs = self._logprobs(choice, delta.positions, first)
        wire = CompletionChoice(choice.index, text, logprobs, delta.finish_reason)
        if self._token_ids:
            wire.token_ids = delta.token_ids
            wire.prompt_token_ids = self.generation.prompt_of(choice).token_ids if first else UNSET
        usage = None if self._usage_at_end else UNSET
        chunk = Completion(self.id, self.created, self.model, [wire], self.fingerprint, usage=usage)
        if self._usage_each:
            chunk.usage = self.generation.usage()
        return event(encode(chunk))

    def usage_chunk(self) -> bytes:
        chunk = Completion(self.id, self.created, self.model, [], self.fingerprint, usage=self.generation.usage())
        return event(encode(chunk))

    def _echo(self, choice: Choice) -> str:
        """The prompt's text if it is to be echoed. With log probabilities it is the tokens' text, which offsets count
        in; else as the client gave it."""
        if not self.body.echo:
            return ""
        prompt = self.generation.prompt_of(choice)
        if prompt.text is not None and self.body.logprobs is None:
            return prompt.text
        key = id(prompt)
        if key not in self._echoes:
            stream = self.tokenizer.text_stream((), skip_special_tokens=self._skip_special)
            self._echoes[key] = stream.push(prompt.token_ids) + stream.flush()
        return self._echoes[key]

    def _logprobs(self, choice: Choice, positions: list[Position], first: bool) -> CompletionLogprobs | None:
        """Of these positions; `first` puts those of the echoed prompt before them."""
        if self.body.logprobs is None:
            return None
        top = self.body.logprobs
        own = completion_logprobs(self.tokenizer, positions, top, len(self._echo(choice)))
        if not first or not self.body.echo:
            return own
        token_ids = self.generation.prompt_of(choice).token_ids
        scored = choice.prompt_logprobs or [None] * len(token_ids)
        return joined(echo_logprobs(self.tokenizer, token_ids, scored, top, self._skip_special), own)
