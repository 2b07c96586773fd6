"""The engine in this process: `LLM(model).generate(prompts, SamplingParams(...))`, with no server and no ipc.

The same batching core, backend, engines, tokenizer and text as the server's. For notebooks, scripts, benchmarks and
tests. Not thread-safe; several streams may be read in turns. Importing this module does not import torch.
"""

from __future__ import annotations

import itertools
import math
import signal
import threading
import weakref
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Literal, Self, overload

from appliance import registry
from appliance.batching.core import EngineCore
from appliance.errors import EngineCrashedError, InvalidRequestError, UnavailableError
from appliance.launch.prepare import prepare_engine
from appliance.llm_stream import Generation, GenerationChunk, GenerationStream, Running
from appliance.server.tokenizer import ServerTokenizer, load_tokenizer
from appliance.settings import yield_idle_threads
from appliance.strict import nearest
from appliance.types import (
    EngineInfo,
    EngineOptions,
    EngineOutput,
    EngineRequest,
    SamplingParams,
)

__all__ = ["LLM", "Generation", "GenerationChunk", "GenerationStream", "Message", "Prompt"]

Prompt = str | Sequence[int]  # text, or token ids
Message = dict[str, Any]  # {"role": …, "content": …}

# What the HTTP API allows, too. The lower end of `_POSITIVE` is excluded.
_RANGES: dict[str, tuple[float, float]] = {
    "temperature": (0, 100),
    "top_k": (-1, math.inf),  # -1 and 0 are off
    "top_p": (0, 1),
    "min_p": (0, 1),
    "repetition_penalty": (0, 100),
    "presence_penalty": (-2, 2),
    "frequency_penalty": (-2, 2),
    "seed": (-(2**63), 2**63 - 1),
    "logprobs": (0, math.inf),
    "prompt_logprobs": (0, math.inf),
}
_POSITIVE = ("repetition_penalty",)
_TEMPLATE_OPTIONS = ("tools", "add_generation_prompt", "continue_final_message")


class LLM:
    """An engine directory, a checkpoint directory, a hub id or "builtin", loaded on the best device there is.

    A checkpoint is built into an engine first, in the cache that the server uses too. `precision`, `backend` and
    `profile` override the selection; `options` are names of settings or fields of `types.EngineOptions`. Raises what
    selection, checkpoint, builder and backend raise.

    Opened before the program imports torch, it lets idle OpenMP threads sleep (OMP_WAIT_POLICY=PASSIVE, unless the
    environment says otherwise): on shared CPU cores spinning ones cost far more than they gain. A program that imports
    torch first sets that variable itself.
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
        self._core: EngineCore | None = None
        self._problem = "this LLM was never opened"  # why there is no core
        yield_idle_threads()
        engine_options: EngineOptions = prepare_engine(
            str(model), precision=precision, backend=backend, profile=profile, cache=cache, overrides=options
        )
        from appliance.runtime.loading import PhaseTimer  # torch, from here on

        plugin = registry.load("backends", engine_options.backend)
        timer = PhaseTimer()
        loaded = plugin.load(engine_options, _no_progress, timer)
        self._member = loaded.member
        executor, info = plugin.assemble(loaded, engine_options, _no_progress, timer)
        while executor.prepare_more():  # a server does the rest of the start between requests
            pass
        self.info: EngineInfo = info
        self.tokenizer: ServerTokenizer = load_tokenizer(Path(engine_options.engine_dir))
        self._core = EngineCore(executor, prefix_caching=engine_options.prefix_caching, seed=engine_options.seed)
        self._ids = itertools.count()
        self._streams: weakref.WeakValueDictionary[str, GenerationStream] = weakref.WeakValueDictionary()
        self._busy = False  # the core is at work: a stream that is dropped just now must not reach into it
        self._to_abort: list[str] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release the device's memory. The object and its streams cannot be used afterwards."""
        self._lose("this LLM is closed")

    @property
    def core(self) -> EngineCore:
        """UnavailableError if there is none any more."""
        if self._core is None:
            raise UnavailableError(self._problem, hint="open a new LLM")
        return self._core

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
    ) -> GenerationStream: ...

    @overload
    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        stream: bool,
    ) -> list[Generation] | GenerationStream: ...

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        stream: bool = False,
    ) -> list[Generation] | GenerationStream:
        """Complete prompts (text or token ids), one sampling parameter set for all or one each.

        Returns generations in the order of the prompts; with `stream`, chunks as steps give them. Without
        `max_tokens` a prompt runs to the context limit at most. InvalidRequestError, or ContextLengthError, if one of
        the prompts or parameters cannot be served: then none is run.
        """
        listed: Any = [prompts] if isinstance(prompts, str) or _is_token_ids(prompts) else prompts
        return self._run([self._encode(index, prompt) for index, prompt in enumerate(listed)], params, stream=stream)

    @overload
    def chat(
        self,
        conversations: Sequence[Message] | Sequence[Sequence[Message]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        stream: Literal[False] = False,
        **template_options: Any,
    ) -> list[Generation]: ...

    @overload
    def chat(
        self,
        conversations: Sequence[Message] | Sequence[Sequence[Message]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        stream: Literal[True],
        **template_options: Any,
    ) -> GenerationStream: ...

    @overload
    def chat(
        self,
        conversations: Sequence[Message] | Sequence[Sequence[Message]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        stream: bool,
        **template_options: Any,
    ) -> list[Generation] | GenerationStream: ...

    def chat(
        self,
        conversations: Sequence[Message] | Sequence[Sequence[Message]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        stream: bool = False,
        **template_options: Any,
    ) -> list[Generation] | GenerationStream:
        """Answer one conversation (a list of messages) or several, through the model's chat template; else as
        `generate`.

        `template_options`: `tools`, `add_generation_prompt`, `continue_final_message`, or a variable that the
        template reads (`enable_thinking`, say). InvalidRequestError for a name that it does not read, and for messages
        that it refuses.
        """
        single = bool(conversations) and isinstance(conversations[0], dict)
        listed: Any = [conversations] if single else conversations
        texts = [self._render(messages, template_options) for messages in listed]
        prompts = [self.tokenizer.encode(text, add_special_tokens=False) for text in texts]
        return self._run(prompts, params, stream=stream)

    # ------------------------------------------------------------ from what was given to token ids

    def _encode(self, index: int, prompt: Any) -> list[int]:
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt)
        vocab_size = self.tokenizer.vocab_size
        try:
            token_ids = [int(token_id) for token_id in prompt]
        except (TypeError, ValueError):
            raise InvalidRequestError(
                f"prompt {index} is {str(prompt)[:60]!r}; allowed are text and a list of token ids"
            ) from None
        wrong = [token_id for token_id in token_ids if not 0 <= token_id < vocab_size]
        if wrong:
            raise InvalidRequestError(f"prompt {index} has token id {wrong[0]}, allowed are 0 to {vocab_size - 1}")
        return token_ids

    def _render(self, messages: Any, options: Mapping[str, Any]) -> str:
        """The prompt of a conversation."""
        template = self.tokenizer.chat_template
        if template is None:
            raise InvalidRequestError(
                "this model has no chat template", hint="use generate() with a prompt of your own"
            )
        well_formed = isinstance(messages, Sequence) and all(isinstance(m, dict) and "role" in m for m in messages)
        if not messages or not well_formed:
            raise InvalidRequestError(
                f"a conversation is {str(messages)[:60]!r}; it must be a list of messages, "
                '{"role": "user", "content": "…"}'
            )
        own = {name: options[name] for name in _TEMPLATE_OPTIONS if name in options}
        variables = {name: value for name, value in options.items() if name not in own}
        for name in variables:
            if name not in template.names:
                near = nearest(name, [*template.names, *_TEMPLATE_OPTIONS])
                guess = f"; did you mean {near!r}?" if near else ""
                raise InvalidRequestError(f"the model's chat template reads no variable {name!r}{guess}")
        return template.render(list(messages), variables=variables, **own)

    # ------------------------------------------------------------ running

    def _run(
        self, prompts: list[list[int]], params: SamplingParams | Sequence[SamplingParams] | None, *, stream: bool
    ) -> list[Generation] | GenerationStream:
        each = list(params) if isinstance(params, Sequence) else [params or SamplingParams()] * len(prompts)
        if len(each) != len(prompts):
            raise InvalidRequestError(
                f"{len(prompts)} prompts but {len(each)} sampling parameter sets; give one, or one each"
            )
        for choice in each:
            _check_params(choice, self.tokenizer.vocab_size)
        core, eos = self.core, self.tokenizer.eos_token_ids
        requests = [
            EngineRequest(f"llm-{next(self._ids)}", prompt, choice, eos_token_ids=eos)
            for prompt, choice in zip(prompts, each, strict=True)
        ]
        for request in requests:
            core.validate(request)
        running = {r.request_id: Running(index, r, self.tokenizer) for index, r in enumerate(requests)}
        chunks = GenerationStream(running, self._step, self._cancel)
        self._streams.update(dict.fromkeys(running, chunks))
        with self._at_work():
            for request in requests:
                core.add_request(request)
        if stream:
            return chunks
        for _ in chunks:
            pass
        return [item.generation for item in running.values()]

    def _step(self) -> None:
        """One step of the core; its outputs go to the streams that they belong to."""
        for output in self._core_step():
            stream = self._streams.get(output.request_id)
            if stream is not None:
                stream.take(output)
        self._finish_if_idle()

    def _core_step(self) -> list[EngineOutput]:
        """EngineCrashedError if the step fails; the engine is lost then."""
        core = self.core
        try:
            with self._at_work():
                return core.step()
        except Exception as error:
            self._lose(f"the engine failed: {type(error).__name__}: {error}")
            raise EngineCrashedError(self._problem, hint="open a new LLM") from error

    def _cancel(self, request_ids: Collection[str]) -> None:
        """Take requests back."""
        self._to_abort += request_ids
        if self._core is None or self._busy:
            return
        ids, self._to_abort = self._to_abort, []
        self._core.abort(ids)
        self._finish_if_idle()

    def _finish_if_idle(self) -> None:
        """Where nobody waits for anything, let the core take in what is in flight, so that it holds nothing."""
        if not any(stream.unfinished for stream in self._streams.values()):
            while self._core is not None and self._core.has_work:
                self._core_step()

    @contextmanager
    def _at_work(self) -> Iterator[None]:
        """Around every change of the core: Ctrl-C and streams that are dropped just now wait until it is over."""
        self._busy = True
        try:
            with _uninterrupted():
                yield
        finally:
            self._busy = False
            if self._to_abort:
                self._cancel(())

    def _lose(self, problem: str) -> None:
        """Give up the core and the memory of its device."""
        import gc

        import torch

        from appliance.meeting import leave

        if self._core is None:
            return
        self._core, self._problem = None, problem
        self._member.close()
        gc.collect()
        leave()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ctrl-C raises behind the block and not in it: cut short, a step would leave the core in pieces."""
    handler = signal.getsignal(signal.SIGINT)
    if not callable(handler) or threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[tuple[int, FrameType | None]] = []
    signal.signal(signal.SIGINT, lambda number, frame: came.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if came:
            handler(*came[0])


def _check_params(params: Any, vocab_size: int) -> None:
    """InvalidRequestError, naming the field and what is allowed, for values that have no meaning."""
    if not isinstance(params, SamplingParams):
        raise InvalidRequestError(f"sampling parameters are {str(params)[:60]!r}; they must be SamplingParams(…)")
    for name, (low, high) in _RANGES.items():
        value = getattr(params, name)
        if value is None:
            continue
        positive = name in _POSITIVE
        if not low <= value <= high or (positive and value == low):
            above = f"more than {low}" if positive else f"at least {low}"
            most = "" if math.isinf(high) else f" and at most {high}"
            raise InvalidRequestError(f"{name} is {value}; it must be {above}{most}", param=name)
    stops: Any = params.stop
    if isinstance(stops, str) or not all(isinstance(stop, str) and stop for stop in stops):
        raise InvalidRequestError(f"stop is {stops!r}; it must be a tuple of texts, none empty", param="stop")
    for name in ("logit_bias", "stop_token_ids"):
        wrong = [token_id for token_id in getattr(params, name) if not 0 <= token_id < vocab_size]
        if wrong:
            raise InvalidRequestError(f"{name} has token id {wrong[0]}, allowed are 0 to {vocab_size - 1}", param=name)


def _no_progress(phase: str, detail: str, percent: float) -> None:
    pass


def _is_token_ids(prompts: Any) -> bool:
    return bool(prompts) and isinstance(prompts[0], int)
