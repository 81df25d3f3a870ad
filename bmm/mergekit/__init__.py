"""Recipes of mergekit (arXiv 2403.13257): read, checked, and merged to the same result."""

from __future__ import annotations

from .config import MergekitConfig
from .merging import merge_mergekit

__all__ = ["MergekitConfig", "merge_mergekit"]
