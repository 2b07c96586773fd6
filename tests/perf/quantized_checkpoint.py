"""Writes a checkpoint of a well-known shape with random numbers, as others' quantizers lay it out, and builds its
engine.

    python tests/perf/quantized_checkpoint.py DIRECTORY [--shape llama-3.1-8b] [--kind gptq] [--act-order] [--build]

Kinds: awq, gptq, fp8 (ModelOpt, static scales) and int8 (compressed-tensors). What is written is the size of the real
thing, so the build takes as long. The last line is JSON. DIRECTORY can then be served or measured like any model:
`./entrypoint.py bench offline --model DIRECTORY`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

from appliance.bench.shapes import shape_config, write_config  # noqa: E402
from appliance.bench.vocabulary import write_tokenizer  # noqa: E402
from appliance.builder.build import build  # noqa: E402
from appliance.builder.request import BuildRequest  # noqa: E402
from appliance.checkpoint.files import INDEX_NAME  # noqa: E402
from appliance.layers.weights import decoder_weights  # noqa: E402

GROUP = 128
STD = 0.02  # of the weights
INT8 = {"num_bits": 8, "type": "int", "symmetric": True}
PRECISION = {"awq": "int4", "gptq": "int4", "fp8": "fp8", "int8": "int8"}


def section(kind: str, act_order: bool) -> dict[str, Any]:
    if kind == "awq":
        return {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True}
    if kind == "gptq":
        facts = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "checkpoint_format": "gptq", "sym": True}
        return facts | {"desc_act": act_order}
    if kind == "fp8":
        return {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"]}
    weights, inputs = INT8 | {"strategy": "channel"}, INT8 | {"strategy": "token", "dynamic": True}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    facts = {"quant_method": "compressed-tensors", "format": "int-quantized", "ignore": ["lm_head"]}
    return facts | {"config_groups": {"group_0": group}}


def layer(kind: str, shape: tuple[int, ...], index: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """Random tensors of a layer [out, in], by suffix. `index`: the group of each input."""
    out, inner = shape
    device = generator.device

    def words(*size: int) -> Tensor:
        return torch.randint(-(2**31), 2**31 - 1, size, dtype=torch.int32, device=device, generator=generator)

    if kind in ("awq", "gptq"):
        stored = {"scales": torch.full((inner // GROUP, out), STD / 4.6, dtype=torch.float16)}
        middle = -2004318072 if kind == "awq" else 0x77777777  # 0x88888888: eights; GPTQ's are stored less one
        stored["qzeros"] = torch.full((inner // GROUP, out // 8), middle, dtype=torch.int32)
        if kind == "awq":
            return stored | {"qweight": words(inner, out // 8)}
        return stored | {"qweight": words(inner // 8, out), "g_idx": index.to(torch.int32)}
    weight = torch.randn(out, inner, device=device, generator=generator) * STD
    if kind == "int8":
        scales = weight.abs().amax(1, keepdim=True) / 127
        return {"weight": (weight / scales).round().to(torch.int8), "weight_scale": scales}
    scale = weight.abs().amax() / 448
    return {
        "weight": (weight / scale).to(torch.float8_e4m3fn),
        "weight_scale": scale,
        "input_scale": torch.tensor(0.05),
    }


def write(path: Path, shape: str, kind: str, act_order: bool) -> None:
    config = shape_config(shape)
    path.mkdir(parents=True, exist_ok=True)
    write_config(config, path / "config.json")
    write_tokenizer(config.vocab_size, path)
    raw = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(raw | {"quantization_config": section(kind, act_order)}))
    generator = torch.Generator("cuda" if torch.cuda.is_available() else "cpu").manual_seed(0)
    files: dict[str, str] = {}
    pending: dict[str, Tensor] = {}

    def flush() -> None:
        name = f"part-{len(set(files.values())):03d}.safetensors"
        save_file({key: tensor.cpu().contiguous() for key, tensor in pending.items()}, path / name)
        files.update(dict.fromkeys(pending, name))
        pending.clear()

    for spec in decoder_weights(config):
        index = torch.arange(spec.shapes[0][-1]) // GROUP
        if act_order:
            index = index[torch.randperm(len(index))]
        for source, size in zip(spec.sources, spec.shapes):
            if spec.kind == "linear" and spec.name != "lm_head":
                module = source.removesuffix(".weight")
                tensors = layer(kind, size, index, generator)
                pending.update({f"{module}.{suffix}": tensor for suffix, tensor in tensors.items()})
            elif source not in files and source not in pending:
                made = torch.randn(size, device=generator.device, generator=generator) * STD
                pending[source] = (made if len(size) > 1 else torch.ones(size)).to(torch.bfloat16)
        if sum(tensor.nbytes for tensor in pending.values()) > 2 << 30:
            flush()
    flush()
    (path / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": files}))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--shape", default="llama-3.1-8b")
    parser.add_argument("--kind", choices=PRECISION, default="gptq")
    parser.add_argument("--act-order", action="store_true")
    parser.add_argument("--build", action="store_true", help="build its engine for this machine, in DIRECTORY/cache")
    args = parser.parse_args()
    begin = time.perf_counter()
    write(args.directory, args.shape, args.kind, args.act_order)
    result: dict[str, Any] = {"kind": args.kind, "shape": args.shape, "act_order": args.act_order}
    result["write_seconds"] = round(time.perf_counter() - begin, 1)
    if args.build:
        on_gpu = torch.cuda.is_available()
        request = BuildRequest(
            checkpoint=str(args.directory),
            cache=str(args.directory / "cache"),
            precision=PRECISION[args.kind],  # type: ignore[arg-type]
            backend="cuda" if on_gpu else "cpu",
            compute_capability=torch.cuda.get_device_capability() if on_gpu else None,
        )
        begin = time.perf_counter()
        engine = build(request, lambda message: print(message.detail, flush=True))
        manifest = json.loads((engine / "engine.json").read_text())
        result |= {"build_seconds": round(time.perf_counter() - begin, 1), "engine": str(engine)}
        result["worst_self_check"] = max(check.get("value") or 0 for check in manifest["self_check"])
        result["notes"] = manifest["build"]["notes"]
    print(json.dumps(result))


if __name__ == "__main__":
    main()
