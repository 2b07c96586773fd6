"""The floors that benchmarks compare with, against arithmetic done by hand."""

from __future__ import annotations

import msgspec
import pytest
import torch

from appliance.bench.ceilings import measure_ceilings
from appliance.bench.floors import Ceilings, Floors
from appliance.bench.shapes import shape_config

CONFIG = shape_config("llama-3.1-8b")
LAYERS, HEAD = 6_979_321_856, 525_336_576  # parameters of an 8B Llama's linear layers, and of its output layer


def floors(*, linear: float = 1e18, attention: float = 1e18) -> Floors:
    return Floors(CONFIG, Ceilings(4e12, linear, attention), weight_bytes=7_500_000_000, kv_token_bytes=131072)


def test_decode_reads_weights_and_cache() -> None:
    assert floors().weights == pytest.approx(7.5e9 / 4e12)
    assert floors().decode(1, 0) == pytest.approx(7.5e9 / 4e12)
    assert floors().decode(64, 1000) == pytest.approx((7.5e9 + 64 * 1000 * 131072) / 4e12)


def test_decode_of_many_is_bound_by_products() -> None:
    expected = 2 * 256 * (LAYERS + HEAD) / 1e12 + 4 * 256 * 100 * 4096 * 32 / 1e14
    assert floors(linear=1e12, attention=1e14).decode(256, 100) == pytest.approx(expected)


def test_prefill_counts_each_pair_of_tokens_once_and_the_head_once_a_prompt() -> None:
    expected = 2 * (8 * 4096 * LAYERS + 8 * HEAD) / 1.5e15 + 8 * 32 * 4 * (4096 * 4097 / 2) * 4096 / 8e14
    assert floors(linear=1.5e15, attention=8e14).prefill(8, 4096) == pytest.approx(expected)
    assert 8 * 4096 / expected == pytest.approx(93_000, rel=0.05), "what h200.md calls about 100,000 tokens/s"
    assert floors().prefill(1, 1) == floors().weights, "a short prompt still reads every weight"


def test_a_window_limits_what_is_read() -> None:
    config = msgspec.structs.replace(CONFIG, sliding_window=512, sliding_window_layers=tuple(range(16)))
    half = msgspec.structs.replace(CONFIG, sliding_window=512)
    some, every = (Floors(c, Ceilings(4e12, 1e18, 1e15), 0, 131072) for c in (config, half))
    assert every.decode(4, 2048) == pytest.approx(4 * 512 * 131072 / 4e12)
    assert some.decode(4, 2048) == pytest.approx(4 * (512 + 2048) / 2 * 131072 / 4e12)
    pairs = 512 * 513 / 2 + 512 * (2048 - 512)
    assert every.prefill(1, 2048) == pytest.approx(2 * (2048 * LAYERS + HEAD) / 1e18 + 4 * pairs * 4096 * 32 / 1e15)


def test_throughput_is_prefill_and_full_steps() -> None:
    found = floors(linear=1e15, attention=1e15).throughput(512, 1024, 129, max_num_seqs=256)
    each = floors(linear=1e15, attention=1e15)
    assert found == pytest.approx(each.prefill(512, 1024) + 2 * 128 * each.decode(256, 1024 + 64.5))


def test_ceilings_are_measured_here() -> None:
    found = measure_ceilings(torch.device("cpu"), "fp8")
    assert 1e8 < found.bandwidth < 1e13
    assert found.linear_rate == found.attention_rate > 1e8, "the CPU computes everything in float32"


@pytest.mark.gpu
def test_ceilings_of_a_gpu() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    found = measure_ceilings(device, "fp8")
    assert found.bandwidth > 1e10 and found.attention_rate > 1e12
    if torch.cuda.get_device_capability(device) >= (8, 9):
        assert found.linear_rate > found.attention_rate
