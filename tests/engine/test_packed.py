"""Properties of packed parameters: what aggregation and replacement may touch, and what they must leave alone."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tap_jax import blocks
from tap_jax.blocks import Partition
from tap_jax.engine import packed

CLIENTS, TASKS = 4, 3
NAMES = ("encoder/text", "head/a", "head/b", "mote/text/attention", "mote/shared/attention", "mote/image/attention")
GROUPS = ("encoder/text", "head", "head", "mote/attention", "mote/attention", "mote/attention")
SHAPES = {"encoder/text": {"w": (2, 3), "b": (3,)}, "head": {"w": (4,)}, "mote/attention": {"a": (1, 2), "d": (2, 2)}}
LIKE = {
    name: {leaf: jax.ShapeDtypeStruct(shape, np.float32) for leaf, shape in SHAPES[group].items()}
    for name, group in zip(NAMES, GROUPS, strict=True)
}

masks = st.lists(st.lists(st.booleans(), min_size=len(NAMES), max_size=len(NAMES)), min_size=TASKS, max_size=TASKS)
owners = st.lists(st.lists(st.booleans(), min_size=TASKS, max_size=TASKS), min_size=CLIENTS, max_size=CLIENTS)
seeds = st.integers(0, 2**31)


def partition(touches, tasks) -> Partition:
    return Partition(NAMES, GROUPS, np.array(touches), np.array(tasks))


def draw(rng, names=NAMES):
    return {
        name: {leaf: rng.normal(size=like.shape).astype(np.float32) for leaf, like in LIKE[name].items()}
        for name in names
    }


def cohort(p: Partition, rng):
    """Server and clients with random blocks, packed and by name."""
    server, server_layout = draw(rng), packed.server_layout(p)
    layout = packed.lay_out(p, p.owned)
    clients = [draw(rng, p.blocks_of(k)) for k in range(CLIENTS)]
    both = packed.pack(p, server_layout, [server], LIKE), packed.pack(p, layout, clients, LIKE)
    return server, clients, both, server_layout, layout


@settings(max_examples=30, deadline=None)
@given(masks, owners, seeds)
def test_pack_and_unpack_are_inverse(touches, tasks, seed):
    p = partition(touches, tasks)
    server, clients, (server_params, params), server_layout, layout = cohort(p, np.random.default_rng(seed))
    jax.tree.map(np.testing.assert_array_equal, packed.unpack(p, layout, params, LIKE), clients)
    jax.tree.map(np.testing.assert_array_equal, packed.unpack(p, server_layout, server_params, LIKE), [server])


@settings(max_examples=30, deadline=None)
@given(masks, owners, seeds)
def test_private_blocks_have_their_owners_but_are_never_sent(touches, tasks, seed):
    public = partition(touches, tasks)
    p, twins = public.with_private(NAMES[1:4]), [blocks.PRIVATE + name for name in NAMES[1:4]]
    assert p.names == (*NAMES, *twins) and [n for n, s in zip(p.names, p.sent, strict=True) if not s] == twins
    for k in range(CLIENTS):
        mine = set(public.blocks_of(k))
        assert set(p.blocks_of(k)) == mine | {t for t in twins if t.removeprefix(blocks.PRIVATE) in mine}
    # A private group can be packed without the others: a model of what a client keeps to itself.
    rng, like = np.random.default_rng(seed), {t: LIKE[t.removeprefix(blocks.PRIVATE)] for t in twins}
    clients = [
        {
            t: jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), like[t])
            for t in p.blocks_of(k)
            if t in like
        }
        for k in range(CLIENTS)
    ]
    layout = packed.lay_out(p, p.owned)
    params = packed.pack(p, layout, clients, like)
    assert all(group.startswith(blocks.PRIVATE) for group in params)
    jax.tree.map(np.testing.assert_array_equal, packed.unpack(p, layout, params, like), clients)


@settings(max_examples=30, deadline=None)
@given(masks, owners, seeds)
def test_broadcast_gives_every_client_its_blocks_of_the_server(touches, tasks, seed):
    p = partition(touches, tasks)
    server, _, (server_params, _), server_layout, layout = cohort(p, np.random.default_rng(seed))
    sent = packed.unpack(p, layout, packed.broadcast(server_params, server_layout, layout), LIKE)
    for client, mine in enumerate(sent):
        assert set(mine) == set(p.blocks_of(client))
        jax.tree.map(np.testing.assert_array_equal, mine, {name: server[name] for name in mine})


@settings(max_examples=30, deadline=None)
@given(masks, owners, seeds, st.booleans())
def test_aggregation_is_a_weighted_mean_per_block(touches, tasks, seed, silence):
    p, rng = partition(touches, tasks), np.random.default_rng(seed)
    server, clients, (server_params, params), server_layout, layout = cohort(p, rng)
    samples = rng.integers(1, 50, CLIENTS).astype(np.float32)
    if silence:  # a client without a say may hold anything
        samples[0] = 0
        clients[0] = jax.tree.map(lambda leaf: np.full_like(leaf, np.nan), clients[0])
        params = packed.pack(p, layout, clients, LIKE)
    weights = np.where(p.owned, samples[:, None], 0).astype(np.float32)
    new = packed.unpack(
        p, server_layout, packed.aggregate(server_params, params, server_layout, layout, weights), LIKE
    )[0]
    for r, name in enumerate(NAMES):
        senders = [k for k in range(CLIENTS) if weights[k, r] > 0]
        if not senders:  # nobody sent it: the same bits
            jax.tree.map(np.testing.assert_array_equal, new[name], server[name])
            continue
        for leaf in LIKE[name]:
            sent = np.stack([clients[k][name][leaf] for k in senders])
            mean = np.average(sent.astype(np.float64), axis=0, weights=weights[senders, r])
            np.testing.assert_allclose(new[name][leaf], mean, rtol=1e-5, atol=1e-6)
            assert (new[name][leaf] <= sent.max(0) + 1e-5).all() and (new[name][leaf] >= sent.min(0) - 1e-5).all()


@settings(max_examples=15, deadline=None)
@given(masks, owners, seeds)
def test_aggregation_does_not_care_for_the_order_of_clients(touches, tasks, seed):
    p, rng = partition(touches, tasks), np.random.default_rng(seed)
    _, clients, (server_params, params), server_layout, layout = cohort(p, rng)
    weights = np.where(p.owned, rng.integers(1, 9, CLIENTS)[:, None], 0).astype(np.float32)
    order = rng.permutation(CLIENTS)
    shuffled_layout = packed.lay_out(p, p.owned[order])
    shuffled = packed.pack(p, shuffled_layout, [clients[k] for k in order], LIKE)
    one = packed.aggregate(server_params, params, server_layout, layout, weights)
    other = packed.aggregate(server_params, shuffled, server_layout, shuffled_layout, weights[order])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), one, other)


@settings(max_examples=30, deadline=None)
@given(masks, owners, seeds, st.sampled_from(["task", "exclusive"]))
def test_replacement_takes_exactly_the_blocks_of_the_replaced_tasks(touches, tasks, seed, scope):
    p, rng = partition(touches, tasks), np.random.default_rng(seed)
    _, personal, (_, params), _, layout = cohort(p, rng)
    federated = [draw(rng, p.blocks_of(k)) for k in range(CLIENTS)]
    replaced = rng.random((CLIENTS, TASKS)) < 0.5
    chosen = blocks.chosen_blocks(replaced, p.replaceable(scope))
    out = packed.replace(params, packed.pack(p, layout, federated, LIKE), layout, chosen)
    for k, mine in enumerate(packed.unpack(p, layout, out, LIKE)):
        taken = set()
        for o in range(TASKS):
            if replaced[k, o] and p.task_mask[k, o]:
                of_task = {r for r in range(len(NAMES)) if p.touches[o, r]}
                if scope == "exclusive":
                    others = [q for q in range(TASKS) if q != o and p.task_mask[k, q]]
                    of_task -= {r for q in others for r in range(len(NAMES)) if p.touches[q, r]}
                taken |= {NAMES[r] for r in of_task}
        for name in p.blocks_of(k):
            expected = federated[k][name] if name in taken else personal[k][name]
            jax.tree.map(np.testing.assert_array_equal, mine[name], expected)


def test_more_owned_blocks_than_slots_is_an_error():
    p = partition([[True] * len(NAMES)] * TASKS, [[True] * TASKS] * CLIENTS)
    with pytest.raises(ValueError, match="owned blocks"):
        packed.lay_out(p, p.owned, dict.fromkeys(GROUPS, 1))


def test_params_that_do_not_belong_together_are_refused():
    """A row too few or a weight too few would be broadcast or clipped, silently."""
    p = partition(np.ones((TASKS, len(NAMES)), bool), np.ones((CLIENTS, TASKS), bool))
    _, _, (server, params), of_server, layout = cohort(p, np.random.default_rng(0))
    weights, chosen = np.ones(p.owned.shape, np.float32), np.ones(p.owned.shape, bool)
    short = {group: matrix[:1] for group, matrix in params.items()}
    with pytest.raises(AssertionError):
        packed.aggregate(server, short, of_server, layout, weights)
    with pytest.raises(AssertionError):
        packed.aggregate(server, params, of_server, layout, weights[:1])
    with pytest.raises(AssertionError):
        packed.replace(params, short, layout, chosen)
    with pytest.raises(AssertionError):
        packed.replace(params, params, layout, chosen[:, :1])
