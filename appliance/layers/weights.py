"""How a checkpoint's tensors map onto the decoder: the entries of an engine, with Hugging Face's usual names.

`decoder_weights` fits every checkpoint that names its tensors as Llama does. A model with other names builds its own
list from `linear`, `plain` and the pieces here.
"""

from __future__ import annotations

from typing import Literal

from appliance.types import ModelConfig, WeightSpec

Shard = Literal["column", "row", "vocabulary", "none"]


def plain(name: str, source: str, shape: tuple[int, ...]) -> WeightSpec:
    """A tensor stored as it is, whole on every rank."""
    return WeightSpec(name=name, kind="plain", sources=(source,), shapes=(shape,))


def linear(
    name: str,
    sources: dict[str, tuple[int, int]],
    shard: Shard,
    *,
    bias: bool = False,
    heads: tuple[int, ...] = (),
) -> WeightSpec:
    """A product whose weight is the `sources` (module name -> [out, in]) on top of each other; `heads`: how many each
    of them consists of, if it does."""
    return WeightSpec(
        name=name,
        kind="linear",
        sources=tuple(f"{source}.weight" for source in sources),
        shapes=tuple(sources.values()),
        shard=shard,
        bias_sources=tuple(f"{source}.bias" for source in sources) if bias else (),
        heads=heads,
    )


def decoder_weights(config: ModelConfig) -> list[WeightSpec]:
    """All entries of a decoder, in the order in which they are used."""
    hidden, vocab = config.hidden_size, config.vocab_size
    head = "model.embed_tokens" if config.tie_word_embeddings else "lm_head"
    specs = [plain("embedding.weight", "model.embed_tokens.weight", (vocab, hidden))]
    for i in range(config.num_hidden_layers):
        source = f"model.layers.{i}"
        specs += [
            plain(f"layers.{i}.input_norm.weight", f"{source}.input_layernorm.weight", (hidden,)),
            *attention_weights(config, f"layers.{i}.attention", f"{source}.self_attn"),
            plain(f"layers.{i}.post_attention_norm.weight", f"{source}.post_attention_layernorm.weight", (hidden,)),
            *mlp_weights(config, f"layers.{i}.mlp", f"{source}.mlp"),
        ]
    specs += [
        plain("norm.weight", "model.norm.weight", (hidden,)),
        linear("lm_head", {head: (vocab, hidden)}, "vocabulary"),
    ]
    return specs


def attention_weights(config: ModelConfig, name: str, source: str) -> list[WeightSpec]:
    """Fused q/k/v, head norms where there are any, output."""
    hidden, dim = config.hidden_size, config.head_dim
    heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
    q_size, kv_size = heads[0] * dim, heads[1] * dim
    fused = {
        f"{source}.q_proj": (q_size, hidden),
        f"{source}.k_proj": (kv_size, hidden),
        f"{source}.v_proj": (kv_size, hidden),
    }
    norms = [plain(f"{name}.{n}.weight", f"{source}.{n}.weight", (dim,)) for n in ("q_norm", "k_norm")]
    return [
        linear(f"{name}.qkv", fused, "column", bias=config.attention_bias, heads=heads),
        *(norms if config.qk_norm else []),
        linear(f"{name}.o", {f"{source}.o_proj": (hidden, q_size)}, "row", bias=config.output_bias),
    ]


def mlp_weights(config: ModelConfig, name: str, source: str) -> list[WeightSpec]:
    """Fused gate/up, down."""
    hidden, size = config.hidden_size, config.intermediate_size
    fused = {f"{source}.gate_proj": (size, hidden), f"{source}.up_proj": (size, hidden)}
    return [
        linear(f"{name}.gate_up", fused, "column", bias=config.mlp_bias),
        linear(f"{name}.down", {f"{source}.down_proj": (hidden, size)}, "row", bias=config.mlp_bias),
    ]
