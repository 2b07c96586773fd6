"""The built-in model: a small Llama that the project trains itself, and the tasks that it is measured on.

Importing this package imports no torch. `tasks` (standard library only) generates and scores samples, `tokenizer`
trains the byte-level BPE, `train` makes the checkpoint that `checkpoint_dir()` names.
"""

from __future__ import annotations

from pathlib import Path

MODEL_NAME = "appliance-builtin"


def checkpoint_dir() -> Path:
    """Hugging Face directory of the shipped checkpoint, which `python -m appliance.builtin.train` writes."""
    return Path(__file__).resolve().parent / "model"
