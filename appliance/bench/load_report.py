"""What client processes saw, as figures: latencies, rates, goodput. Pure functions of records.

Terms: TTFT, from when a request was due to its first token. Gap (inter-token latency), between consecutive events with
tokens of one stream. TPOT, a request's mean time per token behind the first. Steady: the time in which all clients of a
closed loop stream or wait for their next request, that is from the latest first token of a client's first request to
the earliest end of a client's last one; of an open loop, from the first arrival to the last.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from appliance.bench.load import ClientResult, Record

MAIN, LONG = "load", "long prompts"  # names of flows


@dataclass(frozen=True)
class Limits:
    """What makes a request good; None: no limit. Milliseconds."""

    ttft_ms: float | None = None
    tpot_ms: float | None = None
    itl_ms: float | None = None  # of 99% of a request's gaps

    @property
    def given(self) -> bool:
        return (self.ttft_ms, self.tpot_ms, self.itl_ms) != (None, None, None)

    def met(self, record: Record) -> bool:
        within = self.ttft_ms is None or record.ttft * 1e3 <= self.ttft_ms
        within &= self.tpot_ms is None or record.tpot * 1e3 <= self.tpot_ms
        gaps = record.gaps
        return within and (self.itl_ms is None or not gaps or float(np.percentile(gaps, 99)) * 1e3 <= self.itl_ms)


def summarize(results: Sequence[ClientResult], limits: Limits) -> dict[str, Any]:
    """Everything for the JSON line. Latencies are milliseconds, None where nothing was there to measure."""
    records = [record for result in results for record in result.records if record.flow == MAIN]
    good = [record for record in records if _well(record)]
    problems = {record.error or "no tokens came" for record in records if not _well(record)}
    begin, end = (min(r.start for r in records), max(r.end for r in records)) if records else (0.0, 0.0)
    seconds = end - begin
    tokens = sum(record.output_tokens for record in good)
    events = sum(len(record.events) for record in good)
    gaps = [gap for record in good for gap in record.gaps]
    summary: dict[str, Any] = {
        "requests": len(records),
        "completed": len(good),
        "errors": len(records) - len(good),
        "problems": sorted(problems)[:3],
        "seconds": round(seconds, 3),
        "input_tokens": sum(record.input_len for record in good),
        "output_tokens": tokens,
        "output_tokens_per_second": _rate(tokens, seconds),
        "requests_per_second": _rate(len(good), seconds),
        "tokens_per_event": round(tokens / events, 4) if events else None,
        "ttft_ms": percentiles([record.ttft for record in good]),
        "tpot_ms": percentiles([record.tpot for record in good if record.output_tokens > 1]),
        "itl_ms": percentiles(gaps),
        "itl_p99_over_median": spread(gaps),
        "e2e_ms": percentiles([record.end - record.start for record in good]),
    }
    summary["steady"] = steady(results, tokens / events if events else 1.0)
    if limits.given:
        within = sum(limits.met(record) for record in good)
        summary["goodput"] = {
            "limits": {k: v for k, v in vars(limits).items() if v is not None},
            "requests_per_second": _rate(within, seconds),
            "share": round(within / len(records), 4) if records else None,
        }
    long = [record for result in results for record in result.records if record.flow == LONG]
    if long:
        fine = [record for record in long if _well(record)]
        summary["long_prompts"] = {
            "completed": len(fine),
            "errors": len(long) - len(fine),
            "ttft_ms": percentiles([record.ttft for record in fine]),
        }
    return summary


def steady(results: Sequence[ClientResult], tokens_per_event: float) -> dict[str, Any] | None:
    """Gaps and output rate while the load was whole, and, where long prompts came, from the first of them to the last
    one's end. None if there was no such time."""
    window = _window(results)
    if window is None:
        return None
    begin, end = window
    gaps: list[float] = []
    events = 0
    for record in (record for result in results for record in result.records if record.flow == MAIN):
        inside = [at for at in record.events if begin <= at <= end]
        events += len(inside)
        gaps += [after - before for before, after in pairwise(inside)]
    return {
        "seconds": round(end - begin, 3),
        "output_tokens_per_second": _rate(events * tokens_per_event, end - begin),
        "itl_ms": percentiles(gaps),
        "itl_p99_over_median": spread(gaps),
    }


def _window(results: Sequence[ClientResult]) -> tuple[float, float] | None:
    clients: dict[tuple[int, int], list[Record]] = {}
    arrivals: list[float] = []
    for result in results:
        for record in result.records:
            if record.flow != MAIN or not record.events:
                continue
            if record.client >= 0:
                clients.setdefault((result.process, record.client), []).append(record)
            else:
                arrivals.append(record.start)
    if clients:
        begin = max(min(own, key=lambda r: r.start).events[0] for own in clients.values())
        end = min(max(record.end for record in own) for own in clients.values())
    elif arrivals:
        begin, end = min(arrivals), max(arrivals)
    else:
        return None
    long = [r for result in results for r in result.records if r.flow == LONG and r.events and r.start >= begin]
    if long:
        begin, end = max(begin, min(r.start for r in long)), min(end, max(r.end for r in long))
    return (begin, end) if end > begin else None


def client_load(results: Sequence[ClientResult]) -> dict[str, Any]:
    """What the client processes cost themselves: a share near 1 means that they were measured and not the server."""
    lags = [lag for result in results for lag in result.lags]
    return {
        "processes": len(results),
        "cpu_share_of_busiest": round(max(r.cpu_seconds / r.wall_seconds for r in results), 3),
        "cpu_seconds": round(sum(result.cpu_seconds for result in results), 2),
        "timer_lag_ms": percentiles(lags),
        "latest_send_ms": round(max((r.late for result in results for r in result.records), default=0.0) * 1e3, 2),
    }


def percentiles(seconds: Sequence[float]) -> dict[str, float] | None:
    """Milliseconds: mean, p50, p90, p99, max."""
    if not seconds:
        return None
    values = np.asarray(seconds) * 1e3
    p50, p90, p99 = np.percentile(values, (50, 90, 99))
    found = {"mean": values.mean(), "p50": p50, "p90": p90, "p99": p99, "max": values.max()}
    return {name: round(float(value), 3) for name, value in found.items()}


def spread(gaps: Sequence[float]) -> float | None:
    """99th percentile over median; None where most events came together with the one before."""
    if not gaps:
        return None
    median, p99 = np.percentile(np.asarray(gaps), (50, 99))
    return round(float(p99 / median), 3) if median > 0 else None


def _well(record: Record) -> bool:
    return not record.error and bool(record.events)


def _rate(count: float, seconds: float) -> float | None:
    return round(count / seconds, 2) if seconds > 0 else None
