"""Rows of the methods that follow the geometry of weight space: angles, spheres, depth."""

from __future__ import annotations

from ..anchor import Anchor

ROWS: tuple[Anchor, ...] = ()
