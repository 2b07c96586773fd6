"""What cannot be quantized, or is quantized in a way that cannot be served, at the command line: one clear line with
what is wrong and what is allowed, the right exit code, and nothing built."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from quantized_checkpoints import awq, awq_section, compressed, gptq, gptq_section
from safetensors.torch import load_file, save_file
from test_quantized_checkpoints import make, with_tokenizer
from torch import Tensor

from appliance import builtin
from appliance.checkpoint import Checkpoint
from appliance.checkpoint.scale_numbers import check_scale_numbers
from appliance.cli import main
from appliance.errors import CheckpointError, ProfileError, SettingsError

torch.set_num_threads(2)

Run = Callable[..., tuple[int, str]]
DOWN = "model.layers.1.mlp.down_proj"


@pytest.fixture
def build(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """`appliance build` with these arguments: its exit code, and its one line of error with the hint behind it. Nothing
    may be left in the cache that looks like an engine."""

    def run(model: Path | str, *arguments: str) -> tuple[int, str]:
        cache = tmp_path / "cache"
        code = main(["build", "--model", str(model), "--backend", "cpu", "--cache", str(cache), *arguments])
        errors = capsys.readouterr().err.splitlines()
        at = next(i for i, line in enumerate(errors) if line.startswith("error: "))
        assert not list((cache / "engines").glob("**/engine.json"))
        assert not list((cache / "engines").glob("**/*.safetensors"))
        return code, " ".join(line.strip() for line in errors[at:])

    return run


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A sound quantized checkpoint of a layout, made once."""
    kinds = {
        "awq": lambda: (awq(), awq_section()),
        "gptq": lambda: (gptq(), gptq_section()),
        "int8": lambda: compressed("int-quantized"),
        "fp8": lambda: compressed("float-quantized"),
    }
    known: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in known:
            known[kind] = tmp_path_factory.mktemp(kind)
            make(known[kind], *kinds[kind]())
            with_tokenizer(known[kind])
        return known[kind]

    return get


def changed(checkpoint: Path, path: Path, config: Callable[[dict[str, object]], object]) -> Path:
    """A copy whose config.json was changed."""
    shutil.copytree(checkpoint, path)
    values = json.loads((path / "config.json").read_text())
    config(values)
    (path / "config.json").write_text(json.dumps(values))
    return path


def with_tensor(checkpoint: Path, path: Path, name: str, change: Callable[[Tensor], object]) -> Path:
    """A copy one tensor of which was changed in place."""
    shutil.copytree(checkpoint, path)
    tensors = load_file(path / "model.safetensors")
    tensors[name] = tensors[name].clone()
    change(tensors[name])
    save_file(tensors, path / "model.safetensors")
    return path


# ---------------------------------------------------------------- by their configuration


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"quant_method": "hqq"}, ["quantized with 'hqq'", "allowed: compressed-tensors, awq, gptq"]),
        (
            {"quant_method": "awq", "bits": 3, "group_size": 128, "zero_point": True, "version": "gemm"},
            ["AWQ in 3 bits"],
        ),
        (awq_section(96), ["group_size 96", "allowed: 32, 64, 128"]),
    ],
)
def test_an_unknown_layout(
    checkpoints: Callable[[str], Path], tmp_path: Path, build: Run, section: dict[str, object], words: list[str]
) -> None:
    path = changed(checkpoints("awq"), tmp_path / "other", lambda c: c.update(quantization_config=section))
    code, error = build(path)
    assert code == CheckpointError.exit_code and [word for word in words if word not in error] == [], error
    assert not (tmp_path / "cache" / "digests").exists(), "it was hashed before anybody looked"


def test_groups_that_do_not_divide(tmp_path: Path, build: Run) -> None:
    """In a checkpoint that says so, and in a plain one that INT4 was asked for."""
    path = tmp_path / "odd"
    make(path, gptq(32), gptq_section(32), config={"intermediate_size": 224})
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"]["group_size"] = 128
    (path / "config.json").write_text(json.dumps(config))
    code, error = build(with_tokenizer(path))
    assert code in (ProfileError.exit_code, CheckpointError.exit_code) and "128" in error and "224" in error, error
    plain = tmp_path / "plain"
    shutil.copytree(builtin.checkpoint_dir(), plain)
    values = json.loads((plain / "config.json").read_text()) | {"intermediate_size": 700}
    (plain / "config.json").write_text(json.dumps(values))
    code, error = build(plain, "--precision", "int4")
    assert code == ProfileError.exit_code and "needs multiples of 128" in error and "700" in error, error


# ---------------------------------------------------------------- by their numbers


@pytest.mark.parametrize(
    ("kind", "name", "value", "words"),
    [
        ("awq", f"{DOWN}.scales", 0.0, "a scale is 0"),
        ("gptq", f"{DOWN}.scales", float("nan"), "a scale is NaN"),
        ("int8", f"{DOWN}.weight_scale", float("inf"), "a scale is infinite"),
        ("fp8", f"{DOWN}.weight_scale", 0.0, "a scale is 0"),
    ],
)
def test_scales_that_are_none(
    checkpoints: Callable[[str], Path], tmp_path: Path, build: Run, kind: str, name: str, value: float, words: str
) -> None:
    path = with_tensor(checkpoints(kind), tmp_path / "bad", name, lambda t: t.view(-1)[5].fill_(value))
    code, error = build(path)
    assert code == CheckpointError.exit_code and name in error and words in error, error
    assert not (tmp_path / "cache" / "digests").exists(), "it was hashed before anybody looked"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_scales_are_looked_at_in_any_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    sound = {"a.scales": torch.rand(3, 5).to(dtype) + 0.5, "b.input_scale": torch.tensor(0.25, dtype=dtype)}
    for number, (name, value, words) in enumerate(
        [("a.scales", float("-inf"), "-inf"), ("b.input_scale", float("nan"), "NaN"), ("a.scales", 0.0, "0")]
    ):
        file = tmp_path / f"{number}.safetensors"
        save_file(sound, file)
        with Checkpoint(file) as checkpoint:
            check_scale_numbers(checkpoint)
        bad = {key: tensor.clone() for key, tensor in sound.items()}
        bad[name].view(-1)[-1] = value
        save_file(bad, file)
        with Checkpoint(file) as checkpoint, pytest.raises(CheckpointError, match=rf"{name} .*a scale is {words},"):
            check_scale_numbers(checkpoint)


@pytest.mark.parametrize("precision", ["fp8", "int8", "int4"])
def test_weights_that_are_not_finite(tmp_path: Path, build: Run, precision: str) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    path = with_tensor(builtin.checkpoint_dir(), tmp_path / "bad", name, lambda t: t[3, 4].fill_(float("nan")))
    code, error = build(path, "--precision", precision)
    assert code in (CheckpointError.exit_code, 7) and ("NaN" in error or "not finite" in error), error


# ---------------------------------------------------------------- text for calibration


@pytest.mark.parametrize("precision", ["int4", "int8"])
def test_too_little_text(tmp_path: Path, build: Run, precision: str) -> None:
    text = tmp_path / "short.txt"
    text.write_text("Too short to calibrate with. " * 3)
    code, error = build("builtin", "--precision", precision, "--calibration-data", str(text))
    assert code == SettingsError.exit_code, error
    assert "the calibration text is too short" in error and "tokens" in error and "--calibration-data" in error, error


def test_no_text_at_all(tmp_path: Path, build: Run) -> None:
    code, error = build("builtin", "--precision", "int4", "--calibration-data", str(tmp_path / "nothing.txt"))
    assert code == CheckpointError.exit_code and "nothing.txt" in error and "allowed: a file, a directory" in error
    (tmp_path / "empty").mkdir()
    code, error = build("builtin", "--precision", "int4", "--calibration-data", str(tmp_path / "empty"))
    assert code == SettingsError.exit_code and "empty" in error, error
