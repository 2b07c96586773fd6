"""The network of the built-in model in plain torch, for training: a Llama decoder over packed conversations.

Parameter names are those of a Hugging Face Llama checkpoint, so the state dict is the checkpoint. A batch is
 one flat row of tokens with the borders of its conversations; attention never crosses a border. Knows nothing of the
tasks; the serving model is appliance.models.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from appliance.builtin.tokenizer import MAX_LENGTH, VOCAB_SIZE


@dataclass(frozen=True)
class NetworkConfig:
    """Shape of the network. Every size is a multiple of 64."""

    vocab_size: int = VOCAB_SIZE
    hidden_size: int = 256
    intermediate_size: int = 768
    num_layers: int = 8
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    rope_theta: float = 100000.0
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = MAX_LENGTH

    def hugging_face(self, *, begin: int, end: int, pad: int) -> dict[str, Any]:
        """The content of config.json."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
            "max_position_embeddings": self.max_position_embeddings,
            "attention_bias": False,
            "mlp_bias": False,
            "attention_dropout": 0.0,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "bos_token_id": begin,
            "eos_token_id": end,
            "pad_token_id": pad,
            "initializer_range": 0.02,
            "use_cache": True,
        }


@dataclass(frozen=True)
class Packed:
    """Borders of the conversations in a flat row of tokens."""

    positions: Tensor  # int64 [num_tokens], counted from the start of each conversation
    cu_seqlens: Tensor  # int32 [conversations + 1], on the device
    lengths: tuple[int, ...]  # the same on the host, per conversation
    max_length: int


# (query [n, heads, head_dim], key and value [n, kv_heads, head_dim], layer) -> [n, heads, head_dim]
AttentionFn = Callable[[Tensor, Tensor, Tensor, int], Tensor]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root mean square norm in float32 (Zhang & Sennrich 2019); result in x's dtype."""
    normed = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)
    return normed.to(x.dtype) * weight.to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding in Llama's half-split layout. x [n, heads, head_dim]; cos and sin [n, 1, head_dim / 2]."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """Product with a float32 master weight in x's dtype."""
    return F.linear(x, weight.to(x.dtype))


class SelfAttention(nn.Module):
    """Projections of grouped-query attention; the attention itself is passed in."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.num_heads * config.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, config.num_kv_heads * config.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, config.num_kv_heads * config.head_dim, bias=False)
        self.o_proj = nn.Linear(config.num_heads * config.head_dim, config.hidden_size, bias=False)


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020)."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)


class Norm(nn.Module):
    """Holds the weight of an RMS norm."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))


class Layer(nn.Module):
    """One decoder layer in two halves around the attention, so that each half compiles for one static shape."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.eps = config.rms_norm_eps
        self.input_layernorm = Norm(config.hidden_size)
        self.self_attn = SelfAttention(config)
        self.post_attention_layernorm = Norm(config.hidden_size)
        self.mlp = FeedForward(config)

    def before_attention(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [n, hidden] -> query, key, value [n, heads, head_dim], rotated."""
        attention = self.self_attn
        normed = rms_norm(x, self.input_layernorm.weight, self.eps)
        query = linear(normed, attention.q_proj.weight).unflatten(-1, (-1, attention.head_dim))
        key = linear(normed, attention.k_proj.weight).unflatten(-1, (-1, attention.head_dim))
        value = linear(normed, attention.v_proj.weight).unflatten(-1, (-1, attention.head_dim))
        return rotate(query, cos, sin), rotate(key, cos, sin), value

    def after_attention(self, x: Tensor, attended: Tensor) -> Tensor:
        """Residual [n, hidden] and attention result [n, heads, head_dim] -> next residual."""
        x = x + linear(attended.flatten(-2), self.self_attn.o_proj.weight)
        normed = rms_norm(x, self.post_attention_layernorm.weight, self.eps)
        gated = F.silu(linear(normed, self.mlp.gate_proj.weight)) * linear(normed, self.mlp.up_proj.weight)
        return x + linear(gated, self.mlp.down_proj.weight)


class Decoder(nn.Module):
    """Embedding, layers and final norm, under the name `model` as in a Llama checkpoint."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([Layer(config) for _ in range(config.num_layers)])
        self.norm = Norm(config.hidden_size)


class Network(nn.Module):
    """The language model with tied embeddings. Weights are float32; `dtype` is what it computes in."""

    def __init__(self, config: NetworkConfig, dtype: torch.dtype = torch.float32, seed: int = 0) -> None:
        super().__init__()
        self.config, self.dtype = config, dtype
        self.model = Decoder(config)
        self._initialize(seed)
        inverse = config.rope_theta ** (-torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim)
        angles = torch.arange(config.max_position_embeddings, dtype=torch.float64)[:, None] * inverse
        self.register_buffer("cos", angles.cos().float(), persistent=False)
        self.register_buffer("sin", angles.sin().float(), persistent=False)

    @torch.no_grad()
    def _initialize(self, seed: int) -> None:
        """Normal with a fan-in scale; residual outputs scaled down by depth (GPT-2)."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if "embed_tokens" in name:
                parameter.normal_(0.0, 0.02, generator=generator)
            elif parameter.dim() == 2:
                std = parameter.shape[1] ** -0.5 * 0.6
                if "o_proj" in name or "down_proj" in name:
                    std /= math.sqrt(2 * self.config.num_layers)
                parameter.normal_(0.0, std, generator=generator)

    def hidden(self, tokens: Tensor, positions: Tensor, attention: AttentionFn) -> Tensor:
        """Final hidden states [n, hidden], normed, of flat tokens int64 [n] at `positions` int64 [n]."""
        cos = self.cos[positions].unsqueeze(1).to(self.dtype)
        sin = self.sin[positions].unsqueeze(1).to(self.dtype)
        x = F.embedding(tokens, self.model.embed_tokens.weight).to(self.dtype)
        for index, layer in enumerate(self.model.layers):
            query, key, value = layer.before_attention(x, cos, sin)
            x = layer.after_attention(x, attention(query, key, value, index))
        return rms_norm(x, self.model.norm.weight, self.config.rms_norm_eps)

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, hidden] -> float32 [n, vocab]."""
        return linear(hidden, self.model.embed_tokens.weight).float()

    def token_losses(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy per token, float32 [n], of hidden states and the next tokens int64 [n]."""
        return F.cross_entropy(self.logits(hidden), targets, reduction="none")

    def compile_parts(self) -> None:
        """Compile the layer halves and the loss. All layers have the same shapes, so each part compiles once."""
        before, after = torch.compile(Layer.before_attention), torch.compile(Layer.after_attention)
        for layer in self.model.layers:
            layer.before_attention = before.__get__(layer)
            layer.after_attention = after.__get__(layer)
        self.token_losses = torch.compile(Network.token_losses).__get__(self)  # type: ignore[method-assign]

    def save(self, directory: Path, *, begin: int, end: int, pad: int) -> None:
        """Write config.json, generation_config.json and model.safetensors (bf16) into a directory."""
        from safetensors.torch import save_file

        config = self.config.hugging_face(begin=begin, end=end, pad=pad)
        generation = {"bos_token_id": begin, "eos_token_id": end, "pad_token_id": pad, "do_sample": False}
        for name, content in (("config.json", config), ("generation_config.json", generation)):
            (directory / name).write_text(json.dumps(content, indent=2) + "\n")
        weights = {name: p.detach().to("cpu", torch.bfloat16).contiguous() for name, p in self.named_parameters()}
        save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
