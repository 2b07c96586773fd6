"""Engine store: keys, digests, verification, locks, crashes, and moving engines between places."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import msgspec
import pytest

from appliance.engines import (
    DamagedFileError,
    EngineManifest,
    EngineNotFoundError,
    EngineStore,
    EngineTransferError,
    KeyInputs,
    Snapshot,
    engine_key,
    fetch,
    make_key_inputs,
    publish,
    read_manifest,
    transfer,
)
from appliance.engines import digest as digests
from appliance.engines.disk import ensure_writable, write_atomically
from appliance.engines.manifest import SCHEMA_VERSION, BuildSummary, EngineFile, write_manifest
from appliance.engines.meter import ByteMeter
from appliance.engines.patience import Abandoned, OutOfPatience, Patience
from appliance.errors import CacheNotWritableError, EngineBuildError, EngineDamagedError, NoSpaceError
from appliance.types import ModelConfig

INPUTS = KeyInputs(
    checkpoint_digest="c" * 64,
    precision="bf16",
    scheme="none",
    scheme_parameters={"name": "none", "weight_bits": 16},
    dtype="bfloat16",
    tp_size=1,
    pp_size=1,
    backend="cpu",
    backend_version="1",
    builder_version="1",
    compute_capability=None,
)
KEY = engine_key(INPUTS)
CONFIG = ModelConfig("LlamaForCausalLM", 8, 8, 8, 1, 1, 1, 8, 64)
FILES = {"rank-0.safetensors": os.urandom(300_000), "tokenizer/tokenizer.json": b"{}", "config.json": b'{"a": 1}'}


def fill(directory: Path, inputs: KeyInputs = INPUTS, files: dict[str, bytes] = FILES) -> EngineManifest:
    """A whole engine in a directory."""
    listed = []
    for name, data in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(data)
        listed.append(EngineFile(name=name, size=len(data), digest=digests.hash_file(directory / name)))
    return write_manifest(
        directory,
        EngineManifest(
            schema_version=SCHEMA_VERSION,
            key=engine_key(inputs),
            key_inputs=inputs,
            model=CONFIG,
            precision=inputs.precision,
            scheme=inputs.scheme,
            dtype=inputs.dtype,
            tp_size=1,
            pp_size=1,
            backend=inputs.backend,
            backend_version="1",
            builder_version="1",
            compute_capability=None,
            created="2026-01-01T00:00:00+00:00",
            files=tuple(listed),
            kernels={},
            tactics=(),
            self_check=(),
            build=BuildSummary(
                seconds=1.0, source="x", source_bytes=1, engine_bytes=1, peak_memory=1, device="cpu", notes=()
            ),
        ),
    )


def put(store: EngineStore, inputs: KeyInputs = INPUTS, files: dict[str, bytes] = FILES) -> Path:
    """Build and publish."""
    key = engine_key(inputs)
    with store.build_lock(key), store.staging(key) as directory:
        fill(directory, inputs, files)
        return store.publish(key, directory)


@pytest.fixture
def store(tmp_path: Path) -> EngineStore:
    return EngineStore(tmp_path / "cache")


# ---------------------------------------------------------------- key and digest


def test_key_depends_on_every_input_and_on_nothing_else() -> None:
    changed = {
        "checkpoint_digest": "d" * 64,
        "precision": "fp16",
        "scheme": "other",
        "scheme_parameters": {"name": "none", "weight_bits": 8},
        "dtype": "float16",
        "tp_size": 2,
        "pp_size": 2,
        "backend": "cuda",
        "backend_version": "2",
        "builder_version": "2",
        "compute_capability": (9, 0),
        "calibration": {"data": "d" * 64},
    }
    assert set(changed) == set(KeyInputs.__struct_fields__)
    keys = {engine_key(msgspec.structs.replace(INPUTS, **{name: value})) for name, value in changed.items()}
    assert len(keys | {KEY}) == len(changed) + 1
    shuffled = msgspec.structs.replace(INPUTS, scheme_parameters={"weight_bits": 16, "name": "none"})
    assert engine_key(shuffled) == KEY, "the order of a dictionary must not matter"
    assert len(KEY) == 64 and int(KEY, 16)


def test_key_inputs_come_from_the_plugins() -> None:
    gpu = make_key_inputs("d", "fp8", "cuda", compute_capability=(9, 0))
    assert (gpu.scheme, gpu.dtype, gpu.compute_capability) == ("fp8", "bfloat16", (9, 0))
    cpu = make_key_inputs("d", "fp16", "cpu", compute_capability=(9, 0))
    assert (cpu.scheme, cpu.dtype, cpu.compute_capability) == ("none", "float16", None)
    with pytest.raises(EngineBuildError, match=r"int2.*allowed: fp8, int4, int8, fp32"):
        make_key_inputs("d", "int2", "cpu")  # type: ignore[arg-type]
    with pytest.raises(EngineBuildError, match=r"no backend 'tpu'; allowed: cpu"):
        make_key_inputs("d", "bf16", "tpu")


@pytest.mark.parametrize("size", [0, 1, 1000, 4096, 4097, 3 * 4096 + 5])
def test_digests_agree_with_the_definition(tmp_path: Path, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "CHUNK", 4096)
    data = os.urandom(size)
    path = tmp_path / "file"
    path.write_bytes(data)
    chunks = [hashlib.sha256(data[i : i + 4096]).digest() for i in range(0, size, 4096)]
    expected = "tree64m:" + hashlib.sha256(size.to_bytes(8, "little") + b"".join(chunks)).hexdigest()
    assert digests.hash_files([path, path], threads=3) == [expected, expected]
    hasher = digests.TreeHasher()
    for start in range(0, size, 777):
        hasher.update(data[start : start + 777])
    assert (hasher.digest(), hasher.size) == (expected, size)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_meter_beats_while_nothing_moves() -> None:
    seen: list[Snapshot] = []
    begun = time.monotonic()
    with ByteMeter(100, seen.append, interval=0.02) as meter:
        meter.skip(50, "resumed")
        wait_for(lambda: len(seen) >= 3)
        assert seen[-1].eta_seconds is None, "skipped bytes tell nothing of the speed"
        meter.advance(25, "x")
        time.sleep(0.1)
        wait_for(lambda: len(seen) >= 6)
    elapsed = time.monotonic() - begun
    assert (seen[-1].bytes_done, seen[-1].percent, seen[-1].detail) == (75, 75.0, "x")
    assert seen[-1].eta_seconds is not None and 0.1 < seen[-1].eta_seconds < elapsed, "as long again as half of it took"


# ---------------------------------------------------------------- verification


def test_found_verified_and_listed(store: EngineStore) -> None:
    assert store.find(KEY) is None and store.list_engines() == []
    path = put(store)
    assert store.find(KEY) == path
    time.sleep(0.05)  # until the files' times are no longer "just now"
    assert store.verify(KEY).bytes_read == sum(map(len, FILES.values())), "the first load reads everything"
    assert store.verify(KEY).bytes_read == 0, "later ones trust the stamps"
    assert store.verify(KEY, "full").bytes_read == sum(map(len, FILES.values()))
    (entry,) = store.list_engines()
    assert (entry.key, entry.path) == (KEY, path) and entry.manifest == read_manifest(path)
    assert store.remove(KEY) and store.find(KEY) is None and not store.remove(KEY)


@pytest.mark.parametrize("level", ["size", "auto", "full"])
@pytest.mark.parametrize("name", [*FILES, "engine.json"])
def test_truncation_by_one_byte_is_always_found(store: EngineStore, name: str, level: str) -> None:
    path = put(store)
    time.sleep(0.05)
    store.verify(KEY)  # stamps exist
    os.truncate(path / name, (path / name).stat().st_size - 1)
    with pytest.raises(DamagedFileError, match=name) as caught:
        store.verify(KEY, level)  # type: ignore[arg-type]
    assert caught.value.name == name


@pytest.mark.parametrize("keep_mtime", [False, True])
def test_a_flipped_bit_is_found_though_the_stamps_are_there(store: EngineStore, keep_mtime: bool) -> None:
    path = put(store) / "rank-0.safetensors"
    time.sleep(0.05)
    store.verify(KEY)
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(1234)
        byte = file.read(1)[0]
        file.seek(1234)
        file.write(bytes([byte ^ 4]))
    if keep_mtime:  # as a restored backup would have it; the inode's change time cannot be set
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(DamagedFileError, match=r"rank-0\.safetensors is damaged: its content"):
        store.verify(KEY)


def test_files_changed_just_now_are_not_remembered(tmp_path: Path) -> None:
    """Within a clock tick a second change leaves the same stamp."""
    file = tmp_path / "file"
    file.write_bytes(b"1")
    memory = digests.DigestMemory(tmp_path / "memory.json")
    memory.put("file", "tree", digests.FileStamp.of(file))
    assert memory.get("file", file) is None
    time.sleep(0.05)
    memory.put("file", "tree", digests.FileStamp.of(file))
    assert memory.get("file", file) == "tree"
    assert memory.save() and digests.DigestMemory(tmp_path / "memory.json").get("file", file) == "tree"
    write_atomically(tmp_path / "memory.json", b"{broken")
    assert digests.DigestMemory(tmp_path / "memory.json").get("file", file) is None


def test_manifest_notices_edits_versions_and_escapes(tmp_path: Path) -> None:
    fill(tmp_path)
    path = tmp_path / "engine.json"
    whole = path.read_text()
    path.write_text(whole.replace('"bfloat16"', '"float16"', 1))
    with pytest.raises(EngineDamagedError, match="own digest"):
        read_manifest(tmp_path)
    path.write_text(whole.replace(f'"schema_version": {SCHEMA_VERSION}', '"schema_version": 99'))
    with pytest.raises(EngineDamagedError, match="schema version 99"):
        read_manifest(tmp_path)
    path.write_text("[]")
    with pytest.raises(EngineDamagedError, match="damaged"):
        read_manifest(tmp_path)
    path.write_text(whole)
    escaping = msgspec.structs.replace(
        read_manifest(tmp_path), files=(EngineFile(name="../../x", size=1, digest="tree64m:0"),)
    )
    write_manifest(tmp_path, escaping)
    with pytest.raises(EngineDamagedError, match="outside"):
        read_manifest(tmp_path)


def test_damaged_engine_is_set_aside_once_and_replaced(store: EngineStore) -> None:
    path = put(store)
    os.truncate(path / "config.json", 1)
    with pytest.raises(DamagedFileError) as caught:
        store.verify(KEY)
    aside = store.set_aside(caught.value)
    assert aside is not None and aside.is_dir() and store.find(KEY) is None
    put(store)
    assert not aside.exists(), "the replacement is there: the damaged one only takes room"
    assert store.set_aside(caught.value) is None, "another process that was slower must not move the new one"
    assert store.find(KEY) is not None


# ---------------------------------------------------------------- locks, crashes, space


def test_waiter_hears_of_the_holder_and_takes_its_result(store: EngineStore) -> None:
    built, heard, results = [], [], []
    entered = threading.Event()

    def start(name: str) -> None:
        mine = EngineStore(store.root)
        with mine.build_lock(KEY, heard.append, poll_seconds=0.01):
            if mine.find(KEY) is None:
                entered.set()
                time.sleep(0.3)
                with mine.staging(KEY) as directory:
                    fill(directory)
                    mine.publish(KEY, directory)
                built.append(name)
            results.append(mine.find(KEY))

    threads = [threading.Thread(target=start, args=("first",))]
    threads[0].start()
    assert entered.wait(5)
    threads.append(threading.Thread(target=start, args=("second",)))
    threads[1].start()
    for thread in threads:
        thread.join(10)
    assert built == ["first"] and results == [store.path_of(KEY)] * 2
    assert heard and f"process {os.getpid()} on" in str(heard[0])


def test_failed_and_killed_builds_leave_no_engine_and_no_litter(store: EngineStore) -> None:
    with pytest.raises(RuntimeError), store.build_lock(KEY), store.staging(KEY) as directory:
        (directory / "half").write_bytes(b"x")
        raise RuntimeError
    assert not directory.exists()
    other = msgspec.structs.replace(INPUTS, checkpoint_digest="other")
    staging = store.engines / ".staging"
    for key in (KEY, engine_key(other)):
        _kill_in_mid_build(store.root, key)
        (left,) = staging.iterdir()  # the second builder removed what the first left, though of another key
        assert left.name.startswith(key) and store.find(key) is None and store.list_engines() == []
    put(store)
    assert list(staging.iterdir()) == []


def _kill_in_mid_build(root: Path, key: str) -> None:
    code = (
        "import sys, time; from pathlib import Path; from appliance.engines import EngineStore\n"
        "store = EngineStore(Path(sys.argv[1]))\n"
        "with store.build_lock(sys.argv[2]), store.staging(sys.argv[2]) as d:\n"
        "    (d / 'rank-0.safetensors').write_bytes(b'half'); print('building', flush=True); time.sleep(60)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(root), key], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdout.readline() == "building\n"
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    child.stdout.close()


def test_file_system_without_locks_is_refused_in_words(store: EngineStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(fd: int) -> bool:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("appliance.engines.store._try_lock", no_locks)
    with pytest.raises(CacheNotWritableError, match=r"cannot lock files \(No locks available\)"), store.build_lock(KEY):
        pass


def test_live_staging_of_another_key_is_left_alone(store: EngineStore) -> None:
    other = engine_key(msgspec.structs.replace(INPUTS, checkpoint_digest="other"))
    theirs = EngineStore(store.root)
    with theirs.build_lock(other), theirs.staging(other) as directory:
        put(store)
        assert directory.is_dir()


def test_no_space_is_said_before_writing_after_dropping_what_is_useless(tmp_path: Path) -> None:
    free = [100 << 20]
    store = EngineStore(tmp_path, free_bytes=lambda path: free[0])
    store.reserve(30 << 20, "the engine")
    with pytest.raises(NoSpaceError, match=r"the engine needs 164\.0 MiB .* 100\.0 MiB are free"):
        store.reserve(100 << 20, "the engine")
    store.engines.joinpath(".damaged", f"{KEY}.1").mkdir(parents=True)
    with pytest.raises(NoSpaceError):
        store.reserve(100 << 20, "the engine")
    assert not store.engines.joinpath(".damaged", f"{KEY}.1").exists()


def test_unwritable_cache_says_how_to_fix_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(CacheNotWritableError) as caught:
        ensure_writable(tmp_path / "file" / "cache")
    text = str(caught.value)
    for part in (f"user {os.getuid()}:{os.getgid()}", "sudo chown -R", "--user", "-v DIR:", "--cache"):
        assert part in text
    with pytest.raises(CacheNotWritableError), EngineStore(tmp_path / "file").build_lock(KEY):
        pass


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_directory_of_another_user_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(CacheNotWritableError, match="mode 500"):
            ensure_writable(tmp_path / "cache")
    finally:
        tmp_path.chmod(0o700)


# ---------------------------------------------------------------- fetch and publish


class Handler(BaseHTTPRequestHandler):
    """Files below a directory, with ranges or without; cuts connections and flips bits on request."""

    def __init__(self, faults: dict[str, int], root: Path, *args: object) -> None:
        self.faults, self.root = faults, root
        super().__init__(*args)  # type: ignore[arg-type]

    def do_HEAD(self) -> None:
        self._serve(body=False)

    def do_GET(self) -> None:
        self._serve(body=True)

    def _serve(self, body: bool) -> None:
        path = self.root / self.path.lstrip("/")
        if not path.is_file():
            self.send_error(404)
            return
        data, begin, status = path.read_bytes(), 0, 200
        total = len(data)
        asked = self.headers.get("Range")
        if asked and self.faults.get("ranges", 1):
            first, last = asked.removeprefix("bytes=").split("-")
            begin, status = int(first), 206
            data = data[begin : int(last) + 1]
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        if status == 206:
            self.send_header("Content-Range", f"bytes {begin}-{begin + len(data) - 1}/{total}")
        self.end_headers()
        if not body:
            return
        if path.name.startswith("rank") and begin >= self.faults.get("hang_from", 1 << 60):
            self.wfile.write(data[:100])
            self.wfile.flush()
            time.sleep(30)  # a daemon thread: it ends with the test run
            return
        if path.name.startswith("rank") and self.faults.get("cuts", 0) > 0 and begin >= self.faults["cut_from"]:
            self.faults["cuts"] -= 1
            self.wfile.write(data[:100])
            self.close_connection = True
            return
        self.faults["sent"] = self.faults.get("sent", 0) + len(data)
        self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def http(tmp_path: Path) -> Iterator[tuple[str, Path, dict[str, int]]]:
    root, faults = tmp_path / "www", {"ranges": 1}
    root.mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, faults, root))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", root, faults
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("kind", ["memory", "file", "directory"])
def test_publish_then_fetch(store: EngineStore, tmp_path: Path, kind: str) -> None:
    url = {"memory": f"memory://{tmp_path.name}", "file": f"file://{tmp_path}/pub", "directory": f"{tmp_path}/pub"}[
        kind
    ]
    path = put(store)
    seen: list[Snapshot] = []
    assert publish(path, url, progress=seen.append) == f"{url}/{KEY}"
    assert seen[-1].percent == 100.0
    assert publish(path, url) == f"{url}/{KEY}", "the same build again: nothing to do"
    elsewhere = EngineStore(tmp_path / "other")
    fetched = fetch(url, KEY, elsewhere, progress=seen.append)
    assert fetched == elsewhere.find(KEY)
    assert {name: (fetched / name).read_bytes() for name in FILES} == FILES
    assert elsewhere.verify(KEY, "full").manifest == read_manifest(path)
    assert fetch("memory://nothing-there", KEY, elsewhere) == fetched, "present: no look at the URL"
    with pytest.raises(EngineNotFoundError, match="no engine at"):
        fetch(url, "0" * 64, elsewhere)


def test_fetch_goes_on_after_a_cut(store: EngineStore, tmp_path: Path, http: tuple[str, Path, dict[str, int]]) -> None:
    url, root, faults = http
    publish(put(store), str(root))
    faults |= {"cuts": 10**9, "cut_from": 128 << 10}
    elsewhere = EngineStore(tmp_path / "other")
    with pytest.raises(EngineTransferError, match=r"rank-0\.safetensors failed at byte 131072 of 300000"):
        fetch(url, KEY, elsewhere, block=64 << 10, attempts=2)
    assert elsewhere.find(KEY) is None
    part = elsewhere.engines / ".staging" / f"{KEY}.fetch" / "rank-0.safetensors.part"
    assert part.read_bytes() == FILES["rank-0.safetensors"][: 128 << 10]
    faults |= {"cuts": 1, "sent": 0}
    fetched = fetch(url, KEY, elsewhere, block=64 << 10)  # one more cut, which is retried
    assert (fetched / "rank-0.safetensors").read_bytes() == FILES["rank-0.safetensors"]
    assert faults["sent"] < 300_000, "what was there is not sent again"
    assert list((elsewhere.engines / ".staging").iterdir()) == []


def test_a_source_that_hangs_costs_no_more_than_its_patience(
    store: EngineStore, tmp_path: Path, http: tuple[str, Path, dict[str, int]]
) -> None:
    url, root, faults = http
    publish(put(store), str(root))
    elsewhere = EngineStore(tmp_path / "other")
    for hang_from, kept in ((0, 0), (128 << 10, 128 << 10)):
        faults["hang_from"] = hang_from
        began = time.monotonic()
        with pytest.raises(EngineTransferError, match=rf"(gave nothing for 1 s|failed at byte {kept} of 300000)"):
            fetch(url, KEY, elsewhere, block=64 << 10, patience=1.0)
        assert time.monotonic() - began < 4.0, "1 s, and what a busy machine adds"
        assert elsewhere.find(KEY) is None
        with elsewhere.build_lock(KEY):
            pass  # free at once, for the build that goes on
    part = elsewhere.engines / ".staging" / f"{KEY}.fetch" / "rank-0.safetensors.part"
    assert part.read_bytes() == FILES["rank-0.safetensors"][: 128 << 10], "what came is kept, and the tail not written"
    del faults["hang_from"]
    faults["sent"] = 0
    fetched = fetch(url, KEY, elsewhere, block=64 << 10)
    assert (fetched / "rank-0.safetensors").read_bytes() == FILES["rank-0.safetensors"]
    assert faults["sent"] < 300_000


def test_a_source_that_accepts_and_says_nothing(store: EngineStore) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        began = time.monotonic()
        with pytest.raises(EngineTransferError, match=r"did not answer within 0\.5 s|cannot be reached"):
            fetch(f"http://127.0.0.1:{silent.getsockname()[1]}", KEY, store, patience=0.5)
        assert time.monotonic() - began < 3.0


def test_patience_pauses_renews_and_keeps_the_abandoned_from_writing() -> None:
    watch = Patience(0.2)
    with watch.paused():
        time.sleep(0.3)
        assert not watch.over
    release, outcome = threading.Event(), []

    def late() -> None:
        release.wait(20)
        try:
            with watch.writing():
                outcome.append("wrote")
        except Abandoned:
            outcome.append("abandoned")

    with pytest.raises(OutOfPatience):
        watch.run([late])
    release.set()
    deadline = time.monotonic() + 10
    while not outcome and time.monotonic() < deadline:
        time.sleep(0.01)
    assert outcome == ["abandoned"]
    assert Patience(5).run([lambda n=n: n * n for n in range(9)], parallel=3) == [n * n for n in range(9)]


def test_fetch_from_a_server_without_ranges(
    store: EngineStore, tmp_path: Path, http: tuple[str, Path, dict[str, int]]
) -> None:
    url, root, faults = http
    publish(put(store), str(root))
    faults["ranges"] = 0
    elsewhere = EngineStore(tmp_path / "other")
    assert fetch(url, KEY, elsewhere, block=64 << 10).is_dir()
    elsewhere.verify(KEY, "full")


def test_a_disk_that_fills_up_during_a_fetch_is_said_at_once(
    store: EngineStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(store)
    url = str(tmp_path / "remote")
    publish(store.path_of(KEY), url)
    tried: list[str] = []

    def full(remote: object, file: EngineFile, *_: object) -> None:
        tried.append(file.name)
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr("appliance.engines.transfer._append", full)
    with pytest.raises(NoSpaceError, match="no space is left on the file system of"):
        fetch(url, KEY, EngineStore(tmp_path / "other"))
    assert len(tried) == len(set(tried)), "no file was tried twice"


def test_damaged_part_is_fetched_anew(store: EngineStore, tmp_path: Path) -> None:
    url = f"memory://{tmp_path.name}"
    publish(put(store), url)
    elsewhere = EngineStore(tmp_path / "other")
    with elsewhere.build_lock(KEY):
        staging = elsewhere.fetch_staging(KEY)
    (staging / "engine.json").write_bytes((store.path_of(KEY) / "engine.json").read_bytes())
    (staging / "rank-0.safetensors.part").write_bytes(bytes(200_000))
    fetch(url, KEY, elsewhere)
    elsewhere.verify(KEY, "full")


def test_what_is_wrong_at_the_url_is_named(store: EngineStore, tmp_path: Path) -> None:
    url = str(tmp_path / "pub")
    publish(put(store), url)
    elsewhere = EngineStore(tmp_path / "other")
    rank = tmp_path / "pub" / KEY / "rank-0.safetensors"
    rank.write_bytes(bytes(300_000))
    with pytest.raises(EngineDamagedError, match=r"rank-0\.safetensors does not match"):
        fetch(url, KEY, elsewhere)
    rank.unlink()
    with pytest.raises(EngineDamagedError, match=r"rank-0\.safetensors is missing"):
        fetch(url, KEY, elsewhere)
    assert elsewhere.find(KEY) is None
    full = EngineStore(tmp_path / "full", free_bytes=lambda path: 1 << 20)
    with pytest.raises(NoSpaceError, match="fetching engine"):
        fetch(url, KEY, full)


def test_interrupted_publish_goes_on_and_is_not_seen_before(store: EngineStore, tmp_path: Path) -> None:
    path, target = put(store), tmp_path / "pub" / KEY
    target.mkdir(parents=True)
    (target / "engine.json.partial").write_bytes((path / "engine.json").read_bytes())
    (target / "rank-0.safetensors").write_bytes(b"\0" * 300_000)  # stands for a whole file: of the right size
    (target / "config.json").write_bytes(b"part")
    with pytest.raises(EngineNotFoundError):
        fetch(str(tmp_path / "pub"), KEY, EngineStore(tmp_path / "other"))
    publish(path, str(tmp_path / "pub"))
    assert (target / "rank-0.safetensors").read_bytes() == b"\0" * 300_000, "whole files are not sent again"
    assert (target / "config.json").read_bytes() == FILES["config.json"]
    assert not (target / "engine.json.partial").exists()


def test_publish_refuses_damage_http_and_other_builds(store: EngineStore, tmp_path: Path) -> None:
    path, url = put(store), str(tmp_path / "pub")
    publish(path, url)
    other = EngineStore(tmp_path / "other")
    different = put(other, files=FILES | {"config.json": b"{}"})
    with pytest.raises(EngineTransferError, match="another build"):
        publish(different, url)
    publish(different, url, overwrite=True)
    assert (tmp_path / "pub" / KEY / "config.json").read_bytes() == b"{}"
    with pytest.raises(EngineTransferError, match="only for fetching"):
        publish(path, "https://user:secret@example.invalid/x")
    os.truncate(path / "config.json", 2)
    with pytest.raises(DamagedFileError):
        publish(path, url)


def test_urls_that_cannot_work_say_so_in_time_and_without_secrets(store: EngineStore) -> None:
    with pytest.raises(EngineTransferError, match="cannot be used"):
        fetch("nosuch://x", KEY, store)
    silent = threading.Event()
    begin = time.monotonic()
    with pytest.raises(EngineTransferError, match=r"somewhere did not answer within 0\.1 s"):
        transfer._ask(Patience(0.1), lambda: silent.wait(60), "somewhere")
    assert time.monotonic() - begin < 20
    silent.set()
    with pytest.raises(EngineTransferError) as caught:
        fetch("http://user:secret@127.0.0.1:9", KEY, store, patience=2)
    assert "secret" not in str(caught.value)


def test_importing_engines_imports_no_torch() -> None:
    code = "import sys, appliance.engines, appliance.checkpoint, appliance.builder; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
