"""What the documents say of several GPUs, as the `cuda` backend's literal has it (`max_tp`, `max_pp`).

`python tests/readme_sizes.py update` writes the sentences again after that was changed; test_readme.py compares.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run as a script, also where the project is not installed

from appliance import registry  # noqa: E402

_ON_CPU = "On the CPU, `--tp-size` and `--pp-size` up to 4 run, a process per rank."


def state(tp: int, pp: int) -> str:
    if tp == 1:
        return "on one GPU, on several as replicas, or on the CPU"
    stages = f", pipeline parallel over up to {pp}" if pp > 1 else ""
    return f"on one GPU, on several (tensor parallel over up to {tp}{stages}; replicas), or on the CPU"


def missing(tp: int, pp: int) -> str:
    """A line of the list of what is not there yet; empty if nothing of this lacks."""
    if tp == 1:
        return (
            "- More than one GPU per copy of a model: tensor- and pipeline-parallel sizes other than 1 are refused on "
            f"GPUs; more GPUs today mean replicas. {_ON_CPU}\n"
        )
    return f"- Pipeline stages on GPUs: `--pp-size` over 1, and so `--nnodes`, is refused there. {_ON_CPU}\n" * (
        pp == 1
    )


def not_offered(tp: int, pp: int) -> str:
    """The beginning of the architecture's sentence."""
    if tp == 1:
        lacking = "more than one rank and more than one stage are written but not offered (`max_tp`, `max_pp`"
        return f"Not there: on GPUs, {lacking} of `backends/cuda.py`); "
    lacking = "on GPUs, more than one stage is written but not offered (`max_pp` of `backends/cuda.py`); "
    return "Not there: " + lacking * (pp == 1)


SENTENCES = [
    (ROOT / "README.md", state),
    (ROOT / "README.md", missing),
    (ROOT / "appliance" / "README.md", not_offered),
]
_SIZES = [(tp, pp) for tp in (8, 4, 2, 1) for pp in (8, 4, 2, 1)]


def built() -> tuple[int, int]:
    facts = registry.plugins("backends")["cuda"].facts
    return facts["max_tp"], facts["max_pp"]


def update() -> None:
    for path, sentence in SENTENCES:
        text, wanted = path.read_text(encoding="utf-8"), sentence(*built())
        known = sorted({sentence(*size) for size in _SIZES} - {""}, key=len, reverse=True)  # some begin like others
        old = next((found for found in known if found in text), None)
        if old is None and wanted:
            sys.exit(f"{path}: none of the known sentences is there; wanted: {wanted}")
        path.write_text(text.replace(old, wanted) if old else text, encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:] != ["update"]:
        sys.exit("usage: python tests/readme_sizes.py update")
    update()
