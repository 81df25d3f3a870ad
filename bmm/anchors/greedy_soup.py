"""Greedy soup: the average of those experts that improve it, judged by a score on held-out data."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..checkpoint import fingerprint_tensors
from ..errors import MergeError
from ..notation import Tensors
from .anchor import Context, TaskVectors, Whole, weighted_mean


@dataclass(frozen=True)
class Soup:
    """The chosen experts by index, in the order they were added, and the soup's score."""

    ingredients: tuple[int, ...]
    score: float


@dataclass(frozen=True)
class _Candidate(Mapping[str, Tensor]):
    """The average of some experts as a model, a tensor at a time as it is asked for; the rest is the base's."""

    whole: Whole
    ingredients: tuple[int, ...]

    def __getitem__(self, name: str) -> Tensor:
        base = self.whole.base[name].detach()
        if not base.is_floating_point():
            return base
        shares = self.whole.weights[list(self.ingredients)].double()
        total = torch.zeros_like(base, dtype=torch.float64)
        for t, share in zip(self.ingredients, (shares / shares.sum()).tolist(), strict=True):
            total += share * self.whole.experts[t][name].detach().to(total)
        return total if base.dtype == total.dtype else total.float()

    def __iter__(self) -> Iterator[str]:
        return iter(self.whole.base)

    def __len__(self) -> int:
        return len(self.whole.base)


def scan_greedy_soup(stream: TaskVectors, knobs: Mapping[str, Any], whole: Whole) -> Soup:
    """Choose the ingredients (arXiv 2203.05482, recipe 1).

    Experts are sorted by their own score, best first, and each is added where the soup with it scores no less than the
    soup without. Equal scores are ordered by a hash of the weights, so that the order of the experts decides nothing.
    Costs 2 T - 1 scores; experts are read from where they lie for each, and a candidate's tensors are made as the score
    asks for them.
    """
    for _ in stream:
        pass  # one reading by the driver refuses experts that do not agree, before any of them is scored
    count = len(whole.experts)
    own = [_score(whole, (t,)) for t in range(count)]
    order = _best_first(own, whole.experts)
    soup = Soup((order[0],), own[order[0]])
    for t in order[1:]:
        larger = (*soup.ingredients, t)
        score = _score(whole, larger)
        if score >= soup.score:
            soup = Soup(larger, score)
    return soup


def _score(whole: Whole, ingredients: tuple[int, ...]) -> float:
    assert whole.score is not None  # the driver asks for it: `needs`
    score = float(whole.score(_Candidate(whole, ingredients)))
    if not math.isfinite(score):
        who = "+".join(f"experts[{t}]" for t in ingredients)
        raise MergeError(f"the score of {who} is {score}", "the score must be a finite number, higher is better")
    return score


def _best_first(scores: Sequence[float], experts: Sequence[Tensors]) -> list[int]:
    """Indices by falling score; only where scores are equal are the experts' contents hashed."""
    tied = {t for t, score in enumerate(scores) if scores.count(score) > 1}
    return sorted(
        range(len(scores)), key=lambda t: (-scores[t], fingerprint_tensors(experts[t]) if t in tied else "", t)
    )


def greedy_soup(taus: Tensor, context: Context) -> Tensor:
    """``d``: the (weighted) mean of the chosen experts' task vectors (arXiv 2203.05482): (T, *shape) -> (*shape).

    Task weights weigh the ingredients, as in `average`; the published soup has none. One expert gives that expert.
    """
    chosen = list(context.state.ingredients)
    return weighted_mean(taus[chosen], context.weights[chosen])
