"""Fields that clients send and this server does not act on: refused when they would change the answer, else named in
the X-Appliance-Ignored-Fields response header. Nothing is ignored silently.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping
from typing import Any

from pydantic import BaseModel

from appliance.errors import InvalidRequestError

IGNORED_HEADER = "X-Appliance-Ignored-Fields"

_TOOLS = "tool calling is not supported yet; leave it out, or send tool_choice 'none'"
_STRUCTURED = "structured output is not supported yet; leave it out and ask for the form in the prompt"
_TEXT_ONLY = "only text is supported; leave it out"
_SEARCH = "beam search is not supported; leave it out"

# field -> what to say. Refused unless the value is empty or listed in _HARMLESS.
_REFUSED: dict[str, str] = {
    "tools": _TOOLS,
    "tool_choice": _TOOLS,
    "functions": _TOOLS,
    "function_call": _TOOLS,
    "response_format": _STRUCTURED + " ({'type': 'text'} is allowed)",
    "structured_outputs": _STRUCTURED,
    "guided_json": _STRUCTURED,
    "guided_regex": _STRUCTURED,
    "guided_choice": _STRUCTURED,
    "guided_grammar": _STRUCTURED,
    "structural_tag": _STRUCTURED,
    "audio": _TEXT_ONLY,
    "modalities": _TEXT_ONLY + " (['text'] is allowed)",
    "prediction": "predicted outputs are not supported; leave it out",
    "web_search_options": "web search is not supported; leave it out",
    "suffix": "insertion is not supported; leave it out",
    "use_beam_search": _SEARCH,
    "length_penalty": _SEARCH,
    "prompt_logprobs": "not supported; use echo and logprobs of /v1/completions",
    "truncate_prompt_tokens": "prompts are never truncated; send a shorter one",
    "bad_words": "not supported; use logit_bias",
    "allowed_token_ids": "not supported; use logit_bias",
    "logits_processors": "not supported; use logit_bias",
    "documents": "not supported; put documents into a message or into chat_template_kwargs",
    "chat_template": "a template per request is not allowed; set it when the server is started",
    "prompt_embeds": _TEXT_ONLY,
    "kv_transfer_params": "moving the KV cache between servers is not supported; leave it out",
}
_HARMLESS: dict[str, tuple[Any, ...]] = {
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "length_penalty": (1, 1.0),
}
# Known, and rightly without effect on the answer: not worth a header.
_WITHOUT_EFFECT = {"metadata", "safety_identifier", "prompt_cache_key", "store", "service_tier", "parallel_tool_calls"}
_NOT_A_NAME = re.compile(r"[^A-Za-z0-9_.-]")


def check_extra_fields(request: BaseModel) -> dict[str, str]:
    """Response headers that name what is ignored. Raises InvalidRequestError for what would change the answer."""
    extra: Mapping[str, Any] = request.model_extra or {}
    if not extra:
        return {}
    no_tools = extra.get("tool_choice") == "none"
    ignored = []
    for name, value in extra.items():
        if value is None or name in _WITHOUT_EFFECT:
            continue
        if name not in _REFUSED:
            ignored.append(_describe(name, type(request).model_fields))
        elif value and value not in _HARMLESS.get(name, ()) and not (name == "tools" and no_tools):
            raise InvalidRequestError(f"{name}: {_REFUSED[name]}", param=name, code="unsupported_parameter")
    return {IGNORED_HEADER: ", ".join(ignored[:32])} if ignored else {}


def _describe(name: str, known: Collection[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.8)
    shown = _NOT_A_NAME.sub("?", name)[:64]  # it goes into a header
    return f"{shown} (did you mean {close[0]}?)" if close else shown
