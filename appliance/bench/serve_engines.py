"""What a server that is measured consists of, by its own answers, and what the selection predicts of it at full load.

Knows the routes for health and manifest; measures nothing.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any

import msgspec

from appliance.bench.load import Flow
from appliance.bench.own_server import get_json
from appliance.bench.predictions import predictions_of
from appliance.engines.manifest import EngineManifest
from appliance.types import EngineOptions


def engine_facts(url: str, options: EngineOptions, main: Flow) -> dict[str, Any]:
    """For the JSON line: replicas, ranks of each, and the predicted output tokens/s of all where requests of one length
    each are always running, else None. {} for a server that tells nothing of its engine."""
    replicas = replicas_of(url)
    listed = get_json(f"{url}/v1/manifest")[1]
    with contextlib.suppress(msgspec.ValidationError):
        manifest = msgspec.convert(listed, EngineManifest)
        found = {"replicas": replicas, "tp_size": manifest.tp_size, "pp_size": manifest.pp_size}
        return found | {"predicted_tokens_per_second": _predicted(manifest, options, replicas, main)}
    return {}


def replicas_of(url: str) -> int:
    """Engines behind a server, up or not."""
    return len(get_json(f"{url}/v1/health/ready")[1].get("replicas", [])) or 1


def per_device(result: dict[str, Any]) -> dict[str, Any]:
    """Output tokens/s of each rank of each replica, and predicted over measured; while the load was whole, if it ever
    was, since that is what is predicted."""
    ranks = result.get("replicas", 0) * result.get("tp_size", 0) * result.get("pp_size", 0)
    steady = (result.get("steady") or {}).get("output_tokens_per_second")
    whole = result.get("output_tokens_per_second")
    if not ranks or not whole:
        return {}
    predicted = result.get("predicted_tokens_per_second")
    return {
        "output_tokens_per_second_per_rank": round(whole / ranks, 2),
        "steady_tokens_per_second_per_rank": round(steady / ranks, 2) if steady else None,
        "predicted_ratio": round(predicted / (steady or whole), 3) if predicted else None,
    }


def _predicted(manifest: EngineManifest, options: EngineOptions, replicas: int, main: Flow) -> float | None:
    fixed = main.input.low == main.input.high and main.output.low == main.output.high
    predictions = predictions_of(manifest, options, replicas=replicas) if main.kind == "closed" and fixed else None
    if predictions is None:
        return None
    each = math.ceil(main.concurrency / replicas)
    return round(replicas * predictions.output_rate(each, main.input.low, main.output.low), 1)
