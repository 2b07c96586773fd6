"""Shell completion: commands, flags and values as a shell asks for them, and code that shells can evaluate."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from appliance.cli import COMMANDS

ROOT = Path(__file__).parent.parent


def complete(line: str, tmp_path: Path) -> list[str]:
    """What the shell would be offered behind `line`."""
    answer = tmp_path / "answer"
    environment = {
        **os.environ,
        "_ARGCOMPLETE": "1",
        "_ARGCOMPLETE_SHELL": "bash",
        "_ARGCOMPLETE_STDOUT_FILENAME": str(answer),
        "_ARGCOMPLETE_IFS": "\n",
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
        "COMP_TYPE": "9",
        "APPLIANCE_CACHE": str(tmp_path / "cache"),
    }
    done = subprocess.run(
        [sys.executable, str(ROOT / "entrypoint.py")], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout == "", done.stderr
    return [word.strip() for word in answer.read_text().splitlines()]


def test_commands_flags_and_values(tmp_path: Path) -> None:
    assert set(complete("appliance ", tmp_path)) >= set(COMMANDS)
    assert complete("appliance serve --max-num-b", tmp_path) == ["--max-num-batched-tokens"]
    assert complete("appliance --max-num-b", tmp_path) == ["--max-num-batched-tokens"], "serve is the default"
    assert complete("appliance engines pub", tmp_path) == ["publish"]
    assert complete("appliance serve --log-level W", tmp_path) == ["WARNING"]
    assert "fp8-tp1" in complete("appliance select --profile fp8", tmp_path)
    assert complete("appliance serve --model bui", tmp_path) == ["builtin"]
    key = "ab" * 32
    (tmp_path / "cache" / "engines" / key).mkdir(parents=True)
    assert complete("appliance engines verify a", tmp_path) == [key]


def test_numbers_are_not_completed_with_files(tmp_path: Path) -> None:
    (tmp_path / "8000.txt").touch()
    assert complete("appliance serve --port 8", tmp_path) == []
    assert complete("appliance serve --config 8", tmp_path) == ["8000.txt"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_code_is_what_the_shell_takes(shell: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "entrypoint.py"), "completion", shell], capture_output=True, text=True
    )
    assert done.returncode == 0 and "appliance" in done.stdout, done.stderr
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell} here: its code is printed, not evaluated")
    script = tmp_path / "code"
    script.write_text(done.stdout)
    checked = subprocess.run([shell, "-n", str(script)], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr


def test_bash_completes_with_it(tmp_path: Path) -> None:
    """The code, evaluated by a bash, whose completion function then asks the program."""
    (tmp_path / "appliance").write_text(f'#!/bin/sh\nexec "{sys.executable}" "{ROOT / "entrypoint.py"}" "$@"\n')
    (tmp_path / "appliance").chmod(0o755)
    script = """
    eval "$(appliance completion bash)"
    COMP_WORDS=(appliance serve --max-num-s) COMP_CWORD=2 COMP_LINE='appliance serve --max-num-s'
    COMP_POINT=${#COMP_LINE} COMP_TYPE=9
    function=$(complete -p appliance | sed -E 's/.*-F ([^ ]+).*/\\1/')
    $function appliance --max-num-s serve
    printf '%s\\n' "${COMPREPLY[@]}"
    """
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.split() == ["--max-num-seqs"], done.stderr
