"""A fully Bayesian Gaussian process under the SAAS prior, through BoTorch and NumPyro."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from bmm.records import Trial
from bmm.search import gp
from bmm.search.engines.botorch import Array, BotorchEngine

WARMUP, SAMPLES, THINNING = 128, 128, 8
"""Of the No-U-Turn sampler: steps before the first sample, samples, and of how many one is kept."""


class SaasboEngine(BotorchEngine):
    """SAASBO (arXiv 2103.00349): the prior expects that few of the parameters matter, and the data say which.

    The objective alone is modelled, by a mixture of as many Gaussian processes as samples are kept; the acquisition is
    that of `BotorchEngine`. JAX compiles the sampler anew for every number of rows: seconds a suggestion.
    """

    key, name = "saasbo", "SAASBO"

    def load(self) -> None:
        super().load()
        import jax  # noqa: F401
        import numpyro  # noqa: F401
        from botorch.models.fully_bayesian import SaasFullyBayesianSingleTaskGP  # noqa: F401

    def model(self, number: int, x: Array, rows: Sequence[Trial]) -> Any:
        import jax
        import torch
        from botorch.fit import fit_fully_bayesian_model_nuts
        from botorch.models.fully_bayesian import SaasFullyBayesianSingleTaskGP

        jax.clear_caches()  # of other numbers of rows: after some hundred the process may map no more memory
        standard, *_ = gp.standardised(np.array([row.objective for row in rows], dtype=np.float64))  # (n,)
        with jax.default_device(jax.devices("cpu")[0]), jax.enable_x64(True):
            model = SaasFullyBayesianSingleTaskGP(torch.from_numpy(x), torch.from_numpy(standard)[:, None])
            fit_fully_bayesian_model_nuts(
                model,
                warmup_steps=WARMUP,
                num_samples=SAMPLES,
                thinning=THINNING,
                disable_progbar=True,
                seed=self.stream(number),
            )
        return model
