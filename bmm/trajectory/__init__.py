"""Averages of one training run's checkpoints: uniform, exponential, sliding windows, SWA."""

from .average import average
from .schemes import METHODS, Scheme

__all__ = ["METHODS", "Scheme", "average"]
