"""The paper's operators on plain trees: against their formulas, and the packed form against them, to the bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tap_jax as tap
from tap_jax import blocks
from tap_jax.engine import packed
from tests.engine.test_packed import CLIENTS, LIKE, NAMES, TASKS, cohort, draw, masks, owners, partition, seeds


def leading(clients):
    """Clients' blocks with a client axis; zeros where a client does not own one."""
    zeros = {name: jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), tree) for name, tree in LIKE.items()}
    whole = [zeros | mine for mine in clients]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *whole)


def equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


@settings(max_examples=30, deadline=None)
@given(masks, owners, seeds)
def test_the_packed_aggregate_is_that_of_trees_to_the_bit(touches, tasks, seed):
    p, rng = partition(touches, tasks), np.random.default_rng(seed)
    server, clients, (server_params, params), server_layout, layout = cohort(p, rng)
    samples = rng.integers(0, 50, CLIENTS).astype(np.float32)
    weights = np.where(p.owned, samples[:, None], 0).astype(np.float32)
    found = packed.aggregate(server_params, params, server_layout, layout, weights)
    found = packed.unpack(p, server_layout, found, LIKE)[0]
    equal(blocks.aggregate(server, clients, samples), found)
    arguments = server, leading(clients), blocks.by_block(NAMES, weights)
    equal(blocks.aggregate(*arguments), found)
    # Compiled, products and sums become one operation, which rounds once.
    compiled = jax.jit(blocks.aggregate)(*arguments)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), compiled, found)


@settings(max_examples=30, deadline=None)
@given(masks, owners, seeds, st.sampled_from(["task", "exclusive"]))
def test_the_packed_replacement_is_that_of_trees_to_the_bit(touches, tasks, seed, scope):
    p, rng = partition(touches, tasks), np.random.default_rng(seed)
    _, personal, (_, params), _, layout = cohort(p, rng)
    federated = [draw(rng, p.blocks_of(k)) for k in range(CLIENTS)]
    chosen = blocks.chosen_blocks(rng.random((CLIENTS, TASKS)) < 0.5, p.replaceable(scope))
    found = packed.replace(params, packed.pack(p, layout, federated, LIKE), layout, chosen)
    for k, mine in enumerate(packed.unpack(p, layout, found, LIKE)):
        flags = {name: flag for name, flag in blocks.by_block(NAMES, chosen[k]).items() if name in mine}
        equal(blocks.replace(personal[k], federated[k], flags), mine)
    together = blocks.replace(leading(personal), leading(federated), blocks.by_block(NAMES, chosen))
    vmapped = jax.vmap(blocks.replace)(leading(personal), leading(federated), blocks.by_block(NAMES, chosen))
    equal(together, vmapped)


@settings(max_examples=30, deadline=None)
@given(masks, owners)
def test_a_client_owns_the_union_of_its_tasks_blocks(touches, tasks):
    owned = tap.ownership(tasks, touches)
    for k, mine in enumerate(tasks):
        of_tasks = [{r for r, on in enumerate(touches[o]) if on} for o in range(TASKS) if mine[o]]
        assert set(np.flatnonzero(owned[k])) == set().union(*of_tasks)


def test_the_indicator_is_equation_3():
    local = np.array([[0.50, 0.50, 0.50, np.nan, 0.1]])
    personal = np.array([[0.52, 0.505, np.inf, 9.0, 0.2]])
    seen = np.array([[True, True, True, True, False]])
    assert blocks.replacement_indicator(local, personal, 0.01, seen).tolist() == [[True, False, True, False, False]]


def test_aggregation_has_the_gradient_of_a_weighted_mean():
    server, weights = {"head": jnp.zeros(2)}, jnp.array([3.0, 1.0, 0.0])

    def total(clients):
        return tap.aggregate(server, clients, weights)["head"].sum()

    gradient = jax.grad(total)({"head": jnp.ones((3, 2))})
    np.testing.assert_allclose(gradient["head"], [[0.75] * 2, [0.25] * 2, [0, 0]])


def test_trees_of_any_kind_and_types_are_taken():
    server = {"a": (np.float32(0), [np.zeros(2, np.float16)])}
    found = tap.aggregate(server, [{"a": (np.float32(4), [np.ones(2, np.float16)])}, {}], np.array([1.0, 5.0]))
    assert found["a"][0] == 4 and found["a"][1][0].dtype == jnp.float16
    assert tap.aggregate(server, [{}, {}], np.ones(2)) == server  # the same objects: nobody sends it


def test_trees_that_do_not_belong_together_are_refused():
    server = {"a": np.zeros(2)}
    with pytest.raises(AssertionError):
        tap.aggregate(server, [{"a": np.zeros(1)}], np.ones(1))
    with pytest.raises(AssertionError):
        tap.aggregate(server, [{"a": np.zeros(2)}], np.ones(2))
    with pytest.raises(AssertionError):
        tap.aggregate(server, {"a": np.zeros((3, 2))}, np.ones(2))
    with pytest.raises(AssertionError):
        tap.replace(server, {"a": np.zeros(1)}, {"a": True})
    with pytest.raises(KeyError):
        tap.replace(server, {}, {"a": True})
