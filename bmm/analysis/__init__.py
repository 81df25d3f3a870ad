"""What a study's rows tell: which hyperparameters mattered, how, and how far the answers can be trusted."""

from .records import (
    Ablation,
    Analysis,
    Certainty,
    Difference,
    Effect,
    Expectation,
    Importance,
    Prediction,
    Progress,
)
from .rows import MIN_TRIALS, analyse_rows
from .sobol import sobol_indices

__all__ = [
    "Ablation", "Analysis", "Certainty", "Difference", "Effect", "Expectation", "Importance", "MIN_TRIALS",
    "Prediction", "Progress", "analyse_rows", "sobol_indices",
]  # fmt: skip
