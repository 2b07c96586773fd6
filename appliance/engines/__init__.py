"""Engines as artifacts: their key, manifest, digests, store, and moving them between machines.

Torch-free; knows nothing of how an engine is built or run.
"""

from __future__ import annotations

from appliance.engines.key import (
    BUILDER_VERSION,
    KeyInputs,
    engine_dtype,
    engine_key,
    make_key_inputs,
    parameters_of,
    scheme_of,
)
from appliance.engines.manifest import EngineManifest, read_manifest
from appliance.engines.meter import ByteMeter, ProgressFn, Snapshot
from appliance.engines.store import EngineStore, LockHolder, StoredEngine
from appliance.engines.transfer import (
    EngineNotFoundError,
    EnginePublishedError,
    EngineTransferError,
    fetch,
    is_local,
    publish,
    reach,
    redact,
)
from appliance.engines.verify import DamagedFileError, Verified, VerifyLevel, verify_engine

__all__ = [
    "BUILDER_VERSION",
    "ByteMeter",
    "DamagedFileError",
    "EngineManifest",
    "EngineNotFoundError",
    "EnginePublishedError",
    "EngineStore",
    "EngineTransferError",
    "KeyInputs",
    "LockHolder",
    "ProgressFn",
    "Snapshot",
    "StoredEngine",
    "Verified",
    "VerifyLevel",
    "engine_dtype",
    "engine_key",
    "fetch",
    "is_local",
    "make_key_inputs",
    "parameters_of",
    "publish",
    "reach",
    "read_manifest",
    "redact",
    "scheme_of",
    "verify_engine",
]
