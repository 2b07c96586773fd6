"""Counts and times of serving, exposed under vLLM's names and NIM's names from one set of numbers.

Plain Python numbers on the hot path (an observation is a bisect and two additions) and a collector that turns them into
Prometheus families when someone scrapes. Knows nothing of HTTP or of the engine process.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from appliance.types import EngineInfo, EngineStats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_TTFT_BUCKETS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0)
_TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.5, 1.0)
_E2E_BUCKETS = (0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 60.0, 120.0, 480.0)
_COUNTERS = ("num_preemptions", "prefix_cache_queries", "prefix_cache_hits")  # of EngineStats
_COUNT_BUCKETS = tuple(float(m * 10**e) for e in range(6) for m in (1, 2, 5))


class Distribution:
    """A histogram: `counts[i]` observations in (bounds[i-1], bounds[i]], the last count for those above all bounds."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.total = 0.0

    def observe(self, value: float, count: int = 1) -> None:
        """`count` observations of the same value."""
        self.counts[bisect_left(self.bounds, value)] += count
        self.total += value * count

    def buckets(self) -> list[tuple[str, float]]:
        """Cumulative, as Prometheus wants them: (upper bound, observations at or below it)."""
        labels = [str(float(bound)) for bound in self.bounds] + ["+Inf"]
        return list(zip(labels, map(float, accumulate(self.counts))))


class ServerMetrics:
    """All numbers of one server. `model_name` is the label value of every per-model series."""

    def __init__(self, model_name: str) -> None:
        self.model_name = model_name
        self.prompt_tokens = 0
        self.generation_tokens = 0
        self.cached_prompt_tokens = 0
        self.resubmitted = 0
        self.engine_restarts = 0
        self.rejected: Counter[str] = Counter()  # by OpenAI error code, before acceptance
        self.finished: Counter[str] = Counter()  # by finish reason
        self.time_to_first_token = Distribution(_TTFT_BUCKETS)
        self.inter_token = Distribution(_TOKEN_BUCKETS)
        self.time_per_output_token = Distribution(_TOKEN_BUCKETS)  # mean of one request
        self.e2e = Distribution(_E2E_BUCKETS)
        self.queue_time = Distribution(_E2E_BUCKETS)
        self.prefill_time = Distribution(_E2E_BUCKETS)
        self.decode_time = Distribution(_E2E_BUCKETS)
        self.request_prompt_tokens = Distribution(_COUNT_BUCKETS)
        self.request_generation_tokens = Distribution(_COUNT_BUCKETS)
        self.in_flight: Callable[[], int] = lambda: 0  # set by the journal
        self.phase_seconds: Callable[[], dict[str, float]] = dict  # set by the server state
        self.max_requests: Callable[[], int] = lambda: 0  # set by the journal
        self.profile: dict[str, str] = {}  # labels of profile_info
        self.engine_cache_hit: bool | None = None  # the engine was found and not built; None: not known yet
        self.engines: dict[int, EngineInfo] = {}  # what the newest engine of each replica said of itself
        self.in_flight_on: Callable[[int], int] = lambda replica: 0  # set by the journal
        self.replica_phases: Callable[[], list[str]] = list  # set by the launcher where there are several
        self._stats: dict[int, EngineStats] = {}  # of each replica's engine
        self._lost: Counter[str] = Counter()  # totals of engines that are gone: their counters began at 0
        self._restarts: Counter[int] = Counter()  # by replica
        self.registry = CollectorRegistry()
        self.registry.register(_ServerCollector(self))
        ProcessCollector(registry=self.registry)

    # ------------------------------------------------------------ what happens

    def engine_stats(self, stats: EngineStats, replica: int = 0) -> None:
        self._stats[replica] = stats

    def engine_lost(self, replica: int = 0) -> None:
        self.engine_restarts += 1
        self._restarts[replica] += 1
        stats = self._stats.pop(replica, EngineStats())
        self._lost.update({name: getattr(stats, name) for name in _COUNTERS})

    def stats_of(self, replica: int) -> EngineStats:
        """What its engine said last; zeros before it said anything."""
        return self._stats.get(replica, EngineStats())

    def restarts_of(self, replica: int) -> int:
        return self._restarts[replica]

    def request_started(
        self, num_prompt_tokens: int, num_cached_tokens: int, seconds: float, queue_seconds: float
    ) -> None:
        """The first token of a request is there, `seconds` after its arrival, `queue_seconds` of which it waited."""
        self.queue_time.observe(queue_seconds)
        self.prefill_time.observe(max(seconds - queue_seconds, 0.0))
        self.prompt_tokens += num_prompt_tokens
        self.generation_tokens += 1
        self.cached_prompt_tokens += num_cached_tokens
        self.time_to_first_token.observe(seconds)

    def tokens(self, seconds: float, count: int) -> None:
        """`count` further tokens, of any requests, each `seconds` after the one before."""
        if count:
            self.generation_tokens += count
            self.inter_token.observe(seconds, count)

    def request_finished(
        self, reason: str, num_prompt_tokens: int, num_tokens: int, seconds: float, decode_seconds: float
    ) -> None:
        """`seconds` since arrival; `decode_seconds` between its first and its last token."""
        self.finished[reason] += 1
        self.e2e.observe(seconds)
        self.request_prompt_tokens.observe(num_prompt_tokens)
        self.request_generation_tokens.observe(num_tokens)
        if num_tokens:
            self.decode_time.observe(decode_seconds)
        if num_tokens > 1:
            self.time_per_output_token.observe(decode_seconds / (num_tokens - 1))

    # ------------------------------------------------------------ what is exposed

    @property
    def num_running(self) -> int:
        return min(sum(stats.num_running for stats in self._stats.values()), self.in_flight())

    @property
    def num_waiting(self) -> int:
        """Accepted and not running: queued in an engine, on the way there, or held while it restarts."""
        return self.in_flight() - self.num_running

    def running_on(self, replica: int) -> int:
        return min(self.stats_of(replica).num_running, self.in_flight_on(replica))

    @property
    def kv_cache_usage(self) -> float:
        """Of all replicas' pages."""
        pages = {replica: info.num_pages for replica, info in self.engines.items()} or {0: 1}
        return sum(self.kv_cache_usage_of(replica) * count for replica, count in pages.items()) / sum(pages.values())

    def kv_cache_usage_of(self, replica: int) -> float:
        # Stats come with outputs only; with nothing in flight no page is referenced, whatever the last ones said.
        return self.stats_of(replica).kv_cache_usage if self.in_flight_on(replica) else 0.0

    def _total(self, counter: str) -> int:
        """Over all engines of this process, those that are gone included."""
        return self._lost[counter] + sum(int(getattr(stats, counter)) for stats in self._stats.values())

    @property
    def num_preemptions(self) -> int:
        return self._total("num_preemptions")

    @property
    def prefix_cache(self) -> tuple[int, int]:
        """Prompt tokens looked up and found."""
        return self._total("prefix_cache_queries"), self._total("prefix_cache_hits")

    def render(self) -> bytes:
        """Prometheus text format."""
        return generate_latest(self.registry)


class _ServerCollector(Collector):
    def __init__(self, metrics: ServerMetrics) -> None:
        self._metrics = metrics

    def describe(self) -> Iterable[Metric]:
        return []  # or the registry would collect at registration, before the callables are set

    def collect(self) -> Iterable[Metric]:
        m = self._metrics
        labels = {"model_name": m.model_name}
        queries, hits = m.prefix_cache
        yield from _gauge(labels, m.num_running, "Requests in the running batch.", "num_requests_running")
        yield from _gauge(labels, m.num_waiting, "Requests waiting to run.", "num_requests_waiting")
        usage_help = "Share of the KV cache's pages in use, 1 is all."
        yield from _gauge(labels, m.kv_cache_usage, usage_help, "gpu_cache_usage_perc")
        yield from _plain_gauge("vllm:kv_cache_usage_perc", usage_help, labels, m.kv_cache_usage)
        yield from _plain_gauge(
            "num_request_max", "Requests accepted at the same time at most.", labels, m.max_requests()
        )
        yield from _counter(labels, m.prompt_tokens, "Prompt tokens of requests that started.", "prompt_tokens")
        yield from _counter(labels, m.generation_tokens, "Tokens generated.", "generation_tokens")
        yield _count("vllm:prompt_tokens_cached", "Prompt tokens not computed again.", labels, m.cached_prompt_tokens)
        yield _count("vllm:num_preemptions", "Preemptions by lack of KV-cache pages.", labels, m.num_preemptions)
        yield _count("vllm:prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", labels, queries)
        yield _count("vllm:prefix_cache_hits", "Prompt tokens found in the prefix cache.", labels, hits)
        yield _count("engine_restarts", "Engine processes lost.", labels, m.engine_restarts)
        yield _count("requests_resubmitted", "Requests handed to a restarted engine.", labels, m.resubmitted)
        yield from self._histograms(labels)
        yield from self._by_label(labels)
        yield from self._replicas(labels)
        yield from self._startup()

    def _histograms(self, labels: dict[str, str]) -> Iterable[Metric]:
        m = self._metrics
        for distribution, text, names in (
            (m.time_to_first_token, "Seconds to the first token.", _both("time_to_first_token_seconds")),
            (
                m.inter_token,
                "Seconds between two tokens of a request.",
                ("vllm:inter_token_latency_seconds", *_both("time_per_output_token_seconds")),
            ),
            (
                m.time_per_output_token,
                "Mean seconds per token of a request, after its first.",
                ("vllm:request_time_per_output_token_seconds",),
            ),
            (m.e2e, "Seconds from arrival to the last token.", _both("e2e_request_latency_seconds")),
            (m.queue_time, "Seconds before the first step of a request.", ("vllm:request_queue_time_seconds",)),
            (m.prefill_time, "Seconds from there to its first token.", ("vllm:request_prefill_time_seconds",)),
            (m.decode_time, "Seconds from there to its last token.", ("vllm:request_decode_time_seconds",)),
            (m.request_prompt_tokens, "Prompt tokens of a request.", _both("request_prompt_tokens")),
            (m.request_generation_tokens, "Tokens generated for a request.", _both("request_generation_tokens")),
        ):
            for name in names:
                family = HistogramMetricFamily(name, text, labels=list(labels))
                family.add_metric(list(labels.values()), distribution.buckets(), distribution.total)
                yield family

    def _by_label(self, labels: dict[str, str]) -> Iterable[Metric]:
        m = self._metrics
        finished = {"stop": 0, "length": 0, "abort": 0, "error": 0, **m.finished}
        for name in ("vllm:request_success", "request_finish"):
            family = CounterMetricFamily(name, "Requests by how they ended.", labels=[*labels, "finished_reason"])
            for reason, count in finished.items():
                # vLLM counts aborted requests as successes and has no failed ones in this family.
                if name == "request_finish" or reason != "error":
                    family.add_metric([*labels.values(), reason], count)
            yield family
        rejected = CounterMetricFamily("requests_rejected", "Refused requests by code.", labels=[*labels, "code"])
        for code, count in m.rejected.items():
            rejected.add_metric([*labels.values(), code], count)
        yield rejected

    def _replicas(self, labels: dict[str, str]) -> Iterable[Metric]:
        """Only where there are several."""
        m, phases = self._metrics, self._metrics.replica_phases()
        if not phases:
            return
        numbers = range(len(phases))
        for name, text, values in (
            ("replica_up", "1: the replica serves.", [float(phase == "ready") for phase in phases]),
            ("replica_requests_running", "Requests in its running batch.", [m.running_on(n) for n in numbers]),
            ("replica_requests", "Requests on it, waiting ones included.", [m.in_flight_on(n) for n in numbers]),
            ("replica_cache_usage_perc", "Share of its pages in use.", [m.kv_cache_usage_of(n) for n in numbers]),
        ):
            family = GaugeMetricFamily(name, text, labels=[*labels, "replica"])
            for number, value in enumerate(values):
                family.add_metric([*labels.values(), str(number)], value)
            yield family
        restarts = CounterMetricFamily("replica_restarts", "Engine processes lost.", labels=[*labels, "replica"])
        for number in numbers:
            restarts.add_metric([*labels.values(), str(number)], m.restarts_of(number))
        yield restarts

    def _startup(self) -> Iterable[Metric]:
        m = self._metrics
        phases = GaugeMetricFamily("startup_phase_seconds", "Seconds spent in each start-up phase.", labels=["phase"])
        for phase, seconds in m.phase_seconds().items():
            if phase not in ("ready", "restarting", "draining", "failed"):
                phases.add_metric([phase], seconds)
        yield phases
        if m.profile:
            yield from _plain_gauge("profile_info", "The selected profile.", m.profile, 1)
        if m.engine_cache_hit is not None:
            hit = int(m.engine_cache_hit)
            yield from _plain_gauge("engine_cache_hit", "1: the engine was found, 0: it was built.", {}, hit)
        if m.engines:
            infos = list(m.engines.values())
            config = {
                "num_gpu_blocks": str(sum(info.num_pages for info in infos)),
                "block_size": str(infos[0].page_size),
                "cache_dtype": infos[0].kv_cache_dtype,
            }
            yield from _plain_gauge("vllm:cache_config_info", "The KV cache.", config, 1)


def _both(name: str) -> tuple[str, str]:
    return f"vllm:{name}", name


def _plain_gauge(name: str, text: str, labels: dict[str, str], value: float) -> Iterable[Metric]:
    family = GaugeMetricFamily(name, text, labels=list(labels))
    family.add_metric(list(labels.values()), value)
    yield family


def _gauge(labels: dict[str, str], value: float, text: str, name: str) -> Iterable[Metric]:
    for full in _both(name):
        yield from _plain_gauge(full, text, labels, value)


def _count(name: str, text: str, labels: dict[str, str], value: float) -> Metric:
    family = CounterMetricFamily(name, text, labels=list(labels))
    family.add_metric(list(labels.values()), value)
    return family


def _counter(labels: dict[str, str], value: float, text: str, name: str) -> Iterable[Metric]:
    for full in _both(name):
        yield _count(full, text, labels, value)
