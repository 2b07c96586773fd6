"""The shortest time that a device allows for a step, from bytes moved and operations done: the roofline model.

Williams, Waterman, Patterson, "Roofline: An Insightful Visual Performance Model", CACM 2009. Ceilings are measured in
the same run (`ceilings.py`), so a share of 100% is what this very device can do; nothing here knows a device by name.
"""

from __future__ import annotations

from dataclasses import dataclass

from appliance.types import ModelConfig


@dataclass(frozen=True)
class Ceilings:
    """What the device reaches at best."""

    bandwidth: float  # bytes/s of a large copy, read + written
    linear_rate: float  # operations/s of a large product in the precision of the weights
    attention_rate: float  # operations/s of a large product in the precision of the activations


@dataclass(frozen=True)
class Floors:
    """Seconds that steps of one model take at least. `weight_bytes`: read by every step, so all but the embedding
    table; `kv_token_bytes`: K and V of one token in all layers."""

    config: ModelConfig
    ceilings: Ceilings
    weight_bytes: int
    kv_token_bytes: float

    @property
    def weights(self) -> float:
        """To read the weights once."""
        return self.weight_bytes / self.ceilings.bandwidth

    def decode(self, batch: int, context: float) -> float:
        """One step of `batch` sequences that hold `context` tokens each: weights and K/V are read, products done."""
        moved = self.weight_bytes + batch * self._kv_read(context)
        operations = 2 * batch * (self._layer_parameters + self._head_parameters) / self.ceilings.linear_rate
        operations += 4 * batch * self._attended(context) / self.ceilings.attention_rate
        return max(moved / self.ceilings.bandwidth, operations)

    def prefill(self, prompts: int, length: int) -> float:
        """Prompts of `length` tokens each, with one token sampled for each; attention is causal."""
        tokens = prompts * length
        operations = 2 * (tokens * self._layer_parameters + prompts * self._head_parameters) / self.ceilings.linear_rate
        pairs = sum(_causal_pairs(length, self.config.window_of(layer)) for layer in self._layers)
        operations += 4 * prompts * pairs * self._attention_width / self.ceilings.attention_rate
        return max(self.weights, operations)

    def throughput(self, requests: int, input_len: int, output_len: int, max_num_seqs: int) -> float:
        """`requests` at once, `max_num_seqs` of them running: every prompt once, and full decode steps for the rest."""
        running = min(requests, max_num_seqs)
        steps = requests * (output_len - 1) / running
        decode = steps * self.decode(running, input_len + output_len / 2)
        return self.prefill(requests, input_len) + decode

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
