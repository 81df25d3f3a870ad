"""The rows of the registry, a file a family of methods."""

from __future__ import annotations

from ..anchor import Anchor
from . import averages, geometric, sparse, spectral, statistical

ROWS: tuple[Anchor, ...] = (*averages.ROWS, *sparse.ROWS, *geometric.ROWS, *spectral.ROWS, *statistical.ROWS)
