"""Times the ways to compute each product of a loaded model, and says which to use.

A product is run as it is served: layer after layer of the same shape, so that weights come from memory, with the input
that the scheme's other kernels give it, inside a CUDA graph. Of few rows also between kernels that quantize, as a step
has it: own kernels begin while the one in front ends, and let the next one do so, which the library's do not. Knows
layers and the table of tactics; knows nothing of what a tactic does. Timings are remembered per type of GPU
(`timings.py`), so a second build only times what is new.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from appliance.builder.timings import Timings
from appliance.engines.manifest import TimedTactic
from appliance.hardware.host import host
from appliance.kernels.deferred_scale import as_float
from appliance.kernels.tactics import ROW_BUCKETS, TABLE, Tactic, Tactics, Timer
from appliance.layers.linear import Linear
from appliance.quantization.scheme import PrecisionScheme
from appliance.runtime.timing import time_in_graph

log = logging.getLogger(__name__)

SECONDS = 20.0  # for all timing of a build, compiling candidates included; what is not reached keeps its default
# Row counts in the order of what they are worth: if time runs out, single requests and full batches are known.
_ORDER = (1, 64, 16, 256, 4096, 32, 128, 8, 8192, 2048, 2, 4, 512, 1024)
_ALL_TIMED = (1, 64)  # row counts at which every tactic is timed: the ends of where there are many
_ROTATED_BYTES = 256 << 20  # weights that a timing goes through: several times the L2 cache of any GPU
_KEPT = 6  # of each family of tactics, the quickest at the nearest row count that was timed
_TIMED_TWICE = 3  # tactics of a product that are timed again after all were
_TOLERANCE = 2e-2  # relative difference between two ways to compute a product, both rounded to 16 bits
_MOST_ROWS_BETWEEN = 256  # rows up to which products are timed between other kernels: beyond, a launch is not seen
_MOST_LOGIT_ROWS = 512  # logits are computed for a token of each sequence, not for all of a prompt


class _Probe:
    """Stands in for the table's choices: each thread computes products by the tactic that it forced, or the default,
    and sees what the scheme offers."""

    def __init__(self) -> None:
        self._local = threading.local()

    def __call__(
        self, scheme: str, out_features: int, in_features: int, rows: int, tactics: Callable[[int], Tactics]
    ) -> Tactic | None:
        self._local.seen = (scheme, out_features, in_features, tactics)
        return getattr(self._local, "forced", None)

    def observe(self, call: Callable[[], object]) -> tuple[str, int, int, Callable[[int], Tactics]] | None:
        """What a scheme asks the table while `call` runs; None if it does not."""
        self._local.seen = None
        call()
        seen: tuple[str, int, int, Callable[[int], Tactics]] | None = self._local.seen
        return seen

    @contextlib.contextmanager
    def force(self, tactic: Tactic) -> Iterator[None]:
        self._local.forced = tactic
        try:
            yield
        finally:
            self._local.forced = None


@dataclass
class _Product:
    """All linear layers of one shape, kind and scheme."""

    name: str  # "qkv": the last part of the layers' names
    layers: list[Linear]
    scheme: str = ""  # as the table calls it
    out_features: int = 0  # of the prepared weight
    in_features: int = 0
    tactics: Callable[[int], Tactics] = field(default=lambda rows: {})
    timed: dict[int, dict[str, float]] = field(default_factory=dict)  # rows -> µs by tactic, of what works

    @property
    def shape(self) -> str:
        return f"{self.name} {self.out_features}x{self.in_features}"

    def dense(self, rows: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        generator = torch.Generator(device).manual_seed(rows)
        return torch.randn(rows, self.layers[0].in_features, generator=generator, device=device).to(dtype)

    def inputs(self, rows: int, dtype: torch.dtype, device: torch.device) -> Any:
        return self.layers[0].scheme.tactic_input(self.dense(rows, dtype, device))

    def between(self, rows: int, dtype: torch.dtype, device: torch.device) -> Callable[[], object] | None:
        """What launches the kernel that makes the product's input; None if there is none, or nobody would notice."""
        x, scheme = self.dense(rows, dtype, device), self.layers[0].scheme
        return None if rows > _MOST_ROWS_BETWEEN or scheme.tactic_input(x) is x else lambda: scheme.tactic_input(x)


def _products(model: nn.Module) -> list[_Product]:
    """Linear layers, grouped by the last part of their name, their shape and how they are stored."""
    found: dict[tuple[str, int, int, bool, PrecisionScheme], _Product] = {}
    for name, module in model.named_modules():
        if isinstance(module, Linear):
            last = name.rpartition(".")[2]
            key = (last, module.out_features, module.in_features, module.bias is not None, module.scheme)
            found.setdefault(key, _Product(last, [])).layers.append(module)
    return list(found.values())


class Tuner:
    """Times one model's products. `timer`, `clock` and `threads` are seams for tests; on a GPU the defaults serve."""

    def __init__(
        self,
        dtype: torch.dtype,
        device: torch.device,
        timings: Timings,
        *,
        seconds: float = SECONDS,
        timer: Timer = time_in_graph,
        clock: Callable[[], float] = time.monotonic,
        threads: int | None = None,
    ) -> None:
        self._dtype, self._device = dtype, device
        self._timings, self._timer, self._clock = timings, timer, clock
        self._deadline = clock() + seconds
        self._threads = threads or min(16, host().cpu_cores)
        self._probe = _Probe()
        self._left_out: set[tuple[str, str]] = set()  # (product, tactic) that was said to fail
        self._compiled: set[tuple[str, str]] = set()  # (key of product and rows, tactic) that ran once
        self._between: dict[tuple[int, ...], float] = {}  # µs of kernels between products, by rows and width
        self.measured = 0  # tactics timed, those remembered not counted
        self.compile_seconds = 0.0  # of which were spent running each once, compiling it

    @torch.inference_mode()
    def tune(self, model: nn.Module, report: Callable[[str], None] = lambda detail: None) -> list[TimedTactic]:
        """Choose for every product and row count that there is time for; the choices are in `TABLE` afterwards.
        `report` hears what is being done."""
        products = []
        TABLE.probe = self._probe
        try:
            for product in _products(model):
                if self._offers(product):
                    products.append(product)
            self._compile_ahead(products)
            for done, rows in enumerate(_ORDER):
                if self._clock() >= self._deadline:
                    log.warning("tactics: out of time, %d of %d row counts timed", done, len(_ORDER))
                    break
                report(f"timing products of {rows} rows")
                self._time_rows(products, rows)
        finally:
            TABLE.probe = None
        chosen = [choice for product in products for choice in self._choose(product)]
        self._timings.save()
        return chosen

    def _offers(self, product: _Product) -> bool:
        """Run one layer, to see whether there is a choice and what the table calls the product."""
        x = product.inputs(1, self._dtype, self._device)
        seen = self._probe.observe(lambda: product.layers[0].multiply(x))
        if seen is None:
            return False
        product.scheme, product.out_features, product.in_features, product.tactics = seen
        return len(product.tactics(1)) > 1

    # -------------------------------------------------- timing

    def _compile_ahead(self, products: list[_Product]) -> None:
        """What will be timed whatever comes out: the more at once, the more is compiled side by side."""
        known = [(product, rows) for product in products for rows in _ALL_TIMED]
        self._compile([(p, rows, name, tactic) for p, rows in known for name, tactic in p.tactics(rows).items()])

    def _time_rows(self, products: list[_Product], rows: int) -> None:
        """Every product at one number of rows."""
        wanted = [p for p in products if p.name != "lm_head" or rows <= _MOST_LOGIT_ROWS]
        plans = [(product, self._worth_timing(product, rows)) for product in wanted]
        self._compile([(p, rows, name, tactic) for p, tactics in plans for name, tactic in tactics.items()])
        for product, tactics in plans:
            if self._clock() >= self._deadline:
                return
            try:
                product.timed[rows] = self._time_product(product, rows, tactics)
            except torch.cuda.OutOfMemoryError:
                torch.cuda.empty_cache()
                log.info("tactics: %s of %d rows does not fit into memory here, not timed", product.shape, rows)

    def _worth_timing(self, product: _Product, rows: int) -> dict[str, Tactic]:
        """All tactics at some numbers of rows; else the default and, of each family (the first word of a name), those
        that were quickest at the nearest number of rows."""
        tactics = dict(product.tactics(rows))
        if rows in _ALL_TIMED or not product.timed:
            return tactics
        before = product.timed[
            min(product.timed, key=lambda other: (abs(other.bit_length() - rows.bit_length()), other))
        ]
        kept = set(list(tactics)[:1])
        families: dict[str, list[str]] = {}
        for name in tactics:
            families.setdefault(name.partition(" ")[0], []).append(name)
        for names in families.values():
            kept |= set(sorted(names, key=lambda name: before.get(name, float("inf")))[:_KEPT])
        return {name: tactic for name, tactic in tactics.items() if name in kept}

    def _compile(self, jobs: Iterable[tuple[_Product, int, str, Tactic]]) -> None:
        """Run each once that will be timed, several at a time, since most of that time goes to compilers. What fails
        here is met again when it is timed."""
        begin = self._clock()
        new = []
        for job in jobs:
            key = (self._key(job[0], job[1]), job[2])
            if key not in self._compiled and self._timings.get(*key) is None:
                self._compiled.add(key)
                new.append(job)

        def run(job: tuple[_Product, int, str, Tactic]) -> None:
            product, rows, _, tactic = job
            if self._clock() >= self._deadline:
                return
            try:
                with torch.inference_mode(), self._probe.force(tactic):
                    if self._device.type == "cuda":
                        torch.cuda.set_device(self._device)
                    product.layers[0].multiply(product.inputs(rows, self._dtype, self._device))
                    if self._device.type == "cuda":  # not of the whole device: somebody may be capturing a graph
                        torch.cuda.current_stream(self._device).synchronize()
            except Exception as error:
                log.debug("tactics: %s: %s", job[2], error)

        with ThreadPoolExecutor(self._threads, thread_name_prefix="compile") as pool:
            list(pool.map(run, new))
        self.compile_seconds += self._clock() - begin

    def _time_product(self, product: _Product, rows: int, tactics: dict[str, Tactic]) -> dict[str, float]:
        """µs of each tactic that gives the numbers of the default, from memory or by timing it."""
        x = product.inputs(rows, self._dtype, self._device)
        key, found = self._key(product, rows), {}
        expected: Tensor | None = None
        for name, tactic in tactics.items():
            known = self._timings.get(key, name)
            if known is None:
                expected = self._expected(product, x, tactics) if expected is None else expected
                known = self._time_tactic(product, rows, x, name, tactic, expected)
                self._timings.put(key, name, known)
                self.measured += 1
            if known != float("inf"):
                found[name] = known
        if expected is not None:  # something was timed, perhaps while clocks were still rising: the best once more
            for name in sorted(found, key=lambda name: found[name])[:_TIMED_TWICE]:
                found[name] = min(found[name], self._time_tactic(product, rows, x, name, tactics[name], expected))
                self._timings.put(key, name, found[name])
        return found

    def _time_tactic(self, product: _Product, rows: int, x: Any, name: str, tactic: Tactic, expected: Tensor) -> float:
        """µs of a call; infinite if it fails or computes something else."""
        try:
            got = self._output(product, x, tactic)
            error = float((got - expected).norm() / expected.norm().clamp_min(1e-30))
            del got
            if not error <= _TOLERANCE:
                raise ArithmeticError(f"differs from the default by {error:.2g}")
            layers = product.layers[: layers_timed(product.out_features * product.in_features)]
            between = product.between(rows, self._dtype, self._device)
            launches = 24 if rows <= 256 else 4
            with self._probe.force(tactic):
                if between is None:
                    return self._timer([_call(layer, x) for layer in layers], launches)
                both = self._timer([_call(layer, x, between) for layer in layers], launches)
                return max(0.01, both - self._alone(between, rows, product.in_features))
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:
            level = logging.DEBUG if (product.shape, name) in self._left_out else logging.WARNING
            self._left_out.add((product.shape, name))
            log.log(level, "tactics: %s m=%d: %s is left out: %s", product.shape, rows, name, _first_line(error))
            return float("inf")

    def _alone(self, between: Callable[[], object], *size: int) -> float:
        """µs of the kernel between products, one after the other: without it what is told is a product's own time."""
        if size not in self._between:
            self._between[size] = self._timer([between], 48)
        return self._between[size]

    def _expected(self, product: _Product, x: Any, tactics: dict[str, Tactic]) -> Tensor:
        """What the first tactic that works gives, the default if it does. Raises what the last one raises."""
        names = list(tactics)
        for name in names[:-1]:
            with contextlib.suppress(RuntimeError):
                return self._output(product, x, tactics[name])
        return self._output(product, x, tactics[names[-1]])

    def _output(self, product: _Product, x: Any, tactic: Tactic) -> Tensor:
        with self._probe.force(tactic):
            return as_float(product.layers[0].multiply(x))

    def _key(self, product: _Product, rows: int) -> str:
        dtype = str(self._dtype).removeprefix("torch.")
        return f"{product.scheme} {dtype} {product.shape} m={rows}"

    # -------------------------------------------------- choosing

    def _choose(self, product: _Product) -> list[TimedTactic]:
        """The quickest for each number of rows that was timed, into the table and the log."""
        chosen = []
        for rows in sorted(product.timed):
            ranked = sorted(product.timed[rows].items(), key=lambda item: item[1])
            if not ranked:
                continue
            (name, best), *others = ranked
            TABLE.choose(product.scheme, product.out_features, product.in_features, rows, name)
            choice = TimedTactic(
                product=product.name,
                scheme=product.scheme,
                out_features=product.out_features,
                in_features=product.in_features,
                rows=rows,
                tactic=name,
                microseconds=round(best, 2),
                runner_up=others[0][0] if others else "",
                runner_up_microseconds=round(others[0][1], 2) if others else None,
            )
            log.info("tactics: %s", describe(choice))
            chosen.append(choice)
        return chosen


def layers_timed(weights: int) -> int:
    """How many layers with so many weights a timing goes through, if the model has as many."""
    return max(2, -(-_ROTATED_BYTES // max(weights, 1)))


def _call(layer: Linear, x: Any, between: Callable[[], object] = lambda: None) -> Callable[[], object]:
    def call() -> object:
        between()
        return layer.multiply(x)

    return call


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:200]}" if text else type(error).__name__


def describe(choice: TimedTactic) -> str:
    """For people: "qkv 6144x4096 m=8: skinny … 9.0 µs, runner-up library 9.6 µs"."""
    text = (
        f"{choice.product} {choice.out_features}x{choice.in_features} m={choice.rows}: "
        f"{choice.tactic} {choice.microseconds:.1f} µs"
    )
    if choice.runner_up_microseconds is not None:
        text += f", runner-up {choice.runner_up} {choice.runner_up_microseconds:.1f} µs"
    return text


assert sorted(_ORDER) == list(ROW_BUCKETS)
