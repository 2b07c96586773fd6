"""What selection, doctor and lists of profiles say of a quantized checkpoint, and the bytes predicted for it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from quantized_checkpoints import gptq, gptq_section
from selection_cases import FULL, LLAMA_8B, choose
from test_quantized_checkpoints import make, with_tokenizer
from test_quantized_refusals import LLAMA

from appliance import cli, profiles
from appliance.doctor.model import check_model
from appliance.errors import CheckpointError, ProfileError
from appliance.settings import load
from appliance.types import ModelConfig, Quantization

HARDWARE = Path(__file__).parent / "hardware"


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gptq")
    make(path, gptq(32), gptq_section(32))
    return with_tokenizer(path)


def test_commands_say_what_a_checkpoint_is(quantized: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, gpu = str(quantized), ("--hardware", str(HARDWARE / "a100-80gb-x1.yaml"))
    assert cli.main(["select", "--model", path, *gpu, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["model"]["quantization"]["method"] == "gptq" and told["selected"]["precision"] == "int4"
    assert cli.main(["list-model-profiles", "--model", path, *gpu]) == 0
    listed = capsys.readouterr().out
    assert "already quantized to int4 (gptq, groups of 32), which only int4 profiles serve" in listed
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"quantization_config": {"quant_method": "hqq"}}))
    assert cli.main(["select", "--model", str(tmp_path), *gpu]) == CheckpointError.exit_code
    assert "quantized with 'hqq', allowed: compressed-tensors" in capsys.readouterr().err


def test_the_doctor_says_what_a_checkpoint_is(quantized: Path, tmp_path: Path) -> None:
    settings = load({"model": str(quantized), "cache": str(tmp_path)}, {})
    assert check_model(settings)[0].message.endswith("already quantized to int4 (gptq, groups of 32)")


def test_a_checkpoint_is_judged_without_torch(quantized: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from appliance.checkpoint import read_model_config; "
        "assert read_model_config(Path(sys.argv[1])).quantization is not None; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program, str(quantized)], check=True, cwd=HARDWARE.parent.parent)


def llama_8b(**facts: Any) -> ModelConfig:
    values = {"method": "gptq", "layout": "gptq", "precision": "int4", "group_size": 128, "unquantized": ("lm_head",)}
    return msgspec.structs.replace(LLAMA_8B, quantization=Quantization(**(values | facts)))


FP8_FACTS = {"method": "modelopt", "layout": "fp8", "precision": "fp8", "group_size": 0}
INT8_FACTS = {"method": "compressed-tensors", "layout": "int-quantized", "precision": "int8", "group_size": 0}


@pytest.mark.parametrize(
    ("hardware", "facts", "selected"),
    [
        ("h200-x1", {}, "int4-tp1"),
        ("a100-80gb-x1", {}, "int4-tp1"),
        ("t4", {}, "int4-tp1"),
        ("h200-x1", FP8_FACTS, "fp8-tp1"),
        ("l40s", FP8_FACTS, "fp8-tp1"),
        ("h200-x1", INT8_FACTS, "int8-tp1"),
        ("a100-80gb-x1", INT8_FACTS, "int8-tp1"),
    ],
)
def test_a_quantized_checkpoint_is_served_as_it_is(hardware: str, facts: dict[str, Any], selected: str) -> None:
    selection = choose(hardware, llama_8b(**facts), build=FULL)
    assert profiles.require(selection).name == selected
    told = [line for line in profiles.reasons(selection) if "already quantized" in line]
    assert len(told) == 1 and "is served as it is: only" in told[0]
    assert {o.precision for o in selection.outcomes if o.status == "runnable"} == {facts.get("precision", "int4")}
    others = [o for o in selection.outcomes if o.profile == "bf16"]
    assert others and all("already quantized to" in (o.reason or "") for o in others)


def test_fp8_where_there_is_none() -> None:
    with pytest.raises(
        ProfileError, match=r"quantized to fp8 \(modelopt, fp8\); fp8 needs compute capability 8.9"
    ) as e:
        profiles.require(choose("a100-80gb-x1", llama_8b(**FP8_FACTS), build=FULL))
    assert "original, unquantized" in str(e.value.hint)


def test_another_precision_is_refused() -> None:
    with pytest.raises(ProfileError, match=r"quantized to int4 \(gptq, groups of 128\), which only int4") as caught:
        profiles.require(choose("h200-x1", llama_8b(), build=FULL, precision="bf16"))
    assert "leave --precision" in str(caught.value.hint)


def test_bytes_follow_from_what_the_checkpoint_is() -> None:
    def weights(**facts: Any) -> int:
        outcomes = choose("h200-x1", llama_8b(**facts), build=FULL).outcomes
        memory = next(outcome.memory for outcome in outcomes if outcome.name == "int4-tp1")
        assert memory is not None
        return memory.weights

    layers = 32 * (4096 * 6144 + 4096 * 4096 + 3 * 4096 * 14336)
    down, group = 4096 * 14336, 4  # weights of a layer's product; bytes of a scale and a zero point
    head_and_embedding = 2 * 2 * 128256 * 4096
    assert weights() == pytest.approx(layers // 2 + layers // 128 * group + head_and_embedding, rel=1e-3)
    assert weights(group_size=32) - weights() == layers // 32 * group - layers // 128 * group
    assert weights(act_order=True) - weights() == 32 * 4 * (3 * 4096 + 14336)
    plain = weights(unquantized=("layers.3.mlp.down", "layers.4.mlp.down", "lm_head"))
    assert plain - weights() == 2 * (2 * down - down // 2 - down // 128 * group)
    assert weights(unquantized=("layers.*.mlp.down", "lm_head")) - weights() == 16 * (plain - weights())


def test_a_checkpoint_brings_its_own_groups() -> None:
    """INT4 profiles want multiples of 128, the groups that a build makes; smaller groups go with other dimensions."""
    odd = msgspec.structs.replace(llama_8b(group_size=32), intermediate_size=14336 + 32)
    assert profiles.require(choose("a100-80gb-x1", odd, build=FULL)).name == "int4-tp1"
    with pytest.raises(ProfileError, match="int4 needs multiples of 128"):
        larger = msgspec.structs.replace(llama_8b(), intermediate_size=14336 + 32)
        profiles.require(choose("a100-80gb-x1", larger, build=FULL))
    with pytest.raises(ProfileError, match=r"intermediate_size per rank is 192 .*bf16, or a smaller --tp-size\)"):
        narrow = msgspec.structs.replace(llama_8b(), intermediate_size=768)
        profiles.require(choose("a100-80gb-x4", narrow, build=FULL, tp_size=4))
    own = msgspec.structs.replace(odd, quantization=None)
    assert profiles.require(choose("a100-80gb-x1", own, build=FULL)).name != "int4-tp1"
