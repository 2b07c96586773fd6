"""Bundles: exported, carried, imported whole or not at all; damaged, cut and hostile archives are refused by name."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from hub_layout import COMMIT, put_into_hub

from appliance import builtin, cli
from appliance.checkpoint import digest, resolve
from appliance.engines import EngineStore
from appliance.engines.archive import BundleError, BundleFile, BundleManifest, extract, open_bundle, write_bundle
from appliance.engines.meter import ByteMeter
from appliance.errors import CheckpointError
from appliance.launch.prepare import prepare_engine

ROOT = Path(__file__).parent.parent
FILES = {
    "hub/models--o--m/blobs/1": b"first" * 1000,
    "hub/models--o--m/refs/main": b"c",
    "models/x/config.json": b"{}",
}


def manifest_of(files: dict[str, bytes], **fields: object) -> BundleManifest:
    listed = tuple(BundleFile(name, len(data), hashlib.sha256(data).hexdigest()) for name, data in files.items())
    whole = {"schema_version": 1, "appliance": "1", "created": "now", "model": "o/m", "engines": (), "files": listed}
    return BundleManifest(**(whole | fields))  # type: ignore[arg-type]


def archive(manifest: BundleManifest, members: list[tuple[str, bytes] | tarfile.TarInfo]) -> bytes:
    """A tar that claims to be a bundle, with any members."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w|") as tar:
        for member in [("bundle.json", msgspec.json.encode(manifest)), *members]:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
                continue
            info = tarfile.TarInfo(member[0])
            info.size = len(member[1])
            tar.addfile(info, io.BytesIO(member[1]))
    return out.getvalue()


def take(data: bytes, staging: Path) -> None:
    with open_bundle(io.BytesIO(data)) as (manifest, tar), ByteMeter(manifest.nbytes, None) as meter:
        extract(tar, manifest, staging, meter)


def test_written_then_read(tmp_path: Path) -> None:
    sources = {}
    for number, (name, data) in enumerate(FILES.items()):
        sources[name] = tmp_path / str(number)
        sources[name].write_bytes(data)
    out, manifest = io.BytesIO(), manifest_of(FILES)
    with ByteMeter(manifest.nbytes, None) as meter:
        write_bundle(out, manifest, sources, meter)
    take(out.getvalue(), tmp_path / "to")
    assert {name: (tmp_path / "to" / name).read_bytes() for name in FILES} == FILES
    (tmp_path / "0").write_bytes(b"other" * 1000)
    with pytest.raises(BundleError, match="changed while it was written"), ByteMeter(0, None) as meter:
        write_bundle(io.BytesIO(), manifest, sources, meter)
    (tmp_path / "0").write_bytes(b"shorter")
    with pytest.raises(BundleError, match="changed while it was written"), ByteMeter(0, None) as meter:
        write_bundle(io.BytesIO(), manifest, sources, meter)


@pytest.mark.parametrize("keep", [0, 100, 600, 1200, 3000, 6000])
def test_a_cut_archive_is_refused_and_the_whole_one_goes_on(keep: int, tmp_path: Path) -> None:
    data = archive(manifest_of(FILES), list(FILES.items()))
    with pytest.raises(BundleError, match=r"damaged|cut off|ends before|no bundle"):
        take(data[:keep], tmp_path)
    for path in tmp_path.rglob("*"):
        whole = path.is_dir() or path.suffix == ".part" or path.read_bytes() == FILES[str(path.relative_to(tmp_path))]
        assert whole, f"{path} has a name that says it is whole"
    take(data, tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in FILES} == FILES


def test_a_flipped_bit_is_named(tmp_path: Path) -> None:
    data = bytearray(archive(manifest_of(FILES), list(FILES.items())))
    data[data.index(b"firstfirst") + 2500] ^= 1
    with pytest.raises(BundleError, match=r"blobs/1 in the archive does not match its SHA-256"):
        take(bytes(data), tmp_path)
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


@pytest.mark.parametrize(
    "name",
    [
        "../x",
        "/etc/x",
        "hub/../../x",
        "engines/../x/y",
        "hub",
        "elsewhere/x",
        "hub/.x",
        "hub//x",
        "hub/a/./b",
        ".bundles/x/y",
    ],
)
def test_names_that_leave_the_cache_are_refused(name: str, tmp_path: Path) -> None:
    for manifest in (manifest_of({name: b"x"}), manifest_of(FILES, links={name: next(iter(FILES))})):
        with pytest.raises(BundleError, match="does not belong into a cache"):
            take(archive(manifest, [(name, b"x")]), tmp_path / "to")
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_listed_or_no_plain_file_is_refused(tmp_path: Path) -> None:
    first, *others = FILES.items()
    manifest = manifest_of(FILES)
    link = tarfile.TarInfo(first[0])
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    cases: list[tuple[BundleManifest, list[tuple[str, bytes] | tarfile.TarInfo], str]] = [
        (manifest, [("../../escape", b"x"), *others], "where hub/models--o--m/blobs/1 should be"),
        (manifest, [link, *others], "where hub/models--o--m/blobs/1 should be"),
        (manifest, [(first[0], b"short"), *others], "where hub/models--o--m/blobs/1 should be"),
        (manifest_of(FILES, links={"hub/a/b": "/etc/passwd"}), [], "none of its files"),
        (manifest_of(FILES, engines=("../../x",)), [], "an engine that is none"),
        (manifest_of(FILES, model="models/../../x"), [], "does not belong into a cache"),
        (manifest_of(FILES, schema_version=7), [], "schema version 7"),
    ]
    for hostile, members, message in cases:
        with pytest.raises(BundleError, match=message):
            take(archive(hostile, members), tmp_path / "to")
    assert not list(tmp_path.rglob("*escape*"))
    twice = BundleManifest(1, "1", "now", "m", (), (manifest.files[0], manifest.files[0]))
    with pytest.raises(BundleError, match="names a file twice"):
        take(archive(twice, []), tmp_path / "to")
    for junk in (b"", b"not a tar", archive(manifest, [])[512:]):
        with pytest.raises(BundleError):
            take(junk, tmp_path / "to")


# ---------------------------------------------------------------- the commands, with a real model


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with a hub model and its engine."""
    cache = tmp_path_factory.mktemp("source")
    put_into_hub(builtin.checkpoint_dir(), cache)
    prepare_engine("org/tiny", precision="bf16", cache=cache, overrides={"offline": True})
    return cache


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*words: object) -> tuple[int, str, str]:
        code = cli.main([str(word) for word in words])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def export(run: Run, source: Path, file: Path, *words: str) -> dict[str, object]:
    code, out, err = run(
        "bundle", "export", file, "--model", "org/tiny", "--offline", "--cache", source, "--json", *words
    )
    assert code == 0, err
    found = json.loads(out)
    assert isinstance(found, dict)
    return found


def test_a_hub_model_and_its_engine_travel(source: Path, tmp_path: Path, run: Run) -> None:
    file, cache = tmp_path / "model.bundle", tmp_path / "cache"
    facts = export(run, source, file)
    assert facts["result"] == str(file) and len(facts["engines"]) == 1  # type: ignore[arg-type]
    assert run("bundle", "import", file, "--cache", cache)[:2] == (0, "org/tiny\n")
    path = resolve("org/tiny", cache, offline=True)
    assert path.name == COMMIT and all(link.is_symlink() and link.is_file() for link in path.iterdir())
    assert digest(path, check=True).value == digest(resolve("org/tiny", source, offline=True)).value
    (stored,) = EngineStore(cache).list_engines()
    options = prepare_engine("org/tiny", precision="bf16", cache=cache, overrides={"offline": True})
    assert options.engine_dir == str(stored.path), "found, not built"
    assert list((cache / ".bundles").iterdir()) == []
    assert run("bundle", "import", file, "--cache", cache)[0] == 0, "once more changes nothing"


def test_an_interrupted_import_leaves_nothing_and_goes_on(source: Path, tmp_path: Path, run: Run) -> None:
    file, cache = tmp_path / "model.bundle", tmp_path / "cache"
    export(run, source, file)
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    code, out, err = run("bundle", "import", file, "--cache", cache)
    assert code == 7 and out == "" and "cut off" in err and len(err.splitlines()) <= 2
    assert not (cache / "hub").exists() and not (cache / "engines").exists()
    finished = {path: path.stat().st_ino for path in cache.rglob("*") if path.is_file() and path.suffix != ".part"}
    assert finished, "what came whole is kept"
    file.write_bytes(whole)
    assert run("bundle", "import", file, "--cache", cache)[0] == 0
    inodes = {path.stat().st_ino for path in cache.rglob("*") if path.is_file()}
    assert set(finished.values()) <= inodes, "and was not written again"


def test_through_a_pipe(source: Path, tmp_path: Path) -> None:
    common = [sys.executable, str(ROOT / "entrypoint.py"), "bundle"]
    writer = [*common, "export", "-", "--model", "org/tiny", "--offline", "--cache", str(source), "--no-engine"]
    reader = [*common, "import", "-", "--cache", str(tmp_path / "cache"), "--json"]
    with subprocess.Popen(writer, stdout=subprocess.PIPE) as first:
        done = subprocess.run(reader, stdin=first.stdout, capture_output=True, text=True)
    assert first.returncode == 0 and done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["engines"] == [] and resolve("org/tiny", tmp_path / "cache", offline=True).is_dir()


def test_a_directory_and_an_engine_alone(source: Path, tmp_path: Path, run: Run) -> None:
    file, cache = tmp_path / "b", tmp_path / "cache"
    model = tmp_path / "mine"
    model.mkdir()
    for path in builtin.checkpoint_dir().iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    words = ["bundle", "export", file, "--model", model, "--offline", "--cache", source]
    assert run(*words)[0] == 0
    code, out, _ = run("bundle", "import", file, "--cache", cache)
    imported = Path(out.strip())
    assert code == 0 and imported == cache / "models" / "mine"
    assert len(EngineStore(cache).list_engines()) == 1, "the same content has the same engine, wherever it lies"
    digest(imported, check=True)
    (imported / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        digest(imported, check=True)
    assert run(*words, "--engine-only", "--tp-size", "2")[0] == 2, "the engine there is is of one rank"
    assert run(*words, "--engine-only", "--tp-size", "1")[0] == 0
    code, out, _ = run("bundle", "import", file, "--cache", tmp_path / "other")
    assert code == 0 and prepare_engine(out.strip(), cache=tmp_path / "other").engine_dir == out.strip()
    assert not (tmp_path / "other" / "models").exists()


def test_what_cannot_be_done_is_said(tmp_path: Path, run: Run) -> None:
    code, _, err = run("bundle", "export", tmp_path / "b", "--cache", tmp_path / "empty")
    assert code == 2 and "nothing to export" in err and not (tmp_path / "b").exists()
    code, _, err = run("bundle", "import", tmp_path / "none", "--cache", tmp_path / "c")
    assert code == 2 and "No such file" in err
    code, _, err = run("bundle", "export", tmp_path / "no" / "b", "--cache", tmp_path / "empty")
    assert code == 2 and "directory" in err
    (tmp_path / "junk").write_bytes(os.urandom(5000))
    code, _, err = run("bundle", "import", tmp_path / "junk", "--cache", tmp_path / "c")
    assert code == 7 and err.startswith("error: ")
