"""Engines of several ranks, as processes: they are built, give the tokens of one rank, and are lost together, with the
reason named."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from calibrated_models import SHAPE, make_source, request_of
from runtime_helpers import greedy, run_all, tokens_of
from safetensors.torch import load_file
from torch import distributed
from transformers import LlamaConfig

from appliance import registry
from appliance.batching.core import EngineCore
from appliance.builder.build import build
from appliance.builder.shards import StoredEngine, check_shares, rows_of
from appliance.engines import read_manifest
from appliance.errors import ApplianceError, EngineBuildError, EngineCrashedError, EngineDamagedError
from appliance.layers.weights import linear
from appliance.runtime.loading import PhaseTimer
from appliance.runtime.rank_processes import start_rank
from appliance.runtime.rank_watch import RankWatch
from appliance.runtime.ranks import Leader
from appliance.runtime.step_ring import SLOT_BYTES, SLOTS, RingReader, RingWriter, SharedSteps, Word
from appliance.types import EngineOptions, EngineRequest

CONFIG = LlamaConfig(
    **SHAPE | {"vocab_size": 289, "hidden_size": 256, "intermediate_size": 512}, attention_bias=True, mlp_bias=True
)
# Precision -> what else a build is asked for.
BUILDS: dict[str, dict[str, Any]] = {
    "bf16": {},
    "fp8": {},
    "int8": {"calibration_data": "none"},
    "int4": {"calibration_data": "none", "scheme_parameters": {"group_size": 32}},
    "int4 in order": {"scheme": "int4_gptq", "scheme_parameters": {"group_size": 32, "act_order": True}},
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_source(tmp_path_factory.mktemp("source") / "m", CONFIG)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def no_group() -> Iterator[None]:
    """The default process group is left behind by the engine of a test."""
    yield
    if distributed.is_initialized():
        distributed.destroy_process_group()


# ---------------------------------------------------------------- builds


@pytest.mark.parametrize("name", BUILDS)
def test_ranks_hold_the_numbers_that_one_would(name: str, source: Path, cache: Path) -> None:
    precision = name.split()[0]
    one = load_file(build(request_of(source, cache, precision=precision, **BUILDS[name])) / "rank-0.safetensors")
    for size in (2, 4):
        engine = build(request_of(source, cache, precision=precision, tp_size=size, **BUILDS[name]))
        manifest = read_manifest(engine)
        assert len(manifest.rank_files) == size and all((engine / file).is_file() for file in manifest.rank_files)
        largest = max((engine / file).stat().st_size for file in manifest.rank_files)
        assert largest < sum(tensor.nbytes for tensor in one.values()) * (0.5 / size + 0.5)
        scheme = registry.load("quantization", manifest.scheme).Scheme(manifest.key_inputs.scheme_parameters)
        specs = registry.load("models", "llama").weight_specs(manifest.model)
        files = [engine / file for file in manifest.rank_files]
        with StoredEngine(files, specs, scheme, getattr(torch, manifest.dtype)) as stored:
            assert set(stored.names) == set(one)
            for tensor_name, expected in one.items():
                got = stored.read(tensor_name)
                assert got.dtype == expected.dtype and got.shape == expected.shape
                same = torch.equal(_comparable(got), _comparable(expected))
                # Calibration runs anew for each build, and its sums are not always in the same order.
                assert same or name == "int4 in order", tensor_name


def _comparable(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor


def test_what_ranks_cannot_share_is_refused_before_anything_is_written(source: Path, cache: Path) -> None:
    with pytest.raises(EngineBuildError, match=r"layers\.0\.attention\.qkv has 4 heads, which 3 ranks cannot share"):
        build(request_of(source, cache, precision="bf16", tp_size=3))
    parameters = {"group_size": 128}
    with pytest.raises(EngineBuildError, match=r"multiples of 128; layers\.0\.attention\.o has 64 on each of 4 ranks"):
        build(request_of(source, cache, tp_size=4, calibration_data="none", scheme_parameters=parameters))


def test_heads_are_shared_and_copied() -> None:
    spec = linear("qkv", {"q": (64, 8), "k": (16, 8), "v": (16, 8)}, "column", heads=(8, 2, 2))
    assert rows_of(spec, 1, 2) == [(32, 64), (72, 80), (88, 96)]
    assert rows_of(spec, 3, 4) == [(48, 64), (72, 80), (88, 96)]  # two ranks have a copy of each K/V head
    assert rows_of(spec, 1, 4) == [(16, 32), (64, 72), (80, 88)]
    with pytest.raises(EngineBuildError, match="2 heads"):
        check_shares(linear("k", {"k": (16, 8)}, "column", heads=(2,)), 3, 1, "bf16")
    vocabulary = linear("lm_head", {"head": (10, 8)}, "vocabulary")
    assert [rows_of(vocabulary, rank, 4) for rank in range(4)] == [[(0, 3)], [(3, 6)], [(6, 9)], [(9, 10)]]


# ---------------------------------------------------------------- engines


def requests(tokens: int) -> list[EngineRequest]:
    """Greedy, drawn by temperature alone, and what needs all logits of a row: filters and log probabilities."""
    params: list[dict[str, Any]] = [
        {},
        {"temperature": 0.8, "seed": 3},
        {"temperature": 1.1, "seed": 4, "top_p": 0.9, "logprobs": 2, "prompt_logprobs": 1},
    ]
    prompts = [[(7 * i + 13 * j) % 289 for j in range(5 + 9 * i)] for i in range(3)]
    return [greedy(f"r{i}", prompts[i], tokens, **params[i]) for i in range(3)]


def filtered_requests() -> list[EngineRequest]:
    """As many as ranks share out among each other, and, when the first have ended, as few as they gather."""
    params = [{"top_p": 0.9}, {"top_k": 7}, {"min_p": 0.02, "repetition_penalty": 1.2}]
    prompts = [[(7 * i + 13 * j) % 289 for j in range(3 + i)] for i in range(12)]
    return [
        greedy(f"r{i}", prompts[i], 4 + 2 * i, **{"temperature": 0.9, "seed": i, **params[i % 3]}) for i in range(12)
    ]


class Engine:
    """Rank 0 of an engine in this process, the others as processes."""

    def __init__(self, engine: Path, size: int, **seconds: float) -> None:
        self.reasons: list[ApplianceError] = []
        options = EngineOptions(
            str(engine),
            "cpu",
            num_pages=128,
            page_size=4,
            max_num_seqs=12,
            max_num_batched_tokens=32,
            max_model_len=128,
        )
        self.leader = Leader(options, size, self.reasons.append, **seconds)
        backend, timer = registry.load("backends", "cpu"), PhaseTimer()
        loaded = backend.load(options, lambda *_: None, timer, self.leader)
        executor, self.info = backend.assemble(loaded, options, lambda *_: None, timer)
        self.core = EngineCore(executor)

    def generate(self, tokens: int) -> dict[str, list[int]]:
        return self.answer(requests(tokens))

    def answer(self, wanted: list[EngineRequest]) -> dict[str, list[int]]:
        return {name: tokens_of(output) for name, output in run_all(self.core, wanted).items()}


def one_rank(source: Path, cache: Path, wanted: list[EngineRequest] | None = None) -> dict[str, list[int]]:
    engine = build(request_of(source, cache, precision="fp32"))
    options = EngineOptions(
        str(engine), "cpu", num_pages=128, page_size=4, max_num_seqs=12, max_num_batched_tokens=32, max_model_len=128
    )
    backend = registry.load("backends", "cpu")
    loaded = backend.load(options, lambda *_: None, PhaseTimer())
    core = EngineCore(backend.assemble(loaded, options, lambda *_: None, PhaseTimer())[0])
    outputs = run_all(core, wanted or requests(20))
    return {name: tokens_of(output) for name, output in outputs.items()}


def pipes_to_ranks(leader: Leader) -> set[str]:
    """By their names in /proc. Others are gloo's."""
    results = [] if leader._results is None else [leader._results._fd]
    fds = [*leader._wake.values(), *(rank.report for rank in leader._ranks), *results]
    return {Path(f"/proc/self/fd/{fd}").readlink().name for fd in fds}


def pipes() -> set[str]:
    """Those that this process has an end of."""
    found = set()
    for fd in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # that of this very look
            found.add(fd.readlink().name)
    return {name for name in found if name.startswith("pipe:")}


def lose(engine: Engine, act: Callable[[], None]) -> tuple[ApplianceError, float]:
    """What the core raises when `act` happens while it works, and after how many seconds."""
    at = [0.0]

    def later() -> None:
        at[0] = time.monotonic()
        act()

    threading.Timer(0.3, later).start()
    with pytest.raises(ApplianceError) as caught:
        while True:
            engine.generate(60)
    return caught.value, time.monotonic() - at[0]


def test_two_ranks_give_the_tokens_of_one_until_one_is_killed(source: Path, cache: Path, no_group: None) -> None:
    engine = Engine(build(request_of(source, cache, precision="fp32", tp_size=2)), 2)
    opened = pipes_to_ranks(engine.leader)
    assert "2 ranks" in engine.info.device_name
    assert engine.generate(20) == one_rank(source, cache)
    error, seconds = lose(engine, lambda: os.kill(engine.leader.pids[0], signal.SIGKILL))
    assert isinstance(error, EngineCrashedError) and "rank 1 was killed by SIGKILL" in error.message
    assert seconds < 5 and [str(reason) for reason in engine.reasons] == [str(error)]
    with pytest.raises(EngineCrashedError, match="rank 1 was killed"):
        engine.core.step()
    engine.leader.close()
    assert len(opened) == 2 and not opened & pipes()


def test_four_ranks_and_one_that_freezes(source: Path, cache: Path, no_group: None) -> None:
    engine = Engine(build(request_of(source, cache, precision="fp32", tp_size=4)), 4, frozen_seconds=3.0)
    assert engine.generate(20) == one_rank(source, cache)
    assert engine.answer(filtered_requests()) == one_rank(source, cache, filtered_requests())
    error, seconds = lose(engine, lambda: os.kill(engine.leader.pids[1], signal.SIGSTOP))
    assert "rank 2 has been frozen" in error.message
    assert seconds < 10
    engine.leader.close()


def test_a_rank_that_cannot_load_says_why(source: Path, cache: Path, tmp_path: Path, no_group: None) -> None:
    engine = build(request_of(source, cache, precision="fp32", tp_size=2))
    copy = tmp_path / "engine"
    copy.mkdir()
    for file in engine.iterdir():
        if file.name != "tokenizer":
            (copy / file.name).write_bytes(file.read_bytes())
    os.truncate(copy / "rank-1.safetensors", 5000)
    with pytest.raises(EngineDamagedError, match="rank 1: "):
        Engine(copy, 2)


# ---------------------------------------------------------------- shared memory, and who is behind


def reader_of(shared: SharedSteps, rank: int) -> tuple[RingReader, int]:
    """A reader over the same memory, and the pipe's end that the writer has."""
    sleeps, wakes = os.pipe()
    os.set_blocking(wakes, False)
    return RingReader(SharedSteps(shared.fd, shared.ranks), rank, sleeps, spin_seconds=0.0), wakes


def test_messages_of_any_length_arrive_in_order() -> None:
    shared = SharedSteps.create(3)
    readers = [reader_of(shared, rank) for rank in (1, 2)]
    writer = RingWriter(shared, {rank: wake for rank, (_, wake) in enumerate(readers, 1)})
    sizes = [0, 1, SLOT_BYTES, SLOT_BYTES + 1, 3 * SLOT_BYTES - 1, (2 * SLOTS + 1) * SLOT_BYTES, 7] * 5
    messages = [bytes([i % 251]) * size for i, size in enumerate(sizes)]
    got: list[list[bytes | None]] = [[], []]

    def read(index: int) -> None:
        got[index] += [readers[index][0].receive(20) for _ in messages]

    threads = [threading.Thread(target=read, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for message in messages:
        writer.send(message)
    for thread in threads:
        thread.join(30)
    assert got == [messages, messages]
    assert [shared.get(rank, Word.TAKEN) for rank in range(3)] == [len(messages)] * 3
    assert readers[0][0].receive(0.01) is None


def test_a_full_ring_waits_and_can_be_given_up() -> None:
    shared = SharedSteps.create(2)
    reader, wake = reader_of(shared, 1)
    writer = RingWriter(shared, {1: wake})
    for i in range(SLOTS):
        writer.send(bytes([i]))

    def give_up() -> None:
        raise EngineCrashedError("nobody reads")

    with pytest.raises(EngineCrashedError, match="nobody reads"):
        writer.send(b"x", give_up)
    assert [reader.receive(1) for _ in range(SLOTS)] == [bytes([i]) for i in range(SLOTS)]
    writer.send(b"y", give_up)
    assert reader.receive(1) == b"y"


@pytest.mark.parametrize(
    ("counters", "message"),
    [
        ({1: (6, 6, 40)}, "rank 1 has not begun step 7"),
        ({2: (7, 6, 38)}, "rank 2 does not join the others in a collective operation of step 7"),
        ({0: (7, 6, 40), 1: (7, 6, 40)}, "each of ranks 0, 1 cannot finish step 7"),
        ({0: (7, 6, 40), 1: (7, 6, 40), 2: (7, 6, 40)}, "each of ranks 0, 1, 2 cannot finish step 7"),
    ],
)
def test_who_holds_a_step_up_is_named(counters: dict[int, tuple[int, int, int]], message: str) -> None:
    shared = SharedSteps.create(3)
    for rank in range(3):
        values = counters.get(rank, (7, 7, 40))
        for word, value in zip((Word.TAKEN, Word.FINISHED, Word.CALLS), values, strict=True):
            shared.put(rank, word, value)
    found: list[ApplianceError] = []
    ended = threading.Event()

    def on_lost(error: ApplianceError) -> None:
        found.append(error)
        ended.set()

    idle = RankWatch([], shared, on_lost, stuck_seconds=0.5)
    idle.start()  # no step runs: nothing is stuck
    watch = RankWatch([], shared, lambda error: on_lost(error), stuck_seconds=0.5)
    watch.operation = 1
    watch.start()
    assert ended.wait(10)
    idle.stop()
    assert len(found) == 1 and found[0].message.startswith(message)


@pytest.mark.parametrize(
    ("calls", "message"),
    [
        ((1, 0, 1, 1), "rank 1 gets nowhere with loading"),  # the others wait for it to join
        ((1, 1, 0, 0), "each of ranks 2, 3 gets nowhere with loading"),  # a whole stage
        ((7, 7, 9, 8), "rank 3 gets nowhere with loading"),  # stages begin different numbers of operations
        ((0, 0, 0, 0), None),  # all read: nobody waits
        ((5, 5, 5, 5), None),  # all in the same operation, or in none
    ],
)
def test_a_rank_that_gets_nowhere_while_it_loads_is_named(calls: tuple[int, ...], message: str | None) -> None:
    shared = SharedSteps.create(4)
    for rank, count in enumerate(calls):
        shared.put(rank, Word.CALLS, count)
    shared.put(0, Word.FINISHED, 1)
    found: list[ApplianceError] = []
    reading = RankWatch([], shared, found.append, pp_size=2, loading_seconds=1.0)
    reading.start()
    for _ in range(20):  # each reads its weights, however slowly, and however long others wait
        for rank in range(4):
            shared.count(rank, Word.LOADED)
        time.sleep(0.1)
    reading.stop()
    assert reading.join(5) and not found
    hanging = RankWatch([], shared, found.append, pp_size=2, loading_seconds=1.0)
    hanging.start()
    assert hanging.join(3) == (message is not None)
    assert [error.message.partition(", for ")[0] for error in found] == ([] if message is None else [message])
    hanging.stop()
    for rank in range(1, 4):
        shared.put(rank, Word.FINISHED, 1)
    loaded = RankWatch([], shared, found.append, pp_size=2, loading_seconds=0.5)
    loaded.start()
    assert not loaded.join(1.5), "who has loaded waits for requests"
    loaded.stop()


@pytest.mark.parametrize(
    ("beat", "message"), [(0, "rank 1 has not begun to load within"), (5, "rank 1 has been frozen for")]
)
def test_a_rank_that_never_runs_is_named_before_its_first_beat_too(beat: int, message: str) -> None:
    from appliance.runtime.rank_watch import RankProcess

    shared = SharedSteps.create(2)
    shared.put(1, Word.BEAT, beat)
    found: list[ApplianceError] = []
    ended = threading.Event()
    report, said = os.pipe()
    process: Any = SimpleNamespace(returncode=None)
    rank = RankProcess(1, process, report)
    limits = {"frozen_seconds": 0.5, "start_seconds": 1.5}
    begin = time.monotonic()
    watch = RankWatch([rank], shared, lambda error: (found.append(error), ended.set())[0], **limits)
    watch.start()
    assert ended.wait(10) and found[0].message.startswith(message)
    assert (time.monotonic() - begin > 1.5) or beat
    os.close(said)
    os.close(report)


def test_of_ranks_that_end_together_the_cause_is_named() -> None:
    from appliance.ipc import Failed
    from appliance.runtime.rank_watch import PEER_LOST, RankProcess

    def ended(rank: int, code: int, failed: Failed | None) -> RankProcess:
        import msgspec

        process: Any = SimpleNamespace(returncode=code)
        return RankProcess(rank, process, -1, bytearray(msgspec.msgpack.encode(failed) if failed else b""))

    victim = ended(1, 1, Failed(error=PEER_LOST, message="RuntimeError: connection closed"))
    raised = ended(2, 3, Failed(error="HardwareError", message="out of memory", hint="use less"))
    killed = ended(3, -9, None)
    assert min([victim, raised], key=lambda rank: rank.blame).reason().message == "rank 2: out of memory"
    assert type(raised.reason()).__name__ == "HardwareError" and raised.reason().hint == "use less"
    assert "rank 3 was killed by SIGKILL" in min([victim, killed], key=lambda rank: rank.blame).reason().message


@pytest.mark.parametrize(("own", "name"), [("engine", "rank-1"), ("node", "rank-1"), ("engine-1", "engine-1-rank-1")])
def test_ranks_of_replicas_have_names_of_their_own(own: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def start(command: list[str], **_: Any) -> None:
        commands.append(command)
        raise OSError("not started here")

    monkeypatch.setattr("appliance.logs._process_name", own)
    monkeypatch.setattr("appliance.runtime.rank_processes.subprocess.Popen", start)
    with pytest.raises(OSError, match="not started here"):
        start_rank(1, SimpleNamespace(fd=0, ranks=2), "127.0.0.1", 1)  # type: ignore[arg-type]
    assert commands[0][4:6] == [name, "appliance.worker_process"]
