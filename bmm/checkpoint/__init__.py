"""Checkpoints in and out: the only part of bmm that knows about model files."""

from .adapters import AdapterCheckpoint, describe_adapter, is_adapter
from .formats import TensorInfo, fingerprint_tensors
from .opening import open_model
from .pool import ModelPool, fingerprint_of
from .reader import Checkpoint, open_checkpoint
from .writer import write_checkpoint

__all__ = [
    "AdapterCheckpoint",
    "Checkpoint",
    "ModelPool",
    "TensorInfo",
    "describe_adapter",
    "fingerprint_of",
    "fingerprint_tensors",
    "is_adapter",
    "open_checkpoint",
    "open_model",
    "write_checkpoint",
]
