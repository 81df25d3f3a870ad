"""bmm against fusion-bench 0.2.33's merging functions: python benchmarks/crosscheck/with_fusion_bench.py

TALL masks are its own; that they are counted and applied is done here. WUDI takes 300 Adam steps in both.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from common import Model, Row, main, read, task_vectors
from torch import Tensor

KTH = "keeps one entry more than the k largest"
ROWS = (
    Row("average", "simple_average"),
    Row("task_arithmetic", "task_arithmetic", "", {"scale": 0.4}),
    Row("ties", "ties_mean", KTH, {"density": 0.2}),
    Row("ties", "ties_sum", KTH, {"density": 0.2, "reduce": "sum", "scale": 0.4}),
    Row("tsv", "tsv_m"),
    Row("iso_c", "iso_c"),
    Row("iso_cts", "iso_cts", "rounds shares by another rule; the same here", {"common_share": 0.8}),
    Row("wudi", "wudi", "its Adam is autograd's, ours in closed form"),
    Row("regmean", "regmean", "inverts the sum of Grams", {"off_diagonal": 0.9}, statistics="grams"),
    Row("fisher", "fisher", "adds 1e-6 to every Fisher", {"normalise": "none"}, statistics="fisher"),
    Row("fisher", "fisher_normalised", "adds 1e-6 to every Fisher", {"normalise": "norm"}, statistics="fisher"),
    Row("magmax", "magmax", "", {"scale": 0.5}),
    Row("emr", "emr", "its unified vector, masks aside", {"scale": 1.0}),
    Row("consensus_ta", "consensus_ta", "", {"mask_strength": 0.4, "agree": 2, "scale": 0.3}),
    Row("model_stock", "model_stock", "two experts only; adds 1e-8 to norms", experts=2),
    Row("slerp", "slerp", "", {"t": 0.3}, experts=2),
)


class Holder:
    """As much of a module as its functions ask for: a state dict that can be replaced."""

    def __init__(self, tensors: Model) -> None:
        self.tensors = tensors

    def state_dict(self, **_: object) -> Model:
        return self.tensors

    def load_state_dict(self, tensors: Model) -> None:
        self.tensors = tensors


def simple_average(folder: Path, row: Row) -> Model:
    from fusion_bench.method.simple_average import simple_average as merge

    return merge(read(folder)[1])


def task_arithmetic(folder: Path, row: Row) -> Model:
    from fusion_bench.method.task_arithmetic import task_arithmetic_merge

    base, experts = read(folder)
    return task_arithmetic_merge(Holder(base), [Holder(e) for e in experts], row.knobs["scale"]).state_dict()


def ties(folder: Path, row: Row) -> Model:
    from fusion_bench.method.ties_merging import ties_merging_utils as utils

    base, taus = task_vectors(folder)
    flat = torch.stack([utils.state_dict_to_vector(tau) for tau in taus])  # (T, parameters)
    merged = utils.ties_merging(flat, reset_thresh=row.knobs["density"], merge_func=f"dis-{row.theirs[5:]}")
    tau = utils.vector_to_state_dict(merged, base)
    return {n: w + row.knobs.get("scale", 1.0) * tau[n] for n, w in base.items()}


def spectral(merge: Callable[[list[Model]], Model]) -> Callable[[Path, Row], Model]:
    """A function from task vectors to the merged one, as a function of the folder."""

    def run(folder: Path, row: Row) -> Model:
        base, taus = task_vectors(folder)
        merged = merge(taus)
        return {n: w + merged[n] for n, w in base.items()}

    return run


def tsv_m(taus: list[Model]) -> Model:
    from fusion_bench.method.task_singular_vector.utils import TSVM_utils

    return TSVM_utils.compute_and_sum_svd_mem_reduction(taus, accelerator="cpu")


def iso_c(taus: list[Model]) -> Model:
    from fusion_bench.method.isotropic_merging.iso_utils import iso_c as merge

    return merge(taus, accelerator="cpu")


def iso_cts(taus: list[Model]) -> Model:
    from fusion_bench.method.isotropic_merging.iso_utils import iso_cts as merge

    return merge(taus, common_space_fraction=0.8, accelerator="cpu")


def wudi(taus: list[Model]) -> Model:
    from fusion_bench.method.wudi.wudi import wudi_merging

    return wudi_merging(taus, accelerator="cpu", iter_num=300)


def magmax(taus: list[Model]) -> Model:
    from fusion_bench.method.magmax.magmax import _magmax_select

    return {n: 0.5 * w for n, w in _magmax_select(taus).items()}


def emr(taus: list[Model]) -> Model:
    from fusion_bench.method.emr_merging.utils import emr_merge

    return emr_merge(taus)[0]


def consensus_ta(taus: list[Model]) -> Model:
    from fusion_bench.method.tall_mask.task_arithmetic import generate_task_masks

    total = {n: sum((tau[n] for tau in taus), torch.zeros(())) for n in taus[0]}
    zeros = {n: torch.zeros_like(w) for n, w in total.items()}
    masks = [generate_task_masks(total, tau, zeros, 0.4) for tau in taus]
    agree = {n: sum((mask[n] for mask in masks), torch.zeros(())) >= 2 for n in total}
    return {n: 0.3 * w * agree[n] for n, w in total.items()}


def stacked(folder: Path) -> dict[str, list[Tensor]]:
    """The experts' values by parameter name, a list a parameter."""
    experts = read(folder)[1]
    return {n: [e[n] for e in experts] for n in experts[0]}


def regmean(folder: Path, row: Row) -> Model:
    from fusion_bench.method.regmean.regmean import merging_with_regmean_weights

    grams = read(folder, file="grams.statistic")[1]
    by_module = [{n.removesuffix(".weight"): g for n, g in each.items()} for each in grams]
    return merging_with_regmean_weights(stacked(folder), by_module, reduce_non_diagonal_ratio=0.9)


def fisher(folder: Path, row: Row) -> Model:
    from fusion_bench.method.fisher_merging.fisher_merging import merging_with_fisher_weights

    fishers = read(folder, file="fisher.statistic")[1]
    return merging_with_fisher_weights(
        stacked(folder), fishers, torch.ones(row.experts), normalize_fisher_weight=row.theirs == "fisher_normalised"
    )


def model_stock(folder: Path, row: Row) -> Model:
    from fusion_bench.method.model_stock import model_stock as module

    base, (first, second) = read(folder, 2)
    ratios = module.compute_ratio(module.compute_angle(first, second, base))
    return module.merge_weights(first, second, base, ratios)


def slerp(folder: Path, row: Row) -> Model:
    from fusion_bench.method.slerp.slerp_utils import slerp as along

    _, (first, second) = read(folder, 2)
    return {n: along(row.knobs["t"], first[n], second[n]) for n in first}


PEERS = {
    "simple_average": simple_average, "task_arithmetic": task_arithmetic, "ties_mean": ties, "ties_sum": ties,
    "regmean": regmean, "fisher": fisher, "fisher_normalised": fisher, "model_stock": model_stock, "slerp": slerp,
} | {f.__name__: spectral(f) for f in (tsv_m, iso_c, iso_cts, wudi, magmax, emr, consensus_ta)}  # fmt: skip


def peer(folder: Path, row: Row) -> Model:
    return PEERS[row.theirs](folder, row)


if __name__ == "__main__":
    main("fusion_bench", "0.2.33", __file__, ROWS, peer)
