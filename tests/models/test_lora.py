"""LoRA's dropout: how much it drops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tap_jax.models.lora import dropout

X = jnp.ones(2**20)
KEY = jax.random.key(0)


@pytest.mark.parametrize("rate", [0.0, 1e-6, 2**-17])
def test_a_rate_next_to_zero_drops_nothing(rate):
    np.testing.assert_array_equal(dropout(X, rate, KEY), X)


@pytest.mark.parametrize("rate", [2**-15, 0.3, 0.95])
def test_the_rate_is_met_and_the_mean_kept(rate):
    kept = np.asarray(dropout(X, rate, KEY))
    deviation = np.sqrt(rate * (1 - rate) / X.size)
    assert abs((kept == 0).mean() - rate) < 5 * deviation
    np.testing.assert_allclose(kept[kept != 0], 1 / (1 - rate), rtol=1e-6)
