"""Small checkpoints in the layouts of others' quantizers, and models with the numbers that they stand for.

compressed-tensors' are written by its own library; those of AutoAWQ, GPTQ and ModelOpt by hand, as published (the
libraries want a GPU). Nothing here uses the appliance's readers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

# A layer's name and weight [out, in] -> its tensors by suffix, and the weight that they stand for (float32).
Quantizer = Callable[[str, Tensor], tuple[dict[str, Tensor], Tensor]]
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # nibble -> which of eight output channels
FP8_MAX = 448.0


def quantize_checkpoint(
    path: Path,
    model: Any,
    quantizer: Quantizer,
    section: dict[str, Any],
    *,
    file: str = "config.json",
    plain: Iterable[str] = ("lm_head",),
    extra: dict[str, Tensor] | None = None,
) -> Any:
    """Rewrite what `model_helpers.make_checkpoint` saved in `path` as a quantized checkpoint, and give `model` (which
    is returned) the numbers that it stands for. `section`: into config.json, or alone into `file`. `plain`: parts of
    names of linear layers that are not quantized. `extra`: tensors besides."""
    tensors = {name: tensor.detach().to(torch.float16) for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear) or any(part in name for part in plain):
            continue
        stored, stands_for = quantizer(name, tensors.pop(f"{name}.weight").float())
        tensors |= {f"{name}.{suffix}": tensor.contiguous() for suffix, tensor in stored.items()}
        module.weight.data = stands_for.float()
    for name, parameter in model.named_parameters():
        if name in tensors and tensors[name].dtype == torch.float16:  # not quantized, but rounded
            parameter.data = tensors[name].float()
    for old in path.glob("*.safetensors"):
        old.unlink()
    save_file(tensors | (extra or {}), path / "model.safetensors")
    config = json.loads((path / "config.json").read_text())
    config.update(dtype="float16")
    if file == "config.json":
        config["quantization_config"] = section
    else:
        (path / file).write_text(json.dumps(section))
    (path / "config.json").write_text(json.dumps(config))
    return model


# ---------------------------------------------------------------- int4


def round_groups(weight: Tensor, group_index: Tensor, *, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """weight [out, in] -> values int32 [out, in] of 0..15, scales float16 and zeros int32 [out, groups]; input i is in
    group group_index[i]. Zero points are 1..15: the first GPTQ layout cannot say 0."""
    groups = int(group_index.max()) + 1
    scales = torch.empty(len(weight), groups, dtype=torch.float16)
    zeros = torch.full((len(weight), groups), 8, dtype=torch.int32)
    for g in range(groups):
        part = weight[:, group_index == g]
        low, high = part.amin(1).clamp_max(0), part.amax(1).clamp_min(0)
        scales[:, g] = (part.abs().amax(1) / 7 if symmetric else (high - low) / 14).to(torch.float16)
        if not symmetric:
            zeros[:, g] = (-low / scales[:, g].float()).round().clamp(1, 15).int()
    values = weight / scales.float()[:, group_index] + zeros[:, group_index]
    return values.round().clamp(0, 15).int(), scales, zeros


def stands_for(values: Tensor, scales: Tensor, zeros: Tensor, group_index: Tensor) -> Tensor:
    return (values - zeros[:, group_index]).float() * scales.float()[:, group_index]


def pack_last(values: Tensor, order: Iterable[int] = range(8)) -> Tensor:
    """[..., 8 n] -> int32 [..., n]: nibble i of a word is the order[i]-th of its eight."""
    words = torch.zeros(*values.shape[:-1], values.shape[-1] // 8, dtype=torch.int64)
    for nibble, position in enumerate(order):
        words |= (values[..., position::8].long() & 15) << 4 * nibble
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def awq(group_size: int = 128) -> Quantizer:
    def quantize(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        size = weight.shape[1] if group_size == -1 else group_size
        index = torch.arange(weight.shape[1]) // size
        values, scales, zeros = round_groups(weight, index, symmetric=False)
        stored = {
            "qweight": pack_last(values.t(), AWQ_ORDER),
            "qzeros": pack_last(zeros.t(), AWQ_ORDER),
            "scales": scales.t(),
        }
        return stored, stands_for(values, scales, zeros, index)

    return quantize


def awq_section(group_size: int = 128, **changes: Any) -> dict[str, Any]:
    facts = {"quant_method": "awq", "bits": 4, "group_size": group_size, "version": "gemm", "zero_point": True}
    return facts | {"modules_to_not_convert": None} | changes


def gptq(
    group_size: int = 128, *, v2: bool = False, symmetric: bool = True, act_order: bool = False, alike: bool = True
) -> Quantizer:
    """`alike`: layers with the same input have the same order."""

    def quantize(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        size = weight.shape[1] if group_size == -1 else group_size
        index = torch.arange(weight.shape[1]) // size
        if act_order:
            parts = name.split(".")
            seed = f"{parts[2]}{parts[3]}{name.endswith(('o_proj', 'down_proj'))}" if alike else name
            generator = torch.Generator().manual_seed(sum(map(ord, seed)))
            index = index[torch.randperm(len(index), generator=generator)]
        values, scales, zeros = round_groups(weight, index, symmetric=symmetric)
        stored = {
            "qweight": pack_last(values).t(),
            "qzeros": pack_last((zeros if v2 else zeros - 1).t()),
            "scales": scales.t(),
            "g_idx": index.to(torch.int32),
        }
        return stored, stands_for(values, scales, zeros, index)

    return quantize


def gptq_section(group_size: int = 128, **changes: Any) -> dict[str, Any]:
    facts = {"quant_method": "gptq", "bits": 4, "group_size": group_size, "desc_act": False, "sym": True}
    return facts | {"checkpoint_format": "gptq"} | changes


# ---------------------------------------------------------------- 8 bits


def fp8(*, input_scale: float | None = None, per_channel: bool = False) -> Quantizer:
    """Per-tensor (or per-channel) scales; with `input_scale`, each layer's is that times a number from its name."""

    def quantize(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        scale = weight.abs().amax(1) / FP8_MAX if per_channel else weight.abs().amax() / FP8_MAX
        rows = scale.unsqueeze(1) if per_channel else scale
        values = (weight / rows).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
        stored = {"weight": values, "weight_scale": scale}
        if input_scale is not None:
            stored["input_scale"] = torch.tensor(input_scale * (1 + len(name) % 5))
        return stored, values.float() * rows

    return quantize


# ---------------------------------------------------------------- compressed-tensors


def compressed(kind: str, **weights: Any) -> tuple[Quantizer, dict[str, Any]]:
    """A quantizer and the configuration that belongs to it, by the library. `kind`: "pack-quantized", "int-quantized"
    or "float-quantized"; `weights`: fields of its QuantizationArgs."""
    from compressed_tensors.compressors.naive_quantized import NaiveQuantizationCompressor
    from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    packed, number = kind == "pack-quantized", "float" if kind == "float-quantized" else "int"
    static = weights.pop("static_input", False)
    facts = {"num_bits": 4 if packed else 8, "type": number, "symmetric": True, "strategy": "channel", **weights}
    inputs = {"num_bits": 8, "type": number, "symmetric": True, "dynamic": not static}
    inputs["strategy"] = "tensor" if static else "token"
    scheme = QuantizationScheme(
        targets=["Linear"],
        weights=QuantizationArgs(**facts),
        input_activations=None if packed else QuantizationArgs(**inputs),
    )
    compressor = PackedQuantizationCompressor if packed else NaiveQuantizationCompressor

    def quantize(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        size = facts.get("group_size") or weight.shape[1]
        grouped = weight.unflatten(1, (-1, size)) if facts["strategy"] != "tensor" else weight.reshape(1, 1, -1)
        scales, zeros = calculate_qparams(grouped.amin(-1), grouped.amax(-1), scheme.weights)
        scales = scales.to(torch.float16 if packed else torch.float32)
        if facts["strategy"] == "tensor":
            scales, zeros = scales.reshape(1), zeros.reshape(1)
        state = {"weight": weight, "weight_scale": scales, "weight_zero_point": zeros}
        stored = compressor.compress(state, scheme)
        restored = {key: value.float() if key == "weight_scale" else value for key, value in stored.items()}
        stands_for = compressor.decompress(restored, scheme)["weight"]
        if static:
            stored["input_scale"] = torch.tensor([0.02 * (1 + len(name) % 3)])
        return stored, stands_for

    config = QuantizationConfig(config_groups={"group_0": scheme}, format=kind, ignore=["lm_head"])
    section: dict[str, Any] = json.loads(json.dumps(config.to_dict(), default=str))
    return quantize, section | {"quantization_status": "compressed"}


def compressed_act_order(group_size: int = 32) -> tuple[Quantizer, dict[str, Any]]:
    """pack-quantized with actorder "group", by hand: the library no longer writes what others still have."""
    by_gptq = gptq(group_size, act_order=True)

    def quantize(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        theirs, stands_for = by_gptq(name, weight)
        index = theirs["g_idx"]
        values, scales, _ = round_groups(weight, index.long(), symmetric=True)
        stored = {"weight_packed": pack_last(values), "weight_scale": scales, "weight_g_idx": index}
        return stored | {"weight_shape": torch.tensor(weight.shape)}, stands_for

    section = compressed("pack-quantized", strategy="group", group_size=group_size)[1]
    section["config_groups"]["group_0"]["weights"]["actorder"] = "group"
    return quantize, section
