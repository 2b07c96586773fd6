"""Checkpoints: find or download, check, digest and read them; write safetensors as a stream.

Importing it imports no torch; only reading and writing tensors does. Knows nothing of engines but their digests.
"""

from __future__ import annotations

from appliance.checkpoint.config import read_model_config
from appliance.checkpoint.digest import CheckpointDigest, digest, is_remembered
from appliance.checkpoint.files import TensorInfo, content_files, weight_files
from appliance.checkpoint.reader import Checkpoint
from appliance.checkpoint.resolve import model_name_of, names_dataset, resolve, resolve_text
from appliance.checkpoint.writer import SafetensorsWriter, TensorPlan, planned_file_size

__all__ = [
    "Checkpoint",
    "CheckpointDigest",
    "SafetensorsWriter",
    "TensorInfo",
    "TensorPlan",
    "content_files",
    "digest",
    "is_remembered",
    "model_name_of",
    "names_dataset",
    "planned_file_size",
    "read_model_config",
    "resolve",
    "resolve_text",
    "weight_files",
]
