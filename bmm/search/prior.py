"""What is known of a study's hyperparameters before its first trial: how fast the objective changes along each."""

from __future__ import annotations

import math

import numpy as np

from bmm.search import gp
from bmm.search.space import ANCHOR_SCALE, GAMMA, LOG10_LAM, LOG10_WEIGHT, RHO, Space

LENGTHSCALES = {LOG10_LAM: 3.3, RHO: 0.5, GAMMA: 0.33, ANCHOR_SCALE: 0.33, LOG10_WEIGHT: 0.33}
"""Of a space with one parameter, in the parameter's own units (decades, factors); docs/search.md says where from.

rho scales a group's whole step from the base. lam's effect saturates at both ends of its seven decades, so that along
it the objective changes little. The last three are guesses: a third of the way to the ends of the usual ranges.
"""

SPREAD = 0.5
"""Standard deviation of the logarithms: parameters of a kind differ by a factor of two or so."""


def prior_of(space: Space) -> gp.Prior:
    """Lengthscales by kind of parameter, growing with the root of the dimension: the more parameters, the less each
    of them does alone."""
    units = [LENGTHSCALES[p.name.partition("/")[0]] / (p.high - p.low) for p in space.parameters]
    return gp.Prior.around(np.array(units) * math.sqrt(len(space)), SPREAD)
