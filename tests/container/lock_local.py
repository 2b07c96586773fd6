"""`python lock_local.py FILE`: a lock of what this Python's pip would install of the project, from where it looks.

For images of other indexes than the public one (torch for the CPU, a mirror): one hash per package, of the file that
pip chooses for this Python and platform. The hashes are as trustworthy as the index that is asked; later builds get
these files or fail. Knows pip's report; the lock for GPUs is `make lock`'s.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
EXTRAS = "pinned,otel"


def resolve(project: Path) -> list[dict[str, Any]]:
    """What pip would install, from its report. Raises CalledProcessError, with pip's words on stderr."""
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.json"
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed"]
        subprocess.run([*pip, "--report", str(report), f"{project}[{EXTRAS}]"], check=True, cwd=scratch)
        found: list[dict[str, Any]] = json.loads(report.read_text())["install"]
    return found


def lines(installed: list[dict[str, Any]]) -> list[str]:
    """A line per package, sorted; the project itself, which is no archive, is left out."""
    archives = [item for item in installed if "archive_info" in item["download_info"]]
    return sorted(
        f"{item['metadata']['name'].lower()}=={item['metadata']['version']}"
        f" --hash=sha256:{item['download_info']['archive_info']['hashes']['sha256']}"
        for item in archives
    )


if __name__ == "__main__":
    Path(sys.argv[1]).write_text("\n".join(lines(resolve(ROOT))) + "\n", encoding="utf-8")
