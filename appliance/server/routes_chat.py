"""POST /v1/chat/completions: messages to a prompt, deltas to chunks. Knows the wire shapes of chat."""

from __future__ import annotations

import json
from typing import Any

from fastapi import APIRouter
from msgspec import UNSET
from starlette.requests import Request
from starlette.responses import Response

from appliance.errors import InvalidRequestError
from appliance.server.answer import Answer
from appliance.server.choice import Choice, Delta, Position
from appliance.server.errors import parse
from appliance.server.generation import Prompt, Wanted, encode_prompt, new_id, start_generation
from appliance.server.logprobs import chat_logprobs
from appliance.server.sse import event
from appliance.server.state import ServerState
from appliance.server.tokenizer import ServerTokenizer
from appliance.server.wire.requests import ChatRequest, Message
from appliance.server.wire.responses import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    encode,
)
from appliance.server.wire.unsupported import check_extra_fields

router = APIRouter()


@router.post(
    "/v1/chat/completions",
    tags=["OpenAI"],
    openapi_extra={
        "requestBody": {"content": {"application/json": {"schema": {"$ref": "#/components/schemas/ChatRequest"}}}}
    },
)
async def chat_completions(request: Request) -> Response:
    """Answer a conversation; with `stream` as server-sent events."""
    state: ServerState = request.app.state.server
    body = parse(ChatRequest, await request.body())
    headers = check_extra_fields(body)
    model = state.resolve_model(body.model)
    state.journal.check_accepting(body.n or 1)
    tokenizer = state.require_tokenizer()
    text = render_messages(
        tokenizer,
        body.messages,
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=bool(body.continue_final_message),
        variables=body.chat_template_kwargs,
    )
    token_ids = await encode_prompt(state, text, "messages", add_special_tokens=bool(body.add_special_tokens))
    wanted = Wanted(
        response_id=new_id("chatcmpl"),
        param="messages",
        max_tokens=body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )
    generation = start_generation(state, body, [Prompt(token_ids, text)], wanted)
    answer = _Answer(body, generation, tokenizer, wanted.response_id, model, state.system_fingerprint)
    return await answer.respond(request, headers)


def render_messages(
    tokenizer: ServerTokenizer,
    messages: list[Message],
    *,
    add_generation_prompt: bool | None,
    continue_final_message: bool,
    variables: dict[str, Any] | None,
) -> str:
    """The prompt of a conversation. Raises InvalidRequestError if the model has no chat template or it refuses."""
    if tokenizer.chat_template is None:
        raise InvalidRequestError(
            "this model has no chat template", param="messages", hint="use /v1/completions, or serve it with a template"
        )
    if add_generation_prompt is None:
        add_generation_prompt = not continue_final_message
    return tokenizer.chat_template.render(
        [_template_message(message) for message in messages],
        add_generation_prompt=add_generation_prompt,
        continue_final_message=continue_final_message,
        variables=variables,
    )


def _template_message(message: Message) -> dict[str, Any]:
    """As templates expect it: content a string, arguments of earlier tool calls parsed."""
    fields = message.model_dump(exclude_none=True)
    fields["content"] = message.text
    for call in fields.get("tool_calls", ()):
        function = call.get("function")
        if isinstance(function, dict) and isinstance(function.get("arguments"), str):
            try:
                function["arguments"] = json.loads(function["arguments"])
            except ValueError as error:
                raise InvalidRequestError(
                    f"the arguments of an earlier tool call are not valid JSON: {error}", param="messages"
                ) from None
    return fields


class _Answer(Answer[ChatRequest]):
    """An answer as chat completion."""

    async def collect(self) -> ChatCompletion:
        gathered = await self.gather()
        choices = [
            ChatChoice(
                choice.index,
                ChatMessage(gathered[choice.index].text),
                choice.finish_reason or "stop",
                self._logprobs(gathered[choice.index].positions),
                gathered[choice.index].token_ids if self._token_ids else UNSET,
            )
            for choice in self.generation.choices
        ]
        prompt_ids = self.generation.prompts[0].token_ids if self._token_ids else UNSET
        return ChatCompletion(
            self.id,
            self.created,
            self.model,
            choices,
            self.generation.usage(),
            self.fingerprint,
            prompt_token_ids=prompt_ids,
        )

    def chunk(self, choice: Choice, delta: Delta, *, first: bool) -> bytes:
        events = self._role_chunk(choice) if first else b""
        if delta.empty and not (self._token_ids and delta.token_ids):
            return events
        content = ChatDelta(content=delta.text) if delta.text else ChatDelta()
        logprobs = self._logprobs(delta.positions)
        wire = ChatChunkChoice(choice.index, content, logprobs, delta.finish_reason)
        if self._token_ids:
            wire.token_ids = delta.token_ids
        return events + event(encode(self._empty_chunk(wire)))

    def usage_chunk(self) -> bytes:
        chunk = ChatChunk(self.id, self.created, self.model, [], self.fingerprint, usage=self.generation.usage())
        return event(encode(chunk))

    def _role_chunk(self, choice: Choice) -> bytes:
        chunk = self._empty_chunk(ChatChunkChoice(choice.index, ChatDelta("assistant", "")))
        if self._token_ids:
            chunk.prompt_token_ids = self.generation.prompts[0].token_ids
        return event(encode(chunk))

    def _empty_chunk(self, choice: ChatChunkChoice) -> ChatChunk:
        chunk = ChatChunk(self.id, self.created, self.model, [choice], self.fingerprint)
        if self._usage_at_end:
            chunk.usage = self.generation.usage() if self._usage_each else None
        return chunk

    def _logprobs(self, positions: list[Position]) -> ChatLogprobs | None:
        if not self.body.logprobs:
            return None
        return chat_logprobs(self.tokenizer, positions, self.body.top_logprobs or 0)
