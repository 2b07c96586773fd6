"""`appliance bench compare`: how outputs are judged, against small examples; the command itself with a tiny shape."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from appliance.bench import compare
from appliance.bench.peer import Judgement, judge
from appliance.cli import main


def test_a_token_is_judged_by_how_far_it_is_behind_the_best() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0], [4.0, 2.0, 0.0], [0.0, 0.0, 3.0]])
    found = judge(logits, torch.tensor([2, 1, 2]))
    assert (found.positions, found.same) == (3, 2)
    assert found.deficit == pytest.approx(2.0 / 2.0), "4 - 2, in deviations of 0, 2, 4, which are 2"
    assert judge(logits, torch.tensor([2, 0, 2])).deficit == 0


def test_likeness() -> None:
    ours, theirs = [[1, 2, 3, 4], [5, 6, 7, 8]], [[1, 2, 3, 4], [5, 0, 7, 0]]
    assert compare._likeness(ours, theirs) == {"equal_tokens": 0.75, "equal_outputs": 0.5}
    assert compare._likeness(ours, None) == {"equal_tokens": None, "equal_outputs": None}


def test_agreement_is_of_the_worst_token() -> None:
    judged = [Judgement(10, 10, 0.0), Judgement(10, 7, 0.3)]
    assert compare._agreement(judged, 0.4) == {"agreement": 0.85, "worst_deficit": 0.3, "agrees": True}
    assert compare._agreement(judged, 0.2)["agrees"] is False


def test_with_random_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--shape", "tiny", "--backend", "cpu", "--work", str(tmp_path), "--isl", "12", "--osl", "6"]
    assert main(["bench", "compare", *options, "--batch-sizes", "1,3", "--judged", "2", "--repeats", "1"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["agrees"] and result["shape"] == "tiny" and result["peer_dtype"] == "float32"
    assert [row["batch"] for row in result["rows"]] == [1, 3]
    for row in result["rows"]:
        ours = row["ours"]["bf16"]
        assert ours["equal_tokens"] == ours["equal_outputs"] == ours["agreement"] == 1.0, "both compute in float32"
        assert ours["worst_deficit"] < 1e-3
        ratio = ours["tokens_per_second"] / row["transformers_tokens_per_second"]
        assert ours["ratio"] == pytest.approx(ratio, rel=0.05)
    # Outputs of another engine: what it finds different ends with another exit code.
    real = compare.driver.run

    def wrong(*arguments: object, **more: object) -> compare.driver.Timing:
        timing = real(*arguments, **more)  # type: ignore[arg-type]
        timing.token_ids = {name: [(t + 7) % 1024 for t in ids] for name, ids in timing.token_ids.items()}
        return timing

    monkeypatch.setattr(compare.driver, "run", wrong)
    assert main(["bench", "compare", *options, "--batch-sizes", "2", "--repeats", "1"]) == 1
    out = capsys.readouterr().out
    assert "DIFFERENT OUTPUTS: bf16 at batch 2" in out and json.loads(out.splitlines()[-1])["agrees"] is False


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ("--with onnx", 2, "--with is 'onnx'; allowed: transformers"),
        ("--batch-sizes 8 --max-num-seqs 4", 2, "--batch-sizes is '8'; it needs numbers up to --max-num-seqs, 4"),
        ("--batch-sizes=", 2, "it needs numbers up to --max-num-seqs, 256"),
        ("--osl 1", 2, "--output-len is 1; it must be at least 2"),
        ("--shape huge", 2, "--shape is 'huge'"),
        ("--precision fp7", 2, "--precision is 'fp7'"),
        ("--model ./nothing-here", 4, "nothing-here"),
    ],
)
def test_mistakes_are_one_clear_line(
    arguments: str, code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "compare", *arguments.split()]) == code
    assert message in capsys.readouterr().err


def test_an_engine_is_no_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "engine.json").write_text("{}")
    assert main(["bench", "compare", "--model", str(tmp_path)]) == 2
    assert "is an engine; transformers needs the checkpoint" in capsys.readouterr().err


@pytest.mark.gpu
def test_on_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--shape", "tiny", "--work", str(tmp_path), "--isl", "16", "--osl", "16", "--batch-sizes", "1,4"]
    assert main(["bench", "compare", *options, "--max-num-seqs", "4"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["peer_dtype"] == "bfloat16" and all(row["ours"]["bf16"]["agrees"] for row in result["rows"])
