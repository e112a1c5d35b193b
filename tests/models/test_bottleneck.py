"""FedDAT's adapters: the literal formula behind every feed-forward network, values and gradients, and pairs of them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tap_jax.blocks import count
from tap_jax.engine.packed import members
from tap_jax.errors import UserError
from tap_jax.models.bottleneck import dual, init_bottleneck
from tap_jax.models.server_model import ServerModel
from tap_jax.tasks import find_task
from tests.models import reference
from tests.models.reference import close
from tests.models.test_server_model import CONFIG, make_batch

pytestmark = pytest.mark.usefixtures("strict")

R = 7  # no other size of CONFIG
LEAVES = {"down", "down_bias", "up", "up_bias"}
FLAVA = dataclasses.replace(CONFIG, bottleneck=R, backbone_layers=(1, 2))
VILT = dataclasses.replace(FLAVA, name="vilt", backbone_layers=(2, 1), position_grid=4)
CONFIGS = {
    "flava": FLAVA,
    "vilt": VILT,
    "flava, standard": dataclasses.replace(FLAVA, backbone="standard"),
    "vilt, standard": dataclasses.replace(VILT, backbone="standard"),
}
TASKS = tuple(map(find_task, ("ag_news", "vqa", "cifar100")))


def adapter(rng, size, *lead, width=12):
    shapes = jax.eval_shape(lambda: init_bottleneck(jax.random.key(0), width, size, lead))
    return reference.random_weights(shapes, rng)


def random(model, seed=3):
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    frozen, blocks = reference.random_weights(shapes, np.random.default_rng(seed))
    return jax.device_put(frozen), blocks


@pytest.mark.parametrize("name", ["flava", "vilt"])
@pytest.mark.parametrize("task", ["ag_news", "vqa"])
def test_routed_model_is_the_literal_one_in_torch(name, task):
    """Values, latents, and the gradient of every adapter: encoders, experts, domain experts."""
    model, task = ServerModel(CONFIGS[name], TASKS), find_task(task)
    stream = task.streams[0]
    frozen, blocks = random(model)
    batch = {field: x[:1] for field, x in make_batch(task, np.random.default_rng(5)).items()}
    mine = {block: blocks[block] for block in model.blocks_of(stream) if not block.startswith("head/")}
    head = {f"head/{task.head}": blocks[f"head/{task.head}"]}
    upstream = np.random.default_rng(6).standard_normal((1, model.config.width)).astype(np.float32)

    @jax.jit
    def run(mine):
        def mean(mine):
            return model.represent(frozen, model.collect(mine | head, stream), task, batch).mean(1)

        ours, pullback = jax.vjp(mean, mine)
        return ours, model.forward(frozen, model.collect(mine | head, stream), task, batch)[1], *pullback(upstream)

    ours, latents, gradient = run(mine)
    theirs = reference.as_leaves(mine)
    expected, expected_latents = reference.represent(model.config, frozen, theirs, task, stream.domain, batch)
    close(ours, expected, 1e-4)
    close(latents, expected_latents, 1e-4)
    (expected * torch.tensor(upstream)).sum().backward()
    adapters = {block for block in mine if block in model.adapter_blocks}
    assert adapters == {block for block, tree in mine.items() if set(tree) == LEAVES}
    for block in adapters:
        expected = reference.gradients(theirs[block])
        for leaf, ours in gradient[block].items():
            assert np.abs(expected[leaf]).max() > 1e-6, (block, leaf)
            close(ours, expected[leaf], 1e-4)


@pytest.mark.parametrize("lead", [(), (3,), (3, 2)])
def test_dual_is_half_of_each(lead):
    rng = np.random.default_rng(1)
    first, second, f = adapter(rng, 4, *lead), adapter(rng, 5, *lead), rng.standard_normal((6, 12)).astype(np.float32)
    both = dual(first, second)
    assert {name: leaf.shape for name, leaf in both.items()} == {
        "down": (*lead, 12, 9), "down_bias": (*lead, 9), "up": (*lead, 9, 12), "up_bias": (*lead, 12),
    }  # fmt: skip
    for at in np.ndindex(lead):
        a, b, ab = (
            reference.bottleneck({name: np.asarray(leaf)[at] for name, leaf in tree.items()}, torch.tensor(f))
            for tree in (first, second, both)
        )
        close(ab.numpy(), 0.5 * a + 0.5 * b)
        assert (a - b).abs().max() > 0.1


@pytest.mark.parametrize("name", CONFIGS)
def test_dual_model_joins_adapters_and_keeps_the_rest_of_the_first(name):
    """On parts as on blocks; of the shapes of a model twice as wide, and run by the same model."""
    model, task = ServerModel(CONFIGS[name], TASKS), find_task("vqa")
    stream = task.streams[0]
    (frozen, first), (_, second) = random(model, 3), random(model, 4)
    both = model.dual(first, second)
    wide = ServerModel(dataclasses.replace(model.config, bottleneck=2 * R), TASKS)
    like = jax.eval_shape(wide.init, jax.random.key(0))[1]
    assert jax.tree.map(np.shape, both) == jax.tree.map(lambda leaf: leaf.shape, like)
    for block in model.block_names:
        if block in model.adapter_blocks:
            jax.tree.map(np.testing.assert_array_equal, both[block], dual(first[block], second[block]))
        else:
            assert both[block] is first[block]
    parts = model.dual(model.collect(first, stream), model.collect(second, stream))
    jax.tree.map(np.testing.assert_array_equal, parts, model.collect(both, stream))

    # A0 on both sides is A0; with an A2 that is nothing, half of A0 is left.
    batch = make_batch(task, np.random.default_rng(5))
    run = jax.jit(lambda parts: model.represent(frozen, parts, task, batch))
    parts = model.collect(first, stream)
    close(run(model.dual(parts, parts)), np.asarray(run(parts)), 1e-4)
    nothing, halved = (
        {
            block: tree | {leaf: factor * tree[leaf] for leaf in ("up", "up_bias")}
            if block in model.adapter_blocks
            else tree
            for block, tree in first.items()
        }
        for factor in (0, 0.5)
    )
    half = run(model.collect(halved, stream))
    close(run(model.dual(parts, model.collect(nothing, stream))), np.asarray(half), 1e-4)
    assert np.abs(half - run(parts)).max() > 1e-2


def test_only_bottlenecks_have_duals():
    model = ServerModel(CONFIG, TASKS)
    assert model.adapter_blocks == ()
    with pytest.raises(ValueError, match="no bottleneck adapters"):
        model.dual({}, {})
    with pytest.raises(UserError, match="feddat.bottleneck: -1; use more than 0"):
        ServerModel(dataclasses.replace(CONFIG, bottleneck=-1), TASKS)


@pytest.mark.parametrize("name", CONFIGS)
def test_blocks_of_bottlenecks(name):
    """Names and parameters counted by hand, groups of equal shapes, a start at the frozen map."""
    model = ServerModel(CONFIGS[name], (find_task("ag_news"),))
    c = model.config
    one = c.width * R + R + R * c.width + c.width
    mote, mome = c.backbone_layers
    glue = c.width * c.width + c.width + 2 * c.width
    expected = {"encoder/text": glue}
    if c.name == "flava":
        expected["encoder/text/adapters"] = c.text_layers * one
    if c.backbone == "standard":
        expected["backbone"] = (mote + mome) * one
    else:
        expected["shared_proj"] = c.width * c.width + c.width
        for stage, depth, mine, other in (
            ("mote", mote, "text", "text_classification"),
            ("mome", mome, "text_classification", "text"),
        ):
            expected |= {f"{stage}/{stack}/domain/news": 2 * depth * one for stack in (mine, "shared")}
            routes = ((mine, other), (mine, "shared"), ("shared", other), ("shared", "shared"))
            expected |= {f"{stage}/{stack}/expert/{choice}": depth * one for stack, choice in routes}
    _, blocks = model.init(jax.random.key(0))
    head = count(blocks.pop("head/ag_news"))
    assert {block: count(tree) for block, tree in blocks.items()} == expected
    assert head == 12 * 7 + 7 + 7 * 4 + 4
    assert set(model.adapter_blocks) == {block for block, tree in blocks.items() if set(tree) == LEAVES}
    assert set(model.adapter_blocks) == set(expected) - {"encoder/text", "shared_proj"}
    for block in model.adapter_blocks:
        assert not any(np.any(blocks[block][leaf]) for leaf in LEAVES - {"down"})
        down = np.abs(blocks[block]["down"])
        assert 0.9 / np.sqrt(c.width) < down.max() <= 1 / np.sqrt(c.width)
        assert down.mean() == pytest.approx(0.5 / np.sqrt(c.width), rel=0.2)
    partition = model.partition(np.ones((1, 1), bool))
    shapes = jax.tree.map(jnp.shape, blocks)
    for group, blocks_of_group in members(partition).items():
        names = [partition.names[r] for r in blocks_of_group]
        if not group.startswith("head/"):
            assert all(shapes[member] == shapes[names[0]] for member in names)
            assert len(blocks_of_group) == {"mote/expert": 4, "mome/expert": 4, "mote/domain": 2, "mome/domain": 2}.get(
                group, 1
            )
