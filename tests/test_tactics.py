"""Timed tactics: the table that products consult, and the tuner that fills it, with fake tactics and a fake timer."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from appliance.builder import timings as timings_module
from appliance.builder.tactics import Tuner, describe
from appliance.builder.timings import Timings
from appliance.engines.manifest import TimedTactic
from appliance.kernels.tactics import ROW_BUCKETS, TABLE, Tactic, Tactics, TacticTable, row_bucket
from appliance.layers.linear import Linear
from appliance.quantization import unquantized
from appliance.runtime.loading import use_tactics

N, K = 32, 16


@pytest.fixture(autouse=True)
def empty_table() -> Iterator[None]:
    TABLE.clear()
    yield
    TABLE.clear()


class Scheme(unquantized.Scheme):
    """Products in several ways; `ran` lists the names of those that were run."""

    def __init__(self, names: Sequence[str] = ("library", "skinny a", "skinny b")) -> None:
        super().__init__()
        self.names = list(names)
        self.ran: list[str] = []

    def apply(self, tensors, x, bias, dtype):  # type: ignore[no-untyped-def]
        n, k = tensors["weight"].shape
        tactic = TABLE.find("fake", n, k, len(x), lambda rows: self.tactics(n, k, rows, x.device))
        return (tactic or self._tactic("library"))(tensors, x, bias, dtype)

    def tactics(self, out_features: int, in_features: int, rows: int, device: torch.device) -> Tactics:
        return {name: self._tactic(name) for name in self.names}

    def _tactic(self, name: str) -> Tactic:
        def run(tensors, x, bias, dtype):  # type: ignore[no-untyped-def]
            self.ran.append(name)
            if name == "broken":
                raise RuntimeError("no kernel image\nis available")
            return F.linear(x, tensors["weight"]) * (1.5 if name == "wrong" else 1.0)

        return run


class Model(nn.Module):
    """Two layers of one shape, and one of another."""

    def __init__(self, scheme: Scheme) -> None:
        super().__init__()
        self.first = nn.ModuleDict({"qkv": make_layer(scheme, N, K)})
        self.second = nn.ModuleDict({"qkv": make_layer(scheme, N, K)})
        self.lm_head = make_layer(scheme, 64, K)


def make_layer(scheme: Scheme, n: int, k: int) -> Linear:
    layer = Linear(k, n, bias=False, scheme=scheme, dtype=torch.float32)
    layer.load_state_dict({"weight": torch.randn(n, k)})
    layer.prepare()
    return layer


def make_tuner(
    scheme: Scheme, costs: Callable[[str, int], float], cache: Path | None = None, **options: object
) -> Tuner:
    """`costs(tactic, rows)` are its µs."""

    def timer(calls: Sequence[Callable[[], object]], launches: int) -> float:
        assert len(calls) >= 1 and launches >= 1
        out = calls[0]()
        assert isinstance(out, torch.Tensor)
        return costs(scheme.ran[-1], len(out))

    known = Timings(cache, "Test GPU 80GB")
    device = torch.device("cpu")
    return Tuner(torch.float32, device, known, timer=timer, threads=2, **options)  # type: ignore[arg-type]


# ---------------------------------------------------------------- the table


def test_rows_go_to_the_next_larger_choice() -> None:
    table = TacticTable()
    offered: list[int] = []

    def tactics(rows: int) -> Tactics:
        offered.append(rows)
        return {"library": lambda *args: "library", "skinny": lambda *args: "skinny"}

    def found(rows: int, n: int = N) -> object:
        tactic = table.find("fake", n, K, rows, tactics)
        return tactic and tactic({}, None, None, torch.float32)

    assert found(4) is None and not offered, "nothing was timed"
    table.choose("fake", N, K, 8, "skinny")
    table.choose("fake", N, K, 64, "library")
    assert [found(rows) for rows in (1, 8, 9, 64, 65, 100_000)] == ["skinny"] * 2 + ["library"] * 2 + [None] * 2
    assert found(4, n=48) is None and table.find("other", N, K, 4, tactics) is None
    asked = len(offered)
    assert found(7) == found(5) == "skinny" and len(offered) == asked, "resolved once for a bucket"
    table.choose("fake", N, K, 8, "gone")
    assert found(3) is None and table.unknown == {"gone"}
    table.clear()
    assert found(64) is None and not table.unknown


def test_row_buckets() -> None:
    assert [row_bucket(rows) for rows in (0, 1, 3, 64, 65, 8192, 8193)] == [1, 1, 4, 64, 128, 8192, None]


# ---------------------------------------------------------------- the tuner


def costs(name: str, rows: int) -> float:
    """The library is the better the more rows there are."""
    return {"library": 20.0, "skinny a": 10.0 + rows / 8, "skinny b": 9.0 + rows}[name]


class Quantizing(Scheme):
    """Inputs are made by a kernel of their own."""

    made = 0

    def tactic_input(self, x: Tensor) -> Tensor:
        self.made += 1
        return x.clone()


def test_products_of_few_rows_are_timed_between_the_kernels_in_front_of_them() -> None:
    """What is told is the product's time: 2 µs of the kernel between are taken off."""
    scheme = Quantizing()
    launched: dict[int, list[str]] = {}

    def timer(calls: Sequence[Callable[[], object]], launches: int) -> float:
        made, ran = scheme.made, len(scheme.ran)
        out = calls[0]()
        assert isinstance(out, Tensor)
        kernels = ["between"] * (scheme.made - made) + scheme.ran[ran:]
        launched.setdefault(len(out), []).append(" ".join(kernels))
        return 2.0 * (scheme.made - made) + (costs(scheme.ran[-1], len(out)) if len(scheme.ran) > ran else 0.0)

    tuner = Tuner(torch.float32, torch.device("cpu"), Timings(None, "Test GPU 80GB"), timer=timer, threads=1)
    chosen = {c.rows: c for c in tuner.tune(Model(scheme)) if c.product == "qkv"}
    assert set(launched[64]) == {"between", "between library", "between skinny a", "between skinny b"}
    assert set(launched[1024]) == {"library", "skinny a", "skinny b"}, "beyond, a launch is not seen"
    assert (chosen[8].microseconds, chosen[1024].microseconds) == (11.0, 20.0)


def test_the_quickest_is_chosen_said_and_used(caplog: pytest.LogCaptureFixture) -> None:
    scheme = Scheme()
    model = Model(scheme)
    with caplog.at_level(logging.INFO, "appliance.builder.tactics"):
        chosen = make_tuner(scheme, costs).tune(model)
    by_rows = {choice.rows: choice for choice in chosen if choice.product == "qkv"}
    assert tuple(by_rows) == ROW_BUCKETS
    assert [by_rows[rows].tactic for rows in (1, 2, 64, 128, 8192)] == ["skinny b", "skinny a", "skinny a"] + [
        "library"
    ] * 2
    assert (by_rows[8].runner_up, by_rows[8].runner_up_microseconds) == ("skinny b", 17.0)
    assert "tactics: qkv 32x16 m=8: skinny a 11.0 µs, runner-up skinny b 17.0 µs" in caplog.messages
    logits = [choice.rows for choice in chosen if choice.product == "lm_head"]
    assert max(logits) == 512, "logits are of one token per sequence"

    scheme.ran.clear()
    x = torch.randn(50, K)
    assert torch.allclose(model.second["qkv"](x), F.linear(x, model.second["qkv"]._prepared["weight"]))
    model.second["qkv"](torch.randn(300, K))
    assert scheme.ran == ["skinny a", "library"] and TABLE.probe is None


def test_an_engine_brings_its_choices() -> None:
    choice = TimedTactic("qkv", "fake", N, K, 8, "skinny b", 9.0, "library", 20.0)
    assert describe(choice) == "qkv 32x16 m=8: skinny b 9.0 µs, runner-up library 20.0 µs"
    TABLE.choose("fake", N, K, 64, "left by another engine")
    manifest = SimpleNamespace(tactics=(choice,), build=SimpleNamespace(gpu="Test GPU"))
    use_tactics(manifest)  # type: ignore[arg-type]
    scheme = Scheme()
    layer = make_layer(scheme, N, K)
    layer(torch.randn(5, K))
    layer(torch.randn(64, K))
    assert scheme.ran == ["skinny b", "library"]


def test_what_fails_or_differs_is_left_out(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    names = ("library", "broken", "wrong")
    for _ in range(2):  # the second time from what was remembered
        scheme = Scheme(names)
        tuner = make_tuner(scheme, lambda name, rows: 5.0 if name == "library" else 1.0, tmp_path)
        chosen = tuner.tune(Model(scheme))
        assert {choice.tactic for choice in chosen} == {"library"} and not any(choice.runner_up for choice in chosen)
    assert "broken is left out: RuntimeError: no kernel image" in caplog.text
    assert "wrong is left out: ArithmeticError: differs from the default by 0.5" in caplog.text
    assert caplog.text.count(": broken is left out") == 2, "once for each shape"


def test_timings_are_remembered_per_gpu_and_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scheme = Scheme()
    first = make_tuner(scheme, costs, tmp_path)
    chosen = first.tune(Model(scheme))
    assert first.measured == len(chosen) * 3
    second = make_tuner(scheme, lambda name, rows: pytest.fail("it is known"), tmp_path)
    assert second.tune(Model(scheme)) == chosen and second.measured == 0
    scheme.names.append("skinny c")
    third = make_tuner(scheme, lambda name, rows: 0.5 if name == "skinny c" else 99.0, tmp_path)
    assert {choice.tactic for choice in third.tune(Model(scheme))} == {"skinny c"}
    assert third.measured == len(chosen), "only what is new"

    (file,) = (tmp_path / "timings").iterdir()
    assert file.name.startswith("test-gpu-80gb-")
    monkeypatch.setattr(timings_module, "code_version", lambda: "torch 9")
    assert Timings(tmp_path, "Test GPU 80GB").path != file
    monkeypatch.undo()
    file.write_text("{broken")
    assert Timings(tmp_path, "Test GPU 80GB").get("qkv", "library") is None


def test_two_builds_at_once_keep_both_their_timings(tmp_path: Path) -> None:
    one, two = Timings(tmp_path, "GPU"), Timings(tmp_path, "GPU")
    one.put("qkv", "library", 1.0)
    two.put("qkv", "skinny", 2.0)
    one.save()
    two.save()
    kept = Timings(tmp_path, "GPU")
    assert (kept.get("qkv", "library"), kept.get("qkv", "skinny"), kept.get("o", "skinny")) == (1.0, 2.0, None)
    (tmp_path / "file").write_text("")
    blocked = Timings(tmp_path / "file", "GPU")
    blocked.put("qkv", "library", 1.0)
    blocked.save()  # says so and goes on


def test_time_that_runs_out_leaves_the_rest_to_the_default(caplog: pytest.LogCaptureFixture) -> None:
    now = 0.0

    def slow(name: str, rows: int) -> float:
        nonlocal now
        now += 1.0
        return costs(name, rows)

    scheme = Scheme()
    tuner = make_tuner(scheme, slow, seconds=20.0, clock=lambda: now)
    rows = {choice.rows for choice in tuner.tune(Model(scheme))}
    assert rows == {1, 64}, "single requests and full batches first"
    assert "out of time, 2 of 14 row counts timed" in caplog.text
    assert TABLE.chosen("fake", N, K, 65) is None


def test_only_the_best_of_a_family_are_timed_again() -> None:
    scheme = Scheme(["library", *(f"skinny {i:02}" for i in range(20))])
    tuner = make_tuner(scheme, lambda name, rows: 100.0 if name == "library" else float(name[-2:]) + 1)
    counts: dict[int, int] = {}
    timed = tuner._time_product

    def counting(product, rows, tactics):  # type: ignore[no-untyped-def]
        counts[rows] = len(tactics)
        return timed(product, rows, tactics)

    tuner._time_product = counting  # type: ignore[method-assign]
    assert {choice.tactic for choice in tuner.tune(Model(scheme))} == {"skinny 00"}
    assert counts.pop(1) == counts.pop(64) == 21
    assert set(counts.values()) == {7}, "six of the family, and the library's"
