"""The text that calibration runs through a model: where it comes from, what identifies it, and its tokens.

Three sources: files that the user names, the text that ships with the project (`calibration_text.py`), and, for the
built-in model, conversations of its own tasks. Knows no model and no algorithm. Torch-free: an engine's key, which the
control plane computes, holds the digest of the text.
"""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from appliance.builder import calibration_text
from appliance.builder.quality_text import is_builtin
from appliance.builder.request import BuildRequest, is_calibrated
from appliance.errors import CheckpointError, SettingsError
from appliance.sizes import counted
from appliance.types import ModelConfig

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MIN_TOKENS = 1024  # of all rows together; statistics of fewer tokens say nothing
_MAX_BYTES = 64 << 20  # of text read from files, the first files by name first; a row needs some 2 KB
_LINES = (".jsonl", ".ndjson", ".json")  # one JSON object a line, its text in a field of that name
_PLAIN = (".txt", ".md", ".text")
_CHARS_PER_TOKEN = 8  # more than any tokenizer takes on average: so much text is enough for a row
_LARGEST_PIECE = 1 << 16  # characters encoded at once
_TASK_BATCH = 8192  # tokens of conversations made at once: two of the longest
# SHA-256 of what `_task_rows` gives for 65536 tokens; a test computes it. It names the generator's output in keys.
TASKS_DIGEST = "86c727f81e13b38f6255c2196c1c25a274cb439607c02ae88e2237ed58361892"

Rows = list[list[int]]


class CalibrationSource(ABC):
    """`name`: for people. `digest`: SHA-256 in hex of all that rows are made from, for the engine's key."""

    name: str
    digest: str

    @abstractmethod
    def rows(self, tokenizer: Tokenizer, samples: int, length: int) -> Rows:
        """Token ids of prompts, `samples` times `length` in all, or a little more or less. Raises SettingsError if
        there are not enough."""


@dataclass(frozen=True)
class TextSource(CalibrationSource):
    """Running text, cut into rows of one length that are spread evenly over it."""

    name: str
    digest: str
    text: Callable[[], str]

    def rows(self, tokenizer: Tokenizer, samples: int, length: int) -> Rows:
        """Exactly `samples` rows of `length` tokens; each begins as the tokenizer begins a prompt."""
        start = _first_ids(tokenizer)
        body = length - len(start)
        pieces: Rows = []
        found = 0
        for window in _windows(self.text(), samples, length * _CHARS_PER_TOKEN):
            ids: list[int] = []
            for at in range(0, len(window), _LARGEST_PIECE):
                ids += tokenizer.encode(window[at : at + _LARGEST_PIECE], add_special_tokens=False).ids
            found += len(ids)
            pieces += [ids[at : at + body] for at in range(0, len(ids) - body + 1, body)]
        if len(pieces) < samples:
            fitting = "; at most --calibration-samples " + str(len(pieces)) if pieces else ""
            have = f"{counted(found, 'token')}, which make {counted(len(pieces), 'sample')} of {length}"
            raise SettingsError(
                f"the calibration text is too short: {self.name} has {have}, and {samples} are needed",
                hint=f"name a longer text with --calibration-data, or ask for less{fitting}",
            )
        return [start + pieces[i * len(pieces) // samples] for i in range(samples)]


@dataclass(frozen=True)
class TaskSource(CalibrationSource):
    """Conversations of the built-in model's tasks, of the split that it was trained on. Rows are whole conversations of
    any length that the model knows, since a cut one would ask about a table that is not there."""

    name: str = "conversations of the built-in tasks"
    digest: str = TASKS_DIGEST

    def rows(self, tokenizer: Tokenizer, samples: int, length: int) -> Rows:
        """As many whole conversations as make `samples` times `length` tokens."""
        return _task_rows(tokenizer, samples * length)


def _task_rows(tokenizer: Tokenizer, num_tokens: int) -> Rows:
    from appliance.builtin.data import Packer
    from appliance.builtin.tokenizer import ChatEncoder

    encoder = ChatEncoder(tokenizer)
    packer = Packer(encoder, _TASK_BATCH, seed=0)
    rows: Rows = []
    found = 0
    while True:
        batch = packer.batch(grown=1.0)
        for start, size in zip(itertools.accumulate(batch.lengths, initial=0), batch.lengths):
            row = batch.tokens[start : start + size].tolist()
            if row[0] == encoder.pad:
                continue
            rows.append(row)
            found += size
            if found >= num_tokens:
                return rows


# ---------------------------------------------------------------- which source


def source_of(data: str, checkpoint: Path) -> CalibrationSource:
    """What `data` names: a file or a directory of text; "": the built-in model's own tasks for it, and for any other
    model the text that ships. Raises SettingsError for what cannot be read."""
    if data:
        return _from_files(Path(data).expanduser())
    if is_builtin(checkpoint):  # by its tokenizer, so wherever a copy lies
        return TaskSource()
    return TextSource("the text that ships", calibration_text.DIGEST, calibration_text.text)


def key_parameters(data: str, checkpoint: Path, samples: int, length: int) -> dict[str, Any]:
    """What an engine's key says of its calibration: other text, or more of it, gives another engine."""
    return {"data": source_of(data, checkpoint).digest, "samples": samples, "length": length}


def tokens_for(request: BuildRequest, config: ModelConfig) -> CalibrationTokens | None:
    """What a build calibrates with; None if its scheme needs no calibration. Raises what `calibration_tokens` does."""
    if not is_calibrated(request):
        return None
    return calibration_tokens(
        request.calibration_data,
        Path(request.checkpoint),
        request.calibration_samples,
        request.calibration_length,
        vocab_size=config.vocab_size,
        max_length=config.max_position_embeddings,
    )


# ---------------------------------------------------------------- tokens


@dataclass(frozen=True)
class CalibrationTokens:
    """What is run through the model."""

    source: CalibrationSource
    rows: Rows  # prompts, the longest first, so that those computed together are of about one length

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.rows))


def calibration_tokens(
    data: str, checkpoint: Path, samples: int, length: int, *, vocab_size: int, max_length: int
) -> CalibrationTokens:
    """Rows of at most `max_length` tokens, the model's context limit. Raises SettingsError (no such text, too short),
    CheckpointError (no usable tokenizer)."""
    source = source_of(data, checkpoint)
    if samples * min(length, max_length) < MIN_TOKENS:
        raise SettingsError(
            f"{samples} calibration samples of {min(length, max_length)} tokens are {samples * min(length, max_length)}"
            f" tokens; allowed: at least {MIN_TOKENS}",
            hint="raise --calibration-samples or --calibration-length",
        )
    rows = source.rows(load_tokenizer(checkpoint), samples, min(length, max_length))
    # A tokenizer may have more entries than the model has embeddings.
    rows = [kept for row in rows if (kept := [token for token in row[:max_length] if token < vocab_size])]
    if sum(map(len, rows)) < MIN_TOKENS:
        raise CheckpointError(
            f"the tokenizer of {checkpoint} gives tokens that the model does not have: its vocabulary is {vocab_size}",
            hint="config.json, weights and tokenizer are not of the same model",
        )
    return CalibrationTokens(source, sorted(rows, key=len, reverse=True))


def load_tokenizer(checkpoint: Path) -> Tokenizer:
    """The checkpoint's tokenizer, converted as for an engine where it has no tokenizer.json. Raises CheckpointError."""
    from tokenizers import Tokenizer

    from appliance.builder.tokenizer import copy_tokenizer

    with tempfile.TemporaryDirectory() as directory:
        file = checkpoint / "tokenizer.json"
        if not file.is_file():
            copy_tokenizer(checkpoint, Path(directory))
            file = Path(directory) / "tokenizer" / "tokenizer.json"
        try:
            tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises a bare Exception
            raise CheckpointError(
                f"{checkpoint / 'tokenizer.json'} cannot be read: {error}", hint="download the checkpoint again"
            ) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _first_ids(tokenizer: Tokenizer) -> list[int]:
    """Special tokens in front of every prompt."""
    whole, bare = tokenizer.encode("a").ids, tokenizer.encode("a", add_special_tokens=False).ids
    for at in range(len(whole) - len(bare) + 1):
        if whole[at : at + len(bare)] == bare:
            return list(whole[:at])
    return []


def _windows(text: str, count: int, size: int) -> Iterator[str]:
    """The whole text if it is short, else `count` stretches of `size` characters spread evenly over it."""
    if len(text) <= count * size:
        yield text
        return
    for i in range(count):
        at = i * (len(text) - size) // max(count - 1, 1)
        yield text[at : at + size]


# ---------------------------------------------------------------- files


def _from_files(path: Path) -> TextSource:
    """Text of a file, or of all files of a directory that are text by their names. The first 64 MiB count."""
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file() and _kind(file) is not None)
        if not files:
            raise SettingsError(
                f"--calibration-data {path}: the directory has no text; looked for {', '.join((*_PLAIN, *_LINES))}, "
                "also with .gz",
                hint="name a text file, a jsonl file, or a directory with such files",
            )
    elif path.is_file():
        files = [path]
    else:
        raise SettingsError(
            f"--calibration-data: there is no file or directory {path}",
            hint="name a text file, a jsonl file, a directory with such files, or a data set of the hub (org/name)",
        )
    parts: list[str] = []
    digest = hashlib.sha256()
    left = _MAX_BYTES
    for file in files:
        if left <= 0:
            break
        content, whole = _read(file, left)
        left -= len(content)
        digest.update(len(content).to_bytes(8, "little") + content)
        parts += _documents(file, content, whole)
    text = "\n\n".join(parts)
    return TextSource(str(path), digest.hexdigest(), lambda: text)


def _kind(file: Path) -> str | None:
    """ "lines", "plain" or None, by the name."""
    name = file.name.lower().removesuffix(".gz")
    if name.endswith(_LINES):
        return "lines"
    return "plain" if name.endswith(_PLAIN) else None


def _read(file: Path, limit: int) -> tuple[bytes, bool]:
    """At most `limit` bytes of a file, decompressed, and whether that is all."""
    try:
        opened = gzip.open(file) if file.name.lower().endswith(".gz") else file.open("rb")  # noqa: SIM115
        with opened:
            content = opened.read(limit + 1)
    except (OSError, EOFError) as error:
        raise SettingsError(f"--calibration-data: {file} cannot be read: {error}") from error
    return content[:limit], len(content) <= limit


def _documents(file: Path, content: bytes, whole: bool) -> list[str]:
    """A file's texts. A cut end (`whole` is False) is left out."""
    if b"\0" in content[:4096] or content[:4] == b"PAR1":
        raise SettingsError(
            f"--calibration-data: {file} is not text",
            hint='give plain text (UTF-8), or one JSON object a line with a field "text"; other formats: convert them',
        )
    if _kind(file) != "lines":
        try:
            return [content.decode("utf-8", "strict" if whole else "ignore")]
        except UnicodeDecodeError as error:
            raise SettingsError(f"--calibration-data: {file} is not UTF-8 text: {error}") from error
    lines = content.split(b"\n")
    if not whole:
        lines.pop()
    return [_text_of(line, file, number) for number, line in enumerate(lines, 1) if line.strip()]


def _text_of(line: bytes, file: Path, number: int) -> str:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise SettingsError(f"--calibration-data: {file}, line {number} is not JSON: {error}") from error
    text = value.get("text") if isinstance(value, dict) else None
    if not isinstance(text, str):
        raise SettingsError(
            f'--calibration-data: {file}, line {number} has no field "text" with a string',
            hint='every line is an object such as {"text": "..."}',
        )
    return text
