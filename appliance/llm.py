"""The engine in this process: `LLM(model).generate(prompts, SamplingParams(...))`, with no server and no ipc.

The same batching core, backend and engines as the server's. For notebooks, scripts, benchmarks and tests. Not
thread-safe.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, overload

from appliance import registry
from appliance.batching.core import EngineCore
from appliance.errors import InvalidRequestError, RequestFailedError
from appliance.launch.prepare import prepare_engine
from appliance.runtime.loading import PhaseTimer
from appliance.server.detokenizer import StopChecker, TextStream
from appliance.server.tokenizer import ServerTokenizer, load_tokenizer
from appliance.types import (
    EngineInfo,
    EngineOptions,
    EngineOutput,
    EngineRequest,
    FinishReason,
    SamplingParams,
    TokenLogprobs,
)

Prompt = str | Sequence[int]  # text, or token ids
Message = dict[str, Any]  # {"role": …, "content": …}


@dataclass
class Generation:
    """What one prompt gave."""

    index: int  # of the prompt
    prompt_token_ids: list[int]
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: FinishReason | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    num_cached_tokens: int = 0  # prompt tokens that the prefix cache served


@dataclass(frozen=True)
class GenerationChunk:
    """What one step gave one prompt, when streaming."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None
    logprobs: list[TokenLogprobs] | None = None


class _Running:
    """One prompt in the engine: collects tokens, turns them into text, watches for stop strings."""

    def __init__(self, generation: Generation, params: SamplingParams, stream: TextStream) -> None:
        self.generation = generation
        self.stopped = False  # by a stop string; what the engine still gives is dropped
        self._params = params
        self._stream = stream
        self._stops = StopChecker(params.stop, params.include_stop_str_in_output)

    def take(self, output: EngineOutput) -> GenerationChunk | None:
        """Add an engine output; the chunk to give, None for one that comes after the end."""
        if self.stopped:
            return None
        generation = self.generation
        if output.finish_reason == "error":
            raise RequestFailedError(f"prompt {generation.index}: {output.error}")
        generation.token_ids += output.token_ids
        generation.logprobs += output.logprobs or []
        generation.prompt_logprobs = output.prompt_logprobs or generation.prompt_logprobs
        generation.num_cached_tokens = max(generation.num_cached_tokens, output.num_cached_tokens)
        shown = [t for t in output.token_ids if t != output.stop_token_id or not self._params.skip_special_tokens]
        text = self._stops.push(self._stream.push(shown))
        finish: FinishReason | None = output.finish_reason
        if not self._stops.matched and finish is not None:
            text += self._stops.push(self._stream.flush()) + self._stops.flush()
        if self._stops.matched:
            self.stopped, finish = True, "stop"
        generation.text += text
        generation.finish_reason = finish
        return GenerationChunk(generation.index, text, output.token_ids, finish, output.logprobs)


class LLM:
    """An engine directory, a checkpoint directory, a hub id or "builtin", loaded on the best device there is.

    A checkpoint is built into an engine first, in the cache that the server uses too. `precision`, `backend` and
    `profile` override the selection; `options` are names of settings or fields of `types.EngineOptions`. Raises what
    selection, checkpoint, builder and backend raise.
    """

    def __init__(
        self,
        model: str | Path = "builtin",
        *,
        precision: str | None = None,
        backend: str | None = None,
        profile: str | None = None,
        cache: str | Path | None = None,
        **options: Any,
    ) -> None:
        engine_options: EngineOptions = prepare_engine(
            str(model), precision=precision, backend=backend, profile=profile, cache=cache, overrides=options
        )
        plugin = registry.load("backends", engine_options.backend)
        timer = PhaseTimer()
        loaded = plugin.load(engine_options, _no_progress, timer)
        executor, info = plugin.assemble(loaded, engine_options, _no_progress, timer)
        self.info: EngineInfo = info
        self.tokenizer: ServerTokenizer = load_tokenizer(Path(engine_options.engine_dir))
        self.core: EngineCore = EngineCore(
            executor, prefix_caching=engine_options.prefix_caching, seed=engine_options.seed
        )
        self._ids = itertools.count()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release the device's memory. The object cannot be used afterwards."""
        import gc

        import torch

        del self.core
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    @overload
    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        stream: Literal[False] = False,
    ) -> list[Generation]: ...

    @overload
    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        stream: Literal[True],
    ) -> Iterator[GenerationChunk]: ...

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        stream: bool = False,
    ) -> list[Generation] | Iterator[GenerationChunk]:
        """Complete prompts (text or token ids), one sampling parameter set for all or one each.

        Returns generations in the order of the prompts; with `stream`, chunks as steps give them. A stream that is not
        read to its end is cancelled. InvalidRequestError for a prompt that can never fit.
        """
        listed: Any = [prompts] if isinstance(prompts, str) or _is_token_ids(prompts) else prompts
        token_ids = [self.tokenizer.encode(p) if isinstance(p, str) else list(p) for p in listed]
        each = list(params) if isinstance(params, Sequence) else [params or SamplingParams()] * len(token_ids)
        if len(each) != len(token_ids):
            raise InvalidRequestError(
                f"{len(token_ids)} prompts but {len(each)} sampling parameter sets; give one, or one each"
            )
        running = self._start(token_ids, each)
        if stream:
            return self._chunks(running)
        for _ in self._chunks(running):
            pass
        return [item.generation for item in running.values()]

    def chat(
        self,
        conversations: Sequence[Message] | Sequence[Sequence[Message]],
        params: SamplingParams | None = None,
        **template_options: Any,
    ) -> list[Generation]:
        """Answer one conversation (a list of messages) or several, through the model's chat template."""
        single = bool(conversations) and isinstance(conversations[0], dict)
        listed: Any = [conversations] if single else conversations
        template = self.tokenizer.chat_template
        if template is None:
            raise InvalidRequestError(
                "this model has no chat template", hint="use generate() with a prompt of your own"
            )
        texts = [template.render(list(messages), **template_options) for messages in listed]
        prompts = [self.tokenizer.encode(text, add_special_tokens=False) for text in texts]
        return self.generate(prompts, params)

    def _start(self, prompts: list[list[int]], params: list[SamplingParams]) -> dict[str, _Running]:
        """Hand all prompts to the core, or none: the first that is refused takes the others back."""
        running: dict[str, _Running] = {}
        try:
            for index, (prompt, choice) in enumerate(zip(prompts, params, strict=True)):
                request_id = f"llm-{next(self._ids)}"
                eos = tuple(self.tokenizer.eos_token_ids)
                self.core.add_request(EngineRequest(request_id, prompt, choice, eos_token_ids=eos))
                stream = self.tokenizer.text_stream(prompt, skip_special_tokens=choice.skip_special_tokens)
                running[request_id] = _Running(Generation(index, prompt), choice, stream)
        except Exception:
            self._cancel(running)
            raise
        return running

    def _chunks(self, running: dict[str, _Running]) -> Iterator[GenerationChunk]:
        remaining = set(running)
        try:
            while remaining:
                for output in self.core.step():
                    item = running.get(output.request_id)
                    if item is None:
                        continue
                    chunk = item.take(output)
                    if output.finish_reason is not None:
                        remaining.discard(output.request_id)
                    elif item.stopped:
                        self.core.abort([output.request_id])
                    if chunk is not None:
                        yield chunk
        finally:
            self._cancel(remaining)

    def _cancel(self, request_ids: Any) -> None:
        """Take requests back and let the core finish with them, so that it is idle afterwards."""
        unfinished = list(request_ids)
        if unfinished:
            self.core.abort(unfinished)
            while self.core.has_work:
                self.core.step()


def _no_progress(phase: str, detail: str, percent: float) -> None:
    pass


def _is_token_ids(prompts: Any) -> bool:
    return bool(prompts) and isinstance(prompts[0], int)
