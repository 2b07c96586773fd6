"""Which text calibration takes, what identifies it, and the tokens it becomes."""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from calibrated_models import byte_tokenizer

from appliance import builtin
from appliance.builder import calibration_text
from appliance.builder.calibration_data import (
    TASKS_DIGEST,
    TaskSource,
    TextSource,
    calibration_tokens,
    load_tokenizer,
    source_of,
)
from appliance.builtin import tasks
from appliance.errors import CheckpointError, SettingsError


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A directory with a tokenizer, which is all that is looked at."""
    path = tmp_path / "model"
    path.mkdir()
    byte_tokenizer().save(str(path / "tokenizer.json"))
    return path


def tokens(data: str, checkpoint: Path, samples: int = 16, length: int = 64, **limits: int) -> list[list[int]]:
    limits = {"vocab_size": 258, "max_length": 4096} | limits
    return calibration_tokens(data, checkpoint, samples, length, **limits).rows


# ---------------------------------------------------------------- what ships


def test_digests_name_what_ships(checkpoint: Path) -> None:
    """If one of these fails, the text has changed on purpose or not: a changed text needs a new digest, which gives
    new engines."""
    text = calibration_text.text()
    assert hashlib.sha256(text.encode()).hexdigest() == calibration_text.DIGEST
    rows = TaskSource().rows(load_tokenizer(builtin.checkpoint_dir()), 128, 512)
    assert hashlib.sha256(json.dumps(rows, separators=(",", ":")).encode()).hexdigest() == TASKS_DIGEST


def test_shipped_text_is_long_and_varied() -> None:
    import zlib

    text = calibration_text.text()
    assert len(text) >= calibration_text.CHARACTERS >= 128 * 512 * 8, "enough for the defaults with any tokenizer"
    assert len(zlib.compress(text.encode())) > len(text) // 5
    for word in ("def ", "SELECT", "Question:", "| name |", "春天", "Утром", "http", "{"):
        assert word in text, word
    paragraphs = text.split("\n\n")
    assert len(set(paragraphs)) > 0.9 * len(paragraphs)


def test_the_built_in_model_gets_its_own_tasks_never_those_of_the_evaluation(tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    shutil.copyfile(builtin.checkpoint_dir() / "tokenizer.json", copy / "tokenizer.json")
    assert isinstance(source_of("", copy), TaskSource), "wherever it lies"
    tokenizer = load_tokenizer(copy)
    rows = tokens("", copy, 32, 512, vocab_size=2048)
    assert 32 * 512 <= sum(map(len, rows)) < 32 * 512 + 4096
    assert [len(row) for row in rows] == sorted((len(row) for row in rows), reverse=True)
    assert len(rows[0]) > 1000 and rows[0][0] == tokenizer.token_to_id("<|begin|>"), (
        "whole conversations, long ones too"
    )
    texts = [tokenizer.decode(row, skip_special_tokens=False) for row in rows]
    for task in ("addition", "subtraction", "units"):
        held_out = [sample.messages[-1]["content"] for sample in tasks.evaluation_set(task, 300)]
        asked = [question for question in held_out if any(f"<|user|>{question}<|end|>" in text for text in texts)]
        assert not asked, asked[:3]
    (copy / "tokenizer.json").write_bytes((copy / "tokenizer.json").read_bytes()[:-1] + b" ")
    assert isinstance(source_of("", copy), TextSource) and isinstance(source_of("", tmp_path), TextSource)


# ---------------------------------------------------------------- rows


def test_rows_begin_as_prompts_and_are_spread_over_the_text(checkpoint: Path) -> None:
    tokenizer = load_tokenizer(checkpoint)
    text = "".join(f"{i:07d}," for i in range(40_000))  # 8 tokens each; every place can be told from its number
    for rows in (TextSource("x", "", lambda: text).rows(tokenizer, 20, 65),):
        assert len(rows) == 20 and {len(row) for row in rows} == {65} and {row[0] for row in rows} == {0}
        places = [int(tokenizer.decode(row[1:]).split(",")[1]) for row in rows]
        assert places == sorted(places)
        gaps = [b - a for a, b in itertools.pairwise(places)]
        assert min(gaps) > 1900 and max(gaps) < 2300, gaps
    short = text[: 64 * 20]
    rows = TextSource("x", "", lambda: short).rows(tokenizer, 20, 65)
    assert "".join(tokenizer.decode(row[1:]) for row in rows) == short, "all of it where there is no more"


def test_rows_fit_the_model(checkpoint: Path) -> None:
    rows = tokens("", checkpoint, 32, 512, max_length=48)
    assert {len(row) for row in rows} == {48}, "no longer than its context"
    with pytest.raises(CheckpointError, match="tokens that the model does not have: its vocabulary is 3"):
        tokens("", checkpoint, vocab_size=3)
    (checkpoint / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be read"):
        tokens("", checkpoint)


# ---------------------------------------------------------------- files


def test_files_of_every_kind_give_the_same_text(checkpoint: Path, tmp_path: Path) -> None:
    texts = [f"Document {i}: " + "water, stone and wind; " * 20 for i in range(8)]
    lines = "".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(texts))
    plain = "\n\n".join(texts)
    (tmp_path / "a.txt").write_text(plain)
    (tmp_path / "b.jsonl").write_text(lines)
    (tmp_path / "c.json.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "notes").write_text(plain)  # named by the user: whatever it is called
    folder = tmp_path / "folder"
    (folder / "deep").mkdir(parents=True)
    for i, text in enumerate(texts):
        (folder / "deep" / f"{i}.md").write_text(text)
    (folder / "image.png").write_bytes(b"\x89PNG\0")
    expected = tokens(str(tmp_path / "a.txt"), checkpoint)
    for name in ("b.jsonl", "c.json.gz", "notes", "folder"):
        assert tokens(str(tmp_path / name), checkpoint) == expected, name


def test_what_cannot_be_read_is_said(checkpoint: Path, tmp_path: Path) -> None:
    def write(name: str, content: bytes) -> str:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        return str(path)

    for data, words in (
        (str(tmp_path / "missing"), "there is no file or directory"),
        (str(Path(write("empty/image.png", b"x")).parent), r"the directory has no text; looked for \.txt"),
        (write("a.parquet", b"PAR1rest"), "is not text"),
        (write("a.bin", b"ab\0c"), "is not text"),
        (write("latin.txt", "Zürich".encode("latin-1")), "is not UTF-8 text"),
        (write("bad.jsonl", b'{"text": "a"}\n{"text": \n'), "line 2 is not JSON"),
        (write("other.jsonl", b'{"content": "a"}\n'), 'line 1 has no field "text"'),
        (write("list.jsonl", b"[1]\n"), 'line 1 has no field "text"'),
        (write("a.txt.gz", b"no gzip"), "cannot be read"),
        (write("none.txt", b""), "has 0 tokens, which make 0 samples of 64, and 16 are needed"),
    ):
        with pytest.raises(SettingsError, match=words):
            tokens(data, checkpoint)


def test_only_the_beginning_of_huge_files_counts(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from appliance.builder import calibration_data

    monkeypatch.setattr(calibration_data, "_MAX_BYTES", 5000)
    line = json.dumps({"text": "ä" * 20}) + "\n"
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    first.write_text(line * 30)
    second.write_text(line * 100 + "not read, so it does not matter that it is no JSON")
    source = source_of(str(tmp_path), checkpoint)
    assert isinstance(source, TextSource)
    whole = 5000 // len(line)
    assert source.text().count("\n\n") == whole - 1, "a line that was cut is left out"
    digest = source.digest
    second.write_text(line * 150)
    assert source_of(str(tmp_path), checkpoint).digest == digest


def test_importing_it_leaves_torch_out() -> None:
    code = "import sys, appliance.builder.calibration_data; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
