"""A method that diverges is reported as such, where it did, and stops nobody."""

import jax
import numpy as np
import pytest

from tap_jax import experiment as experiments

ROWS = ({"ag_news": 0.3}, {"cifar100": 0.5}, {"cifar100": 0.4})
METHODS = {
    "per_fedavg": ("per-fedavg", "per-fedavg+post"),
    "feddat": ("feddat", "feddat+post"),
}


@pytest.mark.parametrize("method", METHODS)
def test_a_diverged_run_has_no_values(tiny, method):
    settings = {
        "method": method,
        "variants": METHODS[method],
        "rounds": 1,
        "post_steps": 2,
        "local_steps": 2,
        "optimizer.learning_rate_initial": 1e30,
        "optimizer.learning_rate": 1e30,
        "feddat.bottleneck": 2,
    }
    experiment = experiments.build(tiny(ROWS, settings))
    state, line = experiment.round(experiment.init())
    clients = set(line["clients"])
    for i in clients:
        (loss,) = line["losses"]["federated"][str(i)].values()
        assert loss is None
    # Nobody was heard, so the server's blocks are what they were.
    server = experiment.engine.server_blocks(state.server)
    for name, tree in experiment.initial_blocks.items():
        jax.tree.map(np.testing.assert_array_equal, server[name], tree)
    rows = experiment.evaluate(experiment.finish(state))
    lost = {name for i in clients for name in experiment.federation.clients[i].shares}
    assert {(row["variant"], row["client"]) for row in rows} == {(v, i) for v in METHODS[method] for i in range(3)}
    for row in rows:
        assert row["value"] is None or np.isfinite(row["value"])
        if row["variant"] == "per-fedavg":  # the server's blocks: lost where nobody who took part was heard
            assert (row["value"] is None) == (row["task"] in lost), row
        elif method == "feddat":  # whose clients keep the adapters that they broke
            assert (row["value"] is None) == (row["client"] in clients), row
        else:  # trained after the last round, at a rate that is none too high, from the server's blocks
            assert row["value"] is not None, row
