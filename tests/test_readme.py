"""README.md against the code: its tables say what the program has, and its commands exist with the flags they use."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path

import pytest
import readme_sizes
from server_fakes import ready_state

from appliance import errors
from appliance.cli import COMMANDS, make_parser
from appliance.server import routes_chat, routes_completions, routes_meta
from appliance.settings import specs

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    """The text below a heading, up to the next of its level or above."""
    match = re.search(rf"^(#+) {re.escape(title)}\n(.*?)(?=^#{{1,2}} |\Z)", README, re.M | re.S)
    assert match, f"README has no section {title!r}"
    return match[2]


def first_column(text: str) -> list[str]:
    """What stands in backquotes in the first cell of each row of the tables in a text."""
    cells = [line.split("|")[1] for line in text.splitlines() if line.startswith("|")]
    return [name for cell in cells for name in re.findall(r"`([^`]+)`", cell)]


def settings_table() -> str:
    """The table that README's section "Settings" must hold; a failing test prints it, ready to paste."""
    lines: list[str] = []
    group = ""
    for spec in specs().values():
        if spec.group != group:
            group = spec.group
            lines += ["", f"**{group}**", "", "| flag | variable | also | default | meaning |", "|---|---|---|---|---|"]
        shown = str(spec.default).lower() if spec.kind is bool else spec.default
        default = "" if spec.default in (None, ()) else f"`{shown}`"
        also = ", ".join(f"`{name.lstrip('!')}`" + (" (inverted)" if name[0] == "!" else "") for name in spec.also)
        allowed = f"; {spec.allowed}" if spec.choices or spec.limits else ""
        flag = spec.flag if spec.kind is not bool else f"--[no-]{spec.flag[2:]}"
        lines.append(f"| `{flag}` | `{spec.variable}` | {also} | {default} | {spec.help}{allowed} |")
    return "\n".join(lines).strip()


def test_settings_table() -> None:
    assert settings_table() in README, f"README's table of settings should be:\n\n{settings_table()}"


def test_what_is_said_of_several_gpus_is_what_the_backend_says() -> None:
    now = readme_sizes.built()
    for path, sentence in readme_sizes.SENTENCES:
        text, wanted = path.read_text(encoding="utf-8"), sentence(*now)
        others = {sentence(tp, pp) for tp in (1, 2, 4, 8) for pp in (1, 2, 4, 8)} - {wanted, ""}
        said = wanted in text and not any(other in text for other in others if other not in wanted)
        assert said, "run: .venv/bin/python tests/readme_sizes.py update"


def test_commands_are_all_there() -> None:
    assert first_column(section("Commands")) == list(COMMANDS)


def test_command_lines_are_accepted(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = "".join(re.findall(r"^```sh\n(.*?)^```", README, re.M | re.S)) + "\n".join(
        re.findall(r"`(\./.+?)`", README)
    )
    lines = re.findall(r"\./entrypoint\.py ([^#\n]+)", blocks.replace("\\\n", " "))
    assert len(lines) >= 8
    for line in lines:
        words = shlex.split(re.split(r" [|&>]", line)[0])
        try:
            make_parser(words[0]).parse_args(words)
        except SystemExit as error:
            assert error.code == 0, f"{line}: {capsys.readouterr().err}"


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    named = set(re.findall(r"(?:^|`)make ([a-z-]+)", README, re.M))
    assert {"serve", "test"} <= named <= targets


def test_endpoints_are_served() -> None:
    routers = [module.router for module in (routes_chat, routes_completions, routes_meta)]
    served = {f"{method} {route.path}" for router in routers for route in router.routes for method in route.methods}
    served.add("GET /openapi.json")  # FastAPI's own
    listed = [name for name in first_column(section("Endpoints")) if " /" in name]
    assert set(listed) == {name.replace("{name:path}", "{name}") for name in served}


async def test_metrics_exist() -> None:
    state, _engine = await ready_state()
    state.metrics.profile, state.metrics.engine_cache_hit = {"name": "bf16-tp1"}, True
    state.metrics.replica_phases = lambda: ["ready"]
    known = set(re.findall(r"^# TYPE (\S+)", state.metrics.render().decode(), re.M))
    listed = [name for cell in first_column(section("Metrics")) for name in cell.split()]
    assert len(set(listed)) == len(listed) >= 15
    assert set(listed) == {name for name in known if not name.startswith("process_")}


def test_exit_codes() -> None:
    listed = {int(code) for code in first_column(section("Exit codes")) if code.isdecimal()}
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    assert {getattr(kind, "exit_code", 1) for kind in kinds} | {0} == listed


def test_dependencies() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = project["dependencies"] + [
        line for extra in ("cuda", "otel") for line in project["optional-dependencies"][extra]
    ]
    names = {re.match(r"[A-Za-z0-9_-]+", line)[0] for line in wanted}  # type: ignore[index]
    assert set(first_column(section("Dependencies"))) == names


@pytest.mark.parametrize("document", ["README.md", "appliance/README.md", "profiles/README.md"])
def test_links_lead_somewhere(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    targets = [t for t in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in t]
    missing = [target for target in targets if not (ROOT / document).parent.joinpath(target).exists()]
    assert not missing
