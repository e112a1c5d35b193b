"""Per-FedAvg: first-order and exact, a run against its oracle and a quadratic against closed forms."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tap_jax import experiment as experiments
from tap_jax.methods.per_fedavg import meta_step
from tests.methods.oracles import PerFedAvg
from tests.trajectories import alive, check_federated, play

ROWS = ({"ag_news": 0.2}, {"cifar100": 0.5, "ag_news": 0.5}, {"cifar100": 0.4})
SETTINGS = {
    "method": "per_fedavg",
    "variants": ("per-fedavg", "per-fedavg+post"),
    "batch_size": 6,
    "engine.microbatch": 4,
    "optimizer.learning_rate_initial": 5e-5,
    "optimizer.learning_rate": 1e-4,
    "optimizer.post_learning_rate": 3e-5,
    "per_fedavg.inner_scale": 2000.0,  # an inner step that counts: of up to 0.2 times the gradient
}


@pytest.fixture(scope="module", params=["none", "exact"])
def experiment(request, tiny):
    fields = {"per_fedavg.hessian": request.param}
    if request.param == "exact":  # second derivatives of the routed backbone compile long
        fields |= {"model.backbone": "standard"}
    else:
        fields |= {"mesh.clients": 2}
    return alive(experiments.build(tiny(ROWS, SETTINGS | fields)))


@pytest.fixture(scope="module")
def run(experiment):
    return play(experiment)


def test_run_equals_oracle(experiment, run):
    """Two minibatches a step, clipping, AdamW, aggregation, post-training."""
    assert run[1].models["per-fedavg"] is None, "the server's blocks"
    check_federated(experiment, run, PerFedAvg(experiment))


def test_the_comparison_notices(experiment, run):
    """First order for exact, no inner step, one minibatch for both steps, no clipping."""
    other, short = (experiment.config.copy_and_resolve_references() for _ in range(2))
    other.per_fedavg.hessian = "none"
    short.per_fedavg.inner_scale = 1e-9
    faults = [(short, ""), (experiment.config, "one minibatch"), (experiment.config, "clip")]
    for config, fault in [*faults, (other, "")][: 4 if experiment.config.per_fedavg.hessian == "exact" else 3]:
        wrong = PerFedAvg(experiment, fault)
        wrong.config = config
        with pytest.raises(AssertionError):
            check_federated(experiment, run, wrong)


@pytest.mark.parametrize("exact", [False, True])
def test_the_outer_gradient_of_a_quadratic(exact):
    """f(w; D) = ½ (w - d)ᵀ A (w - d): ∇f(w') = A (w - αA(w - d) - d'), exactly (I - αA) times that."""
    rng = np.random.default_rng(0)
    root, (w, d, d_outer) = rng.standard_normal((4, 4)), rng.standard_normal((3, 4))
    A, eta, scale = root @ root.T, 0.05, 1.5
    centres = jnp.array([d, d_outer])

    def gradient(params, auxiliary=None, *, minibatch=0):
        away = params["w"] - centres[minibatch]
        return {"w": A @ away}, 0.5 * away @ A @ away

    tools = types.SimpleNamespace(
        rate={"w": eta}, no_losses=jnp.zeros(()), gradient=gradient, update=lambda params, state, g: (g, state)
    )
    step = meta_step(scale=scale, exact=exact)
    outer, state, loss = step(tools, {"w": jnp.array(w)}, "state", None)

    alpha = scale * eta
    adapted = w - alpha * A @ (w - d)
    first_order = A @ (adapted - d_outer)
    expected = (np.eye(4) - alpha * A) @ first_order if exact else first_order
    np.testing.assert_allclose(outer["w"], expected, rtol=2e-5)
    assert state == "state"
    assert loss == pytest.approx(0.5 * (adapted - d_outer) @ A @ (adapted - d_outer), rel=1e-5)
    if exact:  # which is the gradient of the loss after the inner step
        f = lambda w, d: 0.5 * (w - d) @ A @ (w - d)  # noqa: E731
        found = jax.grad(lambda w: f(w - alpha * jax.grad(f)(w, d), d_outer))(jnp.array(w))
        np.testing.assert_allclose(outer["w"], found, rtol=2e-5)
