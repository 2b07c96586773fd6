"""The shortest time that a device allows for a step, from bytes moved and operations done: the roofline model.

Williams, Waterman, Patterson, "Roofline: An Insightful Visual Performance Model", CACM 2009. Ceilings are measured in
the same run (`ceilings.py`), so a share of 100% is what this very device can do; nothing here knows a device by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from appliance.types import ModelConfig


@dataclass(frozen=True)
class Ceilings:
    """What the device reaches at best."""

    bandwidth: float  # bytes/s of a large copy, read + written
    linear_rate: float  # operations/s of a large product in the precision of the weights
    attention_rate: float  # operations/s of a large product in the precision of the activations


@dataclass(frozen=True)
class Floors:
    """Seconds that steps of one model take at least, on as many ranks as share it.

    `weight_bytes`: read by every step on a rank, so all but the embedding table; `kv_token_bytes`: K and V of one token
    in all layers of a rank. Of several stages each has its part of the sequences in hand, and all work at once.

    With `reduced`, the sums over ranks, two a layer, are added as they were measured: nothing runs beside them."""

    config: ModelConfig
    ceilings: Ceilings
    weight_bytes: int
    kv_token_bytes: float
    tp_size: int = 1
    pp_size: int = 1
    reductions: Mapping[int, float] = field(default_factory=dict)  # rows -> measured seconds of a sum over the ranks
    max_num_batched_tokens: int = 8192  # rows of a sum, where prompts are long

    @property
    def weights(self) -> float:
        """To read the weights once, in all stages."""
        return self.pp_size * self.weight_bytes / self.ceilings.bandwidth

    def decode(self, batch: int, context: float, *, reduced: bool = False) -> float:
        """One step of `batch` sequences that hold `context` tokens each: weights and K/V are read, products done."""
        rows = math.ceil(batch / self.pp_size)
        moved = self.weight_bytes + rows * self._kv_read(context)
        parameters = self._layer_parameters / self.pp_size + (self._head_parameters if self.pp_size == 1 else 0)
        operations = 2 * rows * parameters / self.ceilings.linear_rate
        operations += 4 * rows * self._attended(context) / self.pp_size / self.ceilings.attention_rate
        stage = max(moved / self.ceilings.bandwidth, operations / self.tp_size)
        return self.pp_size * (stage + (self._reductions(rows) if reduced else 0.0))

    def prefill(self, prompts: int, length: int, *, reduced: bool = False) -> float:
        """Prompts of `length` tokens each, with one token sampled for each; attention is causal."""
        tokens = prompts * length
        operations = 2 * (tokens * self._layer_parameters + prompts * self._head_parameters) / self.ceilings.linear_rate
        pairs = sum(_causal_pairs(length, self.config.window_of(layer)) for layer in self._layers)
        operations += 4 * prompts * pairs * self._attention_width / self.ceilings.attention_rate
        seconds = max(self.weights, operations / (self.tp_size * self.pp_size))
        if reduced:
            whole, rest = divmod(tokens, self.max_num_batched_tokens)
            seconds += whole * self._reductions(self.max_num_batched_tokens)
            seconds += self._reductions(rest) if rest else 0.0
        return seconds

    def throughput(
        self, requests: int, input_len: int, output_len: int, max_num_seqs: int, *, reduced: bool = False
    ) -> float:
        """`requests` at once, `max_num_seqs` of them running: every prompt once, and full decode steps for the rest."""
        running = min(requests, max_num_seqs)
        steps = requests * (output_len - 1) / running
        decode = steps * self.decode(running, input_len + output_len / 2, reduced=reduced)
        return self.prefill(requests, input_len, reduced=reduced) + decode

    @property
    def knows_reductions(self) -> bool:
        """Whether `reduced` can be asked for: there are several ranks, and their sums were timed."""
        return self.tp_size > 1 and bool(self.reductions)

    def _reductions(self, rows: int) -> float:
        """Of the layers of a stage, two each: between measured sizes by a line, beyond the largest by bytes."""
        known = sorted(self.reductions)
        last = known[-1]
        if rows >= last:
            seconds = self.reductions[last] * rows / last
        else:
            above = next(size for size in known if size >= rows)
            below = max((size for size in known if size <= rows), default=above)
            part = (rows - below) / (above - below) if above > below else 0.0
            seconds = self.reductions[below] + part * (self.reductions[above] - self.reductions[below])
        return 2 * self.config.num_hidden_layers / self.pp_size * seconds

    # ------------------------------------------------------------ what a model needs

    @property
    def _layers(self) -> range:
        return range(self.config.num_hidden_layers)

    @property
    def _layer_parameters(self) -> int:
        """Weights of the linear layers of all blocks."""
        c = self.config
        attention = 2 * c.hidden_size * c.head_dim * (c.num_attention_heads + c.num_key_value_heads)
        return c.num_hidden_layers * (attention + 3 * c.hidden_size * c.intermediate_size)

    @property
    def _head_parameters(self) -> int:
        return self.config.vocab_size * self.config.hidden_size

    @property
    def _attention_width(self) -> int:
        return self.config.num_attention_heads * self.config.head_dim

    def _attended(self, context: float) -> float:
        """Token pairs x width of one new token, over all layers."""
        seen = sum(min(context, self.config.window_of(layer) or context) for layer in self._layers)
        return seen * self._attention_width

    def _kv_read(self, context: float) -> float:
        """Bytes of K and V that one sequence's new token reads."""
        per_layer = self.kv_token_bytes / self.config.num_hidden_layers
        return sum(per_layer * min(context, self.config.window_of(layer) or context) for layer in self._layers)


def _causal_pairs(length: int, window: int | None) -> float:
    """Pairs of tokens of which the first attends to the second, itself included."""
    if window is None or window >= length:
        return length * (length + 1) / 2
    return window * (window + 1) / 2 + (length - window) * window
