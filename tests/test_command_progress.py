"""Progress of commands: a bar on a terminal and nothing of it in a pipe; results on stdout alone."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import threading
from pathlib import Path

from hub_layout import put_into_hub

from appliance import builtin
from appliance.commands.progress import amount_of

ROOT = Path(__file__).parent.parent


def on_a_terminal(*words: str) -> tuple[int, str, str]:
    """Exit code, stdout, and what a terminal as stderr got."""
    ours, theirs = pty.openpty()
    shown = bytearray()

    def read() -> None:
        try:
            while data := os.read(ours, 65536):
                shown.extend(data)
        except OSError:  # the other end is closed
            pass

    reader = threading.Thread(target=read)
    reader.start()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100"}
    command = [sys.executable, str(ROOT / "entrypoint.py"), *words]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=theirs, text=True, env=environment)
    os.close(theirs)
    reader.join(20)
    os.close(ours)
    return done.returncode, done.stdout, shown.decode()


def test_a_bar_on_a_terminal_and_the_result_on_stdout(tmp_path: Path) -> None:
    cache, file = tmp_path / "cache", tmp_path / "b"
    put_into_hub(builtin.checkpoint_dir(), cache)
    words = ["bundle", "export", str(file), "--model", "org/tiny", "--offline", "--no-engine", "--cache", str(cache)]
    code, out, shown = on_a_terminal(*words)
    assert code == 0 and out == f"{file}\n"
    assert "hashing" in shown and "writing" in shown and "━" in shown and "%" in shown
    piped = subprocess.run([sys.executable, str(ROOT / "entrypoint.py"), *words], capture_output=True, text=True)
    assert piped.returncode == 0 and piped.stdout == f"{file}\n" and "━" not in piped.stderr


def test_building_shows_its_phases_and_log_lines_stay_whole(tmp_path: Path) -> None:
    code, out, shown = on_a_terminal("build", "-p", "bf16-cpu-tp1", "--cache", str(tmp_path))
    assert code == 0 and Path(out.strip()).parent == tmp_path / "engines", shown
    assert "building:" in shown and "━" in shown
    lines = [line for line in shown.replace("\x1b[2K", "").splitlines() if "profile bf16-cpu-tp1 (id " in line]
    assert lines and lines[0].rstrip().endswith("says why")


def test_amounts() -> None:
    assert amount_of(1 << 30, 3 << 30, 20.4) == "1.0 GiB of 3.0 GiB, 20 s left"
    assert amount_of(0, 0, None) == "" and amount_of(0, 0, 3.0) == "3 s left"
