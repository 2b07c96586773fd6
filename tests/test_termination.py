"""How a process ends: exit codes of the command line, and the reason in the termination log."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from appliance import errors, termination
from appliance.cli import COMMANDS, Command, main
from appliance.errors import ApplianceError, CacheNotWritableError, RequestError, SettingsError
from appliance.settings import termination_log

ROOT = Path(__file__).parents[1]


def test_codes_of_different_causes_differ() -> None:
    """The causes that operators tell apart each have a code of their own, and errors.py's drawing says so."""
    causes = [
        errors.SettingsError,
        errors.HardwareError,
        errors.CheckpointError,
        errors.CacheNotWritableError,
        errors.NoSpaceError,
        errors.EngineBuildError,
        errors.EngineCrashedError,
    ]
    assert [cause.exit_code for cause in causes] == [2, 3, 4, 5, 6, 7, 8]
    drawn = dict(re.findall(r"(\w+Error) +exit (\d)", errors.__doc__ or ""))
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, ApplianceError)]
    assert drawn == {kind.__name__: str(kind.exit_code) for kind in kinds if not issubclass(kind, RequestError)}


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (SettingsError("the port is taken", hint="choose\nanother"), "the port is taken\nchoose another\n"),
        (CacheNotWritableError("no"), "no\n"),
        (ValueError("odd"), "ValueError: odd\n"),
        (RuntimeError(), "RuntimeError\n"),
        ("the loop is stuck", "the loop is stuck\n"),
    ],
)
def test_reason_and_hint(tmp_path: Path, error: BaseException | str, text: str) -> None:
    path = tmp_path / "termination-log"
    termination.write(error, path)
    assert not path.exists(), "only where Kubernetes made it"
    path.touch()
    termination.write(error, path)
    assert path.read_text() == text


def test_reason_is_cut_where_kubernetes_would(tmp_path: Path) -> None:
    path = tmp_path / "termination-log"
    path.touch()
    termination.write("é" * 5000, path)
    assert path.stat().st_size == 4096


def test_path_is_known_though_other_settings_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    assert termination_log({"port": "nine"}) == Path("/dev/termination-log")
    monkeypatch.setenv("APPLIANCE_TERMINATION_LOG", "/x/log")
    assert termination_log({"port": "nine"}) == Path("/x/log")
    assert termination_log({"port": "nine", "termination_log": "/y/log"}) == Path("/y/log")
    assert termination_log({}) == Path("/x/log")


def test_command_line_leaves_the_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "termination-log"
    path.touch()
    assert main(["--port", "nine", "--termination-log", str(path)]) == 2
    assert path.read_text() == "--port: 'nine' is not allowed\nallowed: a whole number from 1 to 65535\n"
    assert path.read_text().splitlines()[0] in capsys.readouterr().err


def test_unexpected_failure_leaves_the_reason_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "termination-log"
    path.touch()

    def fail(args: object) -> int:
        raise LookupError("who knows")

    for name in ("build", "select"):
        monkeypatch.setitem(COMMANDS, name, Command("", COMMANDS[name].add_arguments, fail))
    monkeypatch.setenv("APPLIANCE_TERMINATION_LOG", str(path))
    with pytest.raises(LookupError):
        main(["select"])
    assert path.read_text() == "", "a command that looks into a container says nothing of why it ended"
    with pytest.raises(LookupError):
        main(["build"])
    assert path.read_text() == "LookupError: who knows\n"


def test_server_leaves_the_reason(tmp_path: Path) -> None:
    path = tmp_path / "termination-log"
    path.touch()
    command = [sys.executable, "entrypoint.py", "--model", str(tmp_path / "none"), "--cache", str(tmp_path / "cache")]
    command += ["--termination-log", str(path), "--host", "127.0.0.1", "--port", "18479"]
    ended = subprocess.run(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, timeout=60)
    assert ended.returncode == 4, ended.stderr
    reason = path.read_text().splitlines()
    assert str(tmp_path / "none") in reason[0] and len(reason) == 2, "what was wrong, and what to do"
