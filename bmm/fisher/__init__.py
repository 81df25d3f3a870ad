"""Diagonal Fishers: how much a model's likelihood of its task depends on every parameter; and their cache."""

from .collect import Source, collect
from .store import FisherStore

__all__ = ["FisherStore", "Source", "collect"]
