"""A scripted engine and small tokenizers for the server's tests: the seams, so that nothing is patched."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import msgspec
import uvicorn
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from appliance.server.app import create_app
from appliance.server.state import ServerState
from appliance.server.tokenizer import ServerTokenizer
from appliance.types import EngineInfo, EngineOutput, EngineRequest, EngineStats, TokenLogprobs

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = {"bos_token": "<s>", "eos_token": "<|end|>"}
HELLO = [{"role": "user", "content": "hello"}]
CORPUS = ["hello world, this is a small text about numbers 12 34 and words", "Größe, naïve, 你好世界, 😀 emoji"] * 4


def byte_level_tokenizer(vocab_size: int = 400) -> Tokenizer:
    """A byte-level BPE as Llama 3 and Qwen have; any text survives a round trip."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def byte_fallback_tokenizer() -> Tokenizer:
    """A SentencePiece-like BPE as Llama 2 has: "▁" for spaces, unknown characters as <0xHH> tokens."""
    vocab: dict[str, int] = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for byte in range(256):
        vocab[f"<0x{byte:02X}>"] = len(vocab)
    for piece in ["▁", *"helowrdtisanb", "he", "lo", "▁w", "or", "▁wor", "ld"]:
        vocab.setdefault(piece, len(vocab))
    merges = [("h", "e"), ("l", "o"), ("▁", "w"), ("o", "r"), ("▁w", "or"), ("l", "d")]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    return tokenizer


def server_tokenizer() -> ServerTokenizer:
    return ServerTokenizer(byte_level_tokenizer(), SPECIAL, {"default": TEMPLATE})


def engine_info(max_model_len: int = 512, max_num_seqs: int = 8) -> EngineInfo:
    return EngineInfo(
        engine_key="0123456789abcdef" * 4,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=1024,
        num_pages=100,
        page_size=16,
        kv_cache_dtype="bf16",
        attention="reference",
        device_name="fake",
        weight_bytes=1,
        kv_cache_bytes=1,
        startup_seconds={},
    )


@dataclass
class Running:
    request: EngineRequest
    left: list[int]  # tokens to come
    done: int = 0  # tokens given, resumed ones included
    first: bool = True


Script = Callable[[EngineRequest], Sequence[int]]


@dataclass
class FakeEngine:
    """An EngineLink that answers each request with the tokens its script gives for the *original* prompt, `per_step`
    tokens a step, honouring max_tokens, eos, stop ids and resumption. `step()` by hand, or `auto`matically."""

    state: ServerState
    script: Script
    auto: bool = True
    per_step: int = 1
    dead: bool = False
    added: list[list[EngineRequest]] = field(default_factory=list)
    aborted: list[list[str]] = field(default_factory=list)
    running: dict[str, Running] = field(default_factory=dict)
    error: str | None = None  # end every request with this
    _task: asyncio.Task[None] | None = None

    async def add(self, requests: Sequence[EngineRequest]) -> None:
        if self.dead:
            raise ConnectionError("the engine is gone")
        msgspec.msgpack.encode(requests)  # as the real link does: what cannot be encoded fails here
        self.added.append(list(requests))
        for request in requests:
            resumed = request.num_resumed_tokens
            tokens = list(self.script(request))[: request.params.max_tokens]
            self.running[request.request_id] = Running(request, tokens[resumed:], resumed)
        if self.auto and (self._task is None or self._task.done()):
            self._task = asyncio.get_running_loop().create_task(self._run())

    async def abort(self, request_ids: Sequence[str]) -> None:
        self.aborted.append(list(request_ids))
        for request_id in request_ids:
            self.running.pop(request_id, None)

    async def _run(self) -> None:
        while self.running and not self.dead:
            self.step()
            await asyncio.sleep(0)

    def step(self) -> None:
        outputs = [self._advance(entry) for entry in list(self.running.values())]
        usage = len(self.running) / 100
        self.state.journal.on_outputs(outputs, EngineStats(num_running=len(self.running), kv_cache_usage=usage))

    def _advance(self, entry: Running) -> EngineOutput:
        request, params = entry.request, entry.request.params
        if self.error is not None:
            del self.running[request.request_id]
            return EngineOutput(request.request_id, finish_reason="error", error=self.error)
        tokens, reason, stop_id = [], None, None
        while entry.left and len(tokens) < self.per_step and reason is None:
            token = entry.left.pop(0)
            tokens.append(token)
            entry.done += 1
            ends = token in params.stop_token_ids or (token in request.eos_token_ids and not params.ignore_eos)
            if ends and entry.done > params.min_tokens:
                reason, stop_id = "stop", token
        if reason is None and (entry.done >= (params.max_tokens or 0) or not entry.left):
            reason = "length"
        if reason is not None:
            del self.running[request.request_id]
        scored = None
        if params.prompt_logprobs is not None and entry.first:
            scored = [None, *(fake_logprobs(t, params.prompt_logprobs) for t in request.prompt_token_ids[1:])]
        entry.first = False
        return EngineOutput(
            request.request_id,
            tokens,
            [fake_logprobs(t, params.logprobs) for t in tokens] if params.logprobs is not None else None,
            scored,
            reason,
            stop_id,
            num_cached_tokens=4,
        )


def fake_logprobs(token_id: int, top: int) -> TokenLogprobs:
    return TokenLogprobs(
        token_id, -token_id / 1000, 1, tuple((token_id + i, -(token_id + i) / 1000) for i in range(top))
    )


def saying(tokenizer: ServerTokenizer, text: str, end: bool = True) -> Script:
    """A script that always answers with this text, then the end token."""
    tokens = tokenizer.encode(text, add_special_tokens=False) + ([tokenizer.eos_token_ids[0]] if end else [])
    return lambda request: tokens


async def ready_state(text: str = "hello world", **settings: Any) -> tuple[ServerState, FakeEngine]:
    """A server that is ready, with an engine that says `text`."""
    info = engine_info(settings.pop("max_model_len", 512), settings.pop("max_num_seqs", 8))
    state = ServerState(model_names=settings.pop("model_names", ("tiny", "alias")), version="1.2.3", **settings)
    state.tokenizer = server_tokenizer()
    state.engine = info
    engine = FakeEngine(state, saying(state.tokenizer, text))
    await state.journal.on_engine_ready(engine)
    state.lifecycle.enter("ready")
    return state, engine


def client(state: ServerState) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app=create_app(state), raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://server")


@asynccontextmanager
async def served(state: ServerState) -> AsyncIterator[str]:
    """The app under uvicorn on a free loopback port; gives the base URL."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(create_app(state), log_level="warning", lifespan="off"))
    task = asyncio.create_task(server.serve(sockets=[listener]))
    while not server.started:
        await asyncio.sleep(0.005)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        await task
        listener.close()


async def eventually(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    """Wait until the condition holds; the test fails if it does not within the time."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": HELLO, **fields}


def text(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "prompt": "hello", **fields}


def events(body: str) -> list[dict[str, Any]]:
    """The JSON of each event; checks the framing."""
    assert body.endswith("data: [DONE]\n\n")
    lines = body.split("\n\n")[:-2]
    assert all(line.startswith("data: {") for line in lines)
    return [json.loads(line[6:]) for line in lines]
