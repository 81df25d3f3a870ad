"""Grams: what the inputs of every module look like, from data, from task vectors, or both; and their cache."""

from .accumulate import GramAccumulator
from .collect import collect, reading_order
from .datafree import datafree, hybrid, hybrid_parts
from .parts import gram_bytes, in_parts
from .store import GramStore, fingerprint
from .task_grams import TaskGrams

__all__ = [
    "GramAccumulator",
    "GramStore",
    "TaskGrams",
    "collect",
    "datafree",
    "fingerprint",
    "gram_bytes",
    "hybrid",
    "hybrid_parts",
    "in_parts",
    "reading_order",
]
