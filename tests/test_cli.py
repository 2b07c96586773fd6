"""The command line: help, exit codes, what the looking commands print; nothing here loads an engine."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_engines import fill as fill_engine

from appliance import __version__, cli
from appliance.profiles import load_profiles
from appliance.profiles.names import resolve as resolve_name

ROOT = Path(__file__).parent.parent
H100 = ROOT / "tests" / "hardware" / "h100-x1.yaml"


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = cli.main(words)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def config_json(tmp_path: Path) -> Path:
    """A model directory with nothing but the shape of an 8B Llama."""
    model = tmp_path / "model-8b"
    model.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
        "torch_dtype": "bfloat16",
    }
    (model / "config.json").write_text(json.dumps(config))
    return model


@pytest.mark.parametrize("command", [*cli.COMMANDS])
def test_every_command_has_help_a_person_can_read(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([command, "--help"])
    out = capsys.readouterr().out
    assert ended.value.code == 0
    assert cli.COMMANDS[command].help in " ".join(out.split())


def test_the_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    out = capsys.readouterr().out
    assert all(f"  {name}" in out for name in cli.COMMANDS)


def test_serve_is_the_default(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, _ = run(capsys, "--dry-run", "--cache", str(tmp_path), "--port", "8001", "--json")
    assert code == 0
    settings = json.loads(out)["settings"]
    assert settings["port"] == {"value": "8001", "origin": "command line (--port)"}


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["serve", "--port", "0"], 2, "--port: '0' is not allowed"),
        (["serve", "--hardware", "x"], 2, "only for --dry-run"),
        (["select", "--model", "./no-such-directory"], 4, "neither a directory here nor a hub id"),
        (["select", "--profile", "fp9"], 3, "there is no profile 'fp9'"),
        (["select", "--require-gpu", "--hardware", str(ROOT / "tests/hardware/none.yaml")], 3, "a GPU is required"),
        (["engines", "verify", "abc", "--cache", "/nonexistent/x"], 2, "no engine in"),
        (["create-model-store", "-m", str(ROOT / "tests")], 2, "is not an empty directory"),
    ],
)
def test_errors_are_one_line_with_a_hint_and_a_code(
    words: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found, out, err = run(capsys, *words)
    assert found == code and out == ""
    assert err.startswith("error: ") and message in err and len(err.splitlines()) <= 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sreve"], "there is no command 'sreve', did you mean 'serve'?"),
        (["xyz"], "there is no command 'xyz'"),
        (["serve", "--prot", "1"], "unknown argument '--prot', did you mean --port?"),
        (["serve", "--prot=1"], "did you mean --port?"),
        (["engines", "list", "--jsn"], "did you mean --json?"),
        (["--prot", "1"], "did you mean --port?"),
        (["serve", "extra"], "unknown argument 'extra'"),
        (["bench", "quality", "--isl", "7"], "unknown argument '--isl'\n  `appliance bench quality --help` lists"),
        (["select", "--zzz", "1"], "unknown argument '--zzz'\n  `appliance select --help` lists"),
        (["select", "--batch-invariant"], "--batch-invariant is not supported by the cpu backend"),
        (["select", "--attention", "flashinfer"], "attention 'flashinfer' is not supported by the cpu backend"),
        (["serve", "--port"], "argument --port: expected one argument"),
        (["engines", "lits"], "invalid choice: 'lits'"),
        (["serve", "--json"], "only for --dry-run"),
        (["bundle"], "ACTION"),
    ],
)
def test_mistyped_words_are_one_line_with_the_nearest(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capsys, *words)
    assert code == 2 and out == "" and message in err
    assert err.startswith("error: ") and len(err.splitlines()) == 2 and "usage:" not in err


def test_select_json_on_a_recorded_machine(config_json: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "select", "--json", "--hardware", str(H100), "--model", str(config_json))
    chosen = json.loads(out)
    keys = {"name", "precision", "kv_cache", "tp_size", "pp_size", "backend"}
    assert code == 0 and chosen["wanted"]["precision"] == "fp8"
    assert keys <= chosen["selected"].keys() and keys <= chosen["wanted"].keys()
    assert all(row["score"] is not None or row["reason"] for row in chosen["profiles"])
    code, out, _ = run(capsys, "select", "--hardware", str(H100), "--model", str(config_json))
    assert code == 0 and out.splitlines()[0] == chosen["selected"]["name"]
    # What a command prints is accepted back.
    again = ("select", "--json", "--hardware", str(H100), "--model", str(config_json), "--profile")
    assert json.loads(run(capsys, *again, chosen["selected"]["id"])[1])["selected"] == chosen["selected"]


def test_list_model_profiles_shape(config_json: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "list-model-profiles", "--hardware", str(H100), "--model", str(config_json))
    assert code == 0
    assert out.splitlines()[0] == "SYSTEM INFO" and "- Compatible with system and runnable:" in out


def test_select_exits_3_when_nothing_can_serve(config_json: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", str(config_json), "--precision", "bf16", "--hardware", str(ROOT / "tests/hardware/none.yaml")]
    code, _, err = run(capsys, "select", *words)
    assert code == 3 and err.startswith("error: ")
    code, out, _ = run(capsys, "select", "--json", *words)
    assert code == 3 and json.loads(out)["selected"] is None


def test_dry_run_shows_values_and_origins(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("max_num_seqs: 3\n")
    code, out, _ = run(capsys, "serve", "--dry-run", "--config", str(config), "--cache", str(tmp_path))
    rows = {line.split()[0]: line for line in out.splitlines() if line and not line.startswith("-")}
    assert code == 0
    assert rows["max_num_seqs"].split(maxsplit=2)[1:] == ["3", f"config file ({config})"]
    assert rows["precision"].split()[2] == "profile"
    assert "to be built" in rows["engine"] + out and not (tmp_path / "engines").exists()


def test_dry_run_refuses_a_node_that_would_not_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["serve", "--dry-run", "--cache", str(tmp_path), "--nnodes", "2"]
    code, out, _ = run(capsys, *words)
    assert code == 2 and "nnodes is 2, and node_rank is not set (give each node its --node-rank" in out
    assert run(capsys, *words, "--node-rank", "0")[0] == 0
    recorded = ["--hardware", str(ROOT / "tests/hardware/h200-x2.yaml")]  # of no node in particular
    assert run(capsys, *words, *recorded)[0] == 0


def test_dry_run_of_an_engine_directory_and_of_a_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = fill_engine(tmp_path / "engine")
    words = ["serve", "--dry-run", "--json", "--cache", str(tmp_path / "c"), "--model"]
    code, out, _ = run(capsys, *words, str(tmp_path / "engine"))
    found = json.loads(out)
    assert code == 0 and found["engine"] == manifest.key and found["engine_state"].startswith("given: bf16")
    source = ["--no-offline", "--engine-source", "https://user:secret@engines.invalid/x"]
    code, out, _ = run(capsys, *words, "builtin", *source)
    found = json.loads(out)
    assert code == 0 and "fetched from https://***@engines.invalid/x if it is there" in found["engine_state"]
    assert "secret" not in out and len(found["engine"]) == 64
    assert json.loads(run(capsys, *words, "builtin", *source, "--offline")[1])["engine_state"] == "to be built"
    # The id and the name that it prints are accepted back.
    for printed in (found["profile"], found["profile_id"], found["profile_id"][:12]):
        again = json.loads(run(capsys, *words, "builtin", "--profile", printed)[1])
        assert again["engine"] == found["engine"]


def test_every_profile_that_is_printed_is_accepted_back(config_json: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Names and ids of list-model-profiles, whatever their state; a few through the whole command."""
    common = ["--hardware", str(H100), "--model", str(config_json)]
    rows = re.findall(r"^  - ([0-9a-f]{64}) \(([^)]+)\)", run(capsys, "list-model-profiles", *common)[1], re.M)
    known = load_profiles()
    assert len(rows) >= 20
    for wanted, name in rows:
        found = {resolve_name(text, known) for text in (wanted, wanted[:12], name, name.upper(), f" {name} ")}
        assert len(found) == 1 and None not in found
    for wanted, name in rows[:: len(rows) // 2]:
        for text in (wanted[:12], name):
            code, out, err = run(capsys, "select", "--json", *common, "--profile", text)
            assert code in (0, 3) and json.loads(out)["wanted"]["name"] == name, err
    code, _, err = run(capsys, "select", "--profile", "fp8-tp1x", *common)
    assert code == 3 and "did you mean 'fp8-tp1'?" in err
    code, _, err = run(capsys, "select", "--profile", rows[0][0][:20] + "0000", *common)
    assert code == 3 and f"did you mean {rows[0][0][:24]!r}?" in err


def test_results_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = tmp_path / "cache"
    manifest = fill_engine(store / "engines" / ("ab" * 32))
    cache = ["--cache", str(store)]
    assert json.loads(run(capsys, "version", "--json")[1])["version"] == __version__
    (row,) = json.loads(run(capsys, "engines", "list", "--json", *cache)[1])
    assert row["precision"] == manifest.precision and row["scheme"] == manifest.scheme
    assert (row["tp_size"], row["pp_size"]) == (manifest.tp_size, manifest.pp_size)
    assert json.loads(run(capsys, "engines", "verify", "ab", "--json", *cache)[1])["files"] == len(manifest.files)
    code, _, err = run(capsys, "engines", "verify", "abababababac", *cache)
    assert code == 2 and "did you mean abababababab?" in err
    assert json.loads(run(capsys, "engines", "remove", "ab", "--json", *cache)[1]) == {"removed": "ab" * 32}
    assert json.loads(run(capsys, "doctor", "--json", *cache)[1])["checks"]
    where = ("--nnodes", "2", "--node-rank", "1", "--master-addr", "127.0.0.1", "--master-port", "1")
    assert "WARNING nodes: nobody listens at node 0's 127.0.0.1:1 yet" in run(capsys, "doctor", *where, *cache)[1]


def test_engines_list_for_people_has_model_scheme_and_ranks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from appliance.launch.prepare import prepare_engine

    for precision in ("bf16", "int8"):
        prepare_engine("builtin", precision=precision, backend="cpu", cache=tmp_path)
    damaged = tmp_path / "engines" / ("cd" * 32)
    fill_engine(damaged)
    (damaged / "engine.json").write_text("{")
    lines = run(capsys, "engines", "list", "--cache", str(tmp_path))[1].splitlines()
    shown = sorted(line.split()[3:] for line in lines)
    assert shown[0][:4] == ["appliance-builtin", "bf16", "tp1", "cpu"]
    assert shown[1][:5] == ["appliance-builtin", "int8", "(int8_smoothquant)", "tp1", "cpu"]
    assert shown[2] == ["damaged"]
    assert len({line.index("tp1") for line in lines if "tp1" in line}) == 1, "columns"


def test_engines_list_of_an_empty_cache(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert json.loads(run(capsys, "engines", "list", "--json", "--cache", str(tmp_path))[1]) == []


def test_the_command_line_imports_neither_torch_nor_the_server() -> None:
    code = (
        "import sys; from appliance import cli\n"
        "try: cli.main(['serve', '--help'])\nexcept SystemExit: pass\n"
        "print([m for m in ('torch', 'transformers', 'fastapi', 'huggingface_hub') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_entrypoint_with_a_python_that_lacks_everything(tmp_path: Path) -> None:
    """In a copy without .venv: one line that says what to do; with one: it goes on with its Python."""
    (tmp_path / "appliance").symlink_to(ROOT / "appliance")
    entry = tmp_path / "entrypoint.py"
    entry.write_text((ROOT / "entrypoint.py").read_text())
    bare = [sys.executable, "-S", str(entry), "version"]  # -S: no site-packages
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(bare, capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and done.stdout == ""
    assert "run `make install` first" in done.stderr and len(done.stderr.splitlines()) == 1
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    done = subprocess.run(bare, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and done.stdout.strip() == __version__, done.stderr
