"""How `bench serve` shows its figures to people."""

from __future__ import annotations

from typing import Any

from appliance.bench.report import Table, say

_BUSY = 0.7  # share of a core from which on a client process may add to what it measures
_ROWS = {
    "ttft_ms": "to the first token",
    "tpot_ms": "per token behind the first, mean of a request",
    "itl_ms": "gap between tokens",
    "e2e_ms": "whole request",
}


def show(result: dict[str, Any]) -> None:
    """Latencies, then rates, then what is to be known of the measurement itself."""
    table = Table("milliseconds", "mean", "p50", "p90", "p99", "max")
    for key, name in _ROWS.items():
        _row(table, name, result[key])
    steady = result["steady"]
    if steady:
        _row(table, "gap while the load was whole", steady["itl_ms"])
    if long := result.get("long_prompts"):
        _row(table, "long prompts, to the first token", long["ttft_ms"])
    table.show(f"{result['completed']} requests completed, {result['errors']} failed, in {result['seconds']:.1f} s")
    say(
        f"output {_number(result['output_tokens_per_second'])} tokens/s, {_number(result['requests_per_second'])} "
        f"requests/s, p99 gap over median {_number(result['itl_p99_over_median'])}"
    )
    if steady:
        say(
            f"while the load was whole ({steady['seconds']:.1f} s): {_number(steady['output_tokens_per_second'])} "
            f"tokens/s, p99 gap over median {_number(steady['itl_p99_over_median'])}"
        )
    if (each := result.get("output_tokens_per_second_per_rank")) is not None:
        ranks = result["tp_size"] * result["pp_size"]
        say(
            f"{result['replicas']} replica(s) of {ranks} rank(s): {_number(each)} output tokens/s a rank, "
            f"{_number(result['steady_tokens_per_second_per_rank'])} while the load was whole"
        )
    if (ratio := result.get("predicted_ratio")) is not None:  # else nothing was measured
        predicted = result["predicted_tokens_per_second"]
        say(f"the selection predicts {_number(predicted)} output tokens/s with all running, {ratio:.2f} times as many")
    if goodput := result.get("goodput"):
        limits = ", ".join(f"{name.removesuffix('_ms')} {value:g} ms" for name, value in goodput["limits"].items())
        share = "-" if goodput["share"] is None else f"{goodput['share']:.1%}"
        say(f"goodput within {limits}: {_number(goodput['requests_per_second'])} requests/s, {share} of the requests")
    if "http_over_offline" in result:
        offline = result["offline"]["output_tokens_per_second"]
        say(f"without HTTP {_number(offline)} output tokens/s; through HTTP {result['http_over_offline']:.1%} of that")
    _show_measurement(result)


def _show_measurement(result: dict[str, Any]) -> None:
    client, shares = result["client"], result["server_cpu_share"]
    busy = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
    say(
        f"processors: {f'{busy}, ' if busy else ''}busiest of {client['processes']} client processes "
        f"{client['cpu_share_of_busiest']:.0%} of a core each"
    )
    if client["cpu_share_of_busiest"] > _BUSY:
        say("the clients are near their own limit: raise --processes, or these figures are theirs and not the server's")
    if (result["tokens_per_event"] or 1.0) > 1.02:
        say(f"{result['tokens_per_event']:.2f} tokens came with each event: gaps are between events")
    for problem in result["problems"]:
        say(f"error: {problem}")


def _row(table: Table, name: str, values: dict[str, float] | None) -> None:
    cells = ["-"] * 5 if values is None else [f"{values[key]:,.2f}" for key in ("mean", "p50", "p90", "p99", "max")]
    table.row(name, *cells)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.2f}" if value < 100 else f"{value:,.0f}"
