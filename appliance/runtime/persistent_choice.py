"""Whether the persistent kernel serves decode steps, and up to which size: what it refuses, and what is slower than
layer by layer on this GPU, is left to the layers.

Ranks wait for each other within a step, so all must take the same way: a reason against it on one rank is one for all,
and of times the slowest rank's count. Knows neither the kernel's tables nor how a step is run.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from torch import Tensor

from appliance.distributed import TensorParallel
from appliance.kernels.persistent import exchange
from appliance.kernels.persistent.exchange import Exchange
from appliance.layers.decoder import Decoder
from appliance.runtime.input_batch import InputBatch
from appliance.runtime.persistent_decode import PersistentDecode, refusal

log = logging.getLogger(__name__)

Timer = Callable[[PersistentDecode, int], tuple[float, float]]  # (kernels, rows) -> µs: kernel, layer by layer


def choose(
    model: Decoder, kv_caches: Sequence[Tensor], batch: InputBatch, sizes: Sequence[int], timer: Timer
) -> PersistentDecode | str:
    """Kernels for those of `sizes` (numbers of rows, ascending) that they are the faster way for; else why there are
    none. Called by all ranks of a group."""
    reason = _agreed(model.tp, refusal(model, kv_caches))
    if reason is not None:
        return reason
    found = _make(model, kv_caches, batch, sizes)
    if isinstance(found, str):
        return found
    made, shared = found
    for rows in made.sizes:
        mine, layers = (_slowest(model.tp, microseconds) for microseconds in timer(made, rows))
        if model.tp.rank == 0:
            log.info("decode steps of %d: persistent kernel %.0f µs, layer by layer %.0f µs", rows, mine, layers)
        if mine >= layers:
            made.keep_below(rows)
            break
    if made.sizes:
        return made
    if shared is not None:  # no kernel uses it any more, on any rank: all have told their times
        model.tp.own_reducer.on_abort.remove(shared.abort)
    return "layer by layer is faster here"


def _make(
    model: Decoder, kv_caches: Sequence[Tensor], batch: InputBatch, sizes: Sequence[int]
) -> tuple[PersistentDecode, Exchange | None] | str:
    """The kernels, and the memory that the ranks share for them; else why there are none."""
    tp = model.tp
    if tp.size == 1:
        return PersistentDecode(model, kv_caches, batch, sizes), None
    try:
        shared = exchange.connect(tp, tp.rank, tp.size, model.config.hidden_size, sizes, kv_caches[0].device)
    except RuntimeError as error:  # the same on all ranks
        return f"torch gives no memory that GPUs share: {str(error).splitlines()[0]}"
    made, failure = None, None
    try:
        made = PersistentDecode(model, kv_caches, batch, sizes, shared)
    except Exception as error:  # of one rank's compiler or driver; without telling the others, they would wait
        log.warning("the persistent decode kernel cannot be made: %s", error)
        failure = f"it cannot be made: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    reason = _agreed(tp, failure)
    if reason is not None or made is None:
        return reason or ""
    # What a GPU with fewer multiprocessors has no room for.
    for rows in sizes:
        if tp.minimum(int(made.serves(rows))) == 0:
            made.keep_below(rows)
            break
    tp.own_reducer.on_abort.append(shared.abort)
    return made, shared


def _agreed(tp: TensorParallel, reason: str | None) -> str | None:
    """A reason that any rank has: its own, or whose it is."""
    first = tp.minimum(tp.size if reason is None else tp.rank)
    if first == tp.size or tp.size == 1:
        return reason
    return reason or f"not on rank {first}"


def _slowest(tp: TensorParallel, microseconds: float) -> float:
    """The largest of the ranks' times, to a hundredth."""
    return -tp.minimum(-round(microseconds * 100)) / 100
