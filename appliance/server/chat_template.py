"""Chat templates: Jinja sources that turn messages into a prompt, rendered in a sandbox.

Knows where Hugging Face checkpoints keep templates and which names templates expect (its documentation on chat
templates); knows nothing of tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from appliance.errors import CheckpointError, InvalidRequestError

_END_MARK = "<|the last message is continued here|>"


class _GenerationBlock(Extension):
    """`{% generation %}…{% endgeneration %}` marks assistant text for training; here it is only its content."""

    tags = {"generation"}  # noqa: RUF012 - the base class declares it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def find_template_sources(files: Path, config: Mapping[str, Any], override: Path | None) -> dict[str, str]:
    """Template sources by name ("default", "tool_use"), empty if the model has none. In order: `override`,
    chat_template.jinja (with additional_chat_templates/), chat_template.json, tokenizer_config.json."""
    if override is not None:
        if not override.is_file():
            raise CheckpointError(f"the chat template {override} does not exist")
        return {"default": override.read_text(encoding="utf-8")}
    if (files / "chat_template.jinja").is_file():
        sources = {"default": (files / "chat_template.jinja").read_text(encoding="utf-8")}
        for path in sorted((files / "additional_chat_templates").glob("*.jinja")):
            sources[path.stem] = path.read_text(encoding="utf-8")
        return sources
    value = config.get("chat_template")
    if (files / "chat_template.json").is_file():
        try:
            value = json.loads((files / "chat_template.json").read_text(encoding="utf-8"))["chat_template"]
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{files / 'chat_template.json'} holds no chat_template: {error}") from error
    if isinstance(value, str):
        return {"default": value}
    if isinstance(value, list):
        return {str(item["name"]): str(item["template"]) for item in value}
    if isinstance(value, dict):
        return {str(name): str(source) for name, source in value.items()}
    return {}


class ChatTemplate:
    """Compiled templates of a model. Raises CheckpointError if one is not valid Jinja."""

    def __init__(self, sources: Mapping[str, str], special_tokens: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        try:
            self._templates = {name: environment.from_string(source) for name, source in sources.items()}
        except TemplateError as error:
            raise CheckpointError(f"the chat template is not valid Jinja: {error}") from error
        # Every name that a template reads, its own loop variables included: a name that is not here has no effect.
        self.names = frozenset(
            name.name
            for source in sources.values()
            for name in environment.parse(source).find_all(nodes.Name)
            if name.ctx == "load"
        )
        self._special_tokens = dict(special_tokens)
        self._knows_developer = {name: "developer" in source for name, source in sources.items()}

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt text. `variables` are further names for the template (`chat_template_kwargs`).

        With `continue_final_message` the prompt ends inside the last message, for the model to go on with it. Raises
        InvalidRequestError with the template's own words if it refuses the messages.
        """
        name = "tool_use" if tools and "tool_use" in self._templates else "default"
        if name not in self._templates:
            name = next(iter(self._templates))
        if not self._knows_developer[name]:
            messages = [{**m, "role": "system"} if m["role"] == "developer" else m for m in messages]
        if continue_final_message:
            # Marked rather than searched for: the same words may be elsewhere, and templates trim.
            messages = [*messages[:-1], {**messages[-1], "content": f"{messages[-1]['content']}{_END_MARK}"}]
        values = {**self._special_tokens, "tools": tools, "documents": None, **(variables or {})}
        try:
            text = self._templates[name].render(
                {**values, "messages": messages, "add_generation_prompt": add_generation_prompt}
            )
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
            raise InvalidRequestError(
                f"the model's chat template does not take these messages: {error}", param="messages"
            ) from error
        if not continue_final_message:
            return text
        if (end := text.rfind(_END_MARK)) < 0:
            raise InvalidRequestError(
                "the chat template does not give back the last message as it is, so it cannot be continued",
                param="continue_final_message",
            )
        return text[:end]


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    # Jinja's own filter escapes <, > and & for HTML, which a prompt must not have.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)
