"""The tokenizer of a checkpoint into its engine: copied, or converted once to tokenizer.json where there is none.

After this, serving needs no transformers. Knows nothing of weights.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from appliance.checkpoint.config import read_json
from appliance.checkpoint.files import TOKENIZER_FILES, require_tokenizer
from appliance.engines import disk
from appliance.errors import CheckpointError


def copy_tokenizer(source: Path, engine_dir: Path) -> str | None:
    """Fill engine_dir/tokenizer. Returns a note for people if there was something to say: that it was converted.

    Raises CheckpointError if there is no tokenizer, or one that asks for its own code or that transformers cannot
    convert.
    """
    require_tokenizer(source)
    found = [name for name in TOKENIZER_FILES if (source / name).is_file()]
    target = engine_dir / "tokenizer"
    target.mkdir()
    if "tokenizer.json" in found:
        for name in found:
            shutil.copyfile(source / name, target / name)
        return None
    if read_json(source / "tokenizer_config.json", required=False).get("auto_map"):
        raise CheckpointError(
            f"the tokenizer of {source} asks to run its own code (auto_map), which is never done here",
            hint="save it once as tokenizer.json where you trust it",
        )
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, local_files_only=True)
        tokenizer.save_pretrained(target)
    except Exception as error:
        if disk.is_full(error):
            raise
        raise CheckpointError(
            f"the tokenizer of {source} ({', '.join(found)}) cannot be converted to tokenizer.json: "
            + _first_line(error),
            hint="save it once with AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)",
        ) from error
    if not (target / "tokenizer.json").is_file():
        raise CheckpointError(
            f"the tokenizer of {source} ({', '.join(found)}) has no fast form, so there is no tokenizer.json",
            hint="use a checkpoint with a tokenizer.json",
        )
    return f"tokenizer.json converted from {', '.join(found)}"


def _first_line(error: Exception) -> str:
    """The library's messages go on for many lines about other reasons there might be."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
