"""The tokenizer of a checkpoint into its engine: copied, or converted once to tokenizer.json where there is none.

After this, serving needs no transformers. Knows nothing of weights.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from appliance.checkpoint.config import read_json
from appliance.checkpoint.files import TOKENIZER_FILES
from appliance.errors import CheckpointError


def copy_tokenizer(source: Path, engine_dir: Path) -> str | None:
    """Fill engine_dir/tokenizer. Returns a note for people if there was something to say: converted, or none there.

    Raises CheckpointError for a tokenizer that asks for its own code, or that transformers cannot convert.
    """
    found = [name for name in TOKENIZER_FILES if (source / name).is_file()]
    if not found:
        return "the checkpoint has no tokenizer: requests must be token ids"
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
        raise CheckpointError(
            f"the tokenizer of {source} ({', '.join(found)}) cannot be converted to tokenizer.json: {error}",
            hint="save it once with AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)",
        ) from error
    if not (target / "tokenizer.json").is_file():
        raise CheckpointError(
            f"the tokenizer of {source} ({', '.join(found)}) has no fast form, so there is no tokenizer.json",
            hint="use a checkpoint with a tokenizer.json",
        )
    return f"tokenizer.json converted from {', '.join(found)}"
