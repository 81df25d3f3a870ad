"""Every anchor method on the family of models."""

import torch

from bmm.anchors import merge

from .models import SHAPES, fisher_for, grams_for

FLOATING = list(SHAPES)


WRAPPED = ["task_arithmetic+lines", "ties+lines", "tsv+lines", "regmean+lines"]


def fit(anchor, experts):
    """The number of experts nearest to the wanted one that the method takes."""
    fewest, most = anchor.experts
    return max(fewest, min(experts, most or experts))


def closeness(base):
    """A score for greedy soups: how near to the base a model is."""

    def score(model):
        return -sum(float((model[k].detach().double() - w.detach().double()).square().sum()) for k, w in base.items())

    return score


def statistics(anchor, base, experts):
    """Every statistic the anchor needs. Fishers follow the content of base and experts, so that they are permuted,
    repeated, dropped and turned with them; Grams go by the expert's number and have to be permuted by hand."""
    made = {
        "grams": lambda: ("grams", grams_for(base, len(experts))),
        "sequential_grams": lambda: ("grams", grams_for(base, len(experts))),
        "fisher": lambda: ("fisher", [fisher_for(e) for e in experts] if isinstance(experts, list) else []),
        "base_fisher": lambda: ("base_fisher", fisher_for(base)),
        "score": lambda: ("score", closeness(base)),
    }
    return dict(made[need]() for need in anchor.needs)


def run(anchor, base, experts, **options):
    return merge(anchor.name, base, experts, **(statistics(anchor, base, experts) | options))


def assert_close(a, b, tolerance=1e-5):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")
