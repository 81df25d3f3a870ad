"""Checkpoints in and out: the only part of bmm that knows about model files."""

from .formats import TensorInfo, fingerprint_tensors
from .pool import ModelPool, fingerprint_of
from .reader import Checkpoint, open_checkpoint
from .writer import write_checkpoint

__all__ = [
    "Checkpoint",
    "ModelPool",
    "TensorInfo",
    "fingerprint_of",
    "fingerprint_tensors",
    "open_checkpoint",
    "write_checkpoint",
]
