# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""What moment matching promises on published posteriors: means to 0.1 standard deviations, these to 8 %."""

import jax
import numpy as np
import pytest
from numpyro.infer import MCMC, NUTS
from reference_posteriors import POSTERIORS

from numpyro_regloss import Loss, forward_kl

# Of four chains. The scale tau of eight schools has heavy tails, whose standard deviation takes more draws.
NUM_SAMPLES = {"eight_schools-eight_schools_noncentered": 8000}


@pytest.mark.long
@pytest.mark.parametrize("posterior", POSTERIORS.values(), ids=POSTERIORS)
def test_moments_of_nuts_draws(posterior, request):
    mcmc = MCMC(
        # Without it the correlated coefficients of regressions take long trees.
        NUTS(posterior.model, dense_mass=True),
        num_warmup=500,
        num_samples=NUM_SAMPLES.get(request.node.callspec.id, 1000),
        num_chains=4,
        chain_method="vectorized",
        progress_bar=False,
    )
    mcmc.run(jax.random.key(0), *posterior.args, **posterior.kwargs)
    loss = Loss.from_model(posterior.model, *posterior.args, **posterior.kwargs)
    fits = {"constrained": forward_kl(mcmc), "unconstrained": forward_kl(mcmc, loss=loss)}
    for space, (gaussian, info) in fits.items():
        summary = getattr(posterior, space)
        assert info.names == summary.names
        mean, sd = np.asarray(gaussian.mean), np.sqrt(np.asarray(gaussian.variance))
        assert np.max(np.abs(mean - summary.mean) / summary.sd) <= 0.1, space
        assert np.max(np.abs(sd / summary.sd - 1.0)) <= 0.08, space
