"""The standard backbone against Hugging Face's layers and PEFT: values and gradients."""

import dataclasses

import jax
import numpy as np
import peft
import pytest
import torch

from tap_jax.blocks import count
from tap_jax.errors import UserError
from tap_jax.models import checkpoints, standard
from tap_jax.models.server_model import ServerModel
from tap_jax.models.token_layout import TokenLayout
from tap_jax.tasks import find_task
from tap_jax.token_logits import whole
from tests.models import huggingface, reference
from tests.models.reference import close
from tests.models.test_server_model import CONFIG, make_batch

pytestmark = pytest.mark.usefixtures("strict")

FLAVA = dataclasses.replace(CONFIG, backbone="standard", backbone_layers=(1, 2), lora_alpha_ratio=1.5)
VILT = dataclasses.replace(FLAVA, name="vilt", backbone_layers=(2, 1), position_grid=4)
CONFIGS = {"flava": FLAVA, "vilt": VILT}
TASKS = tuple(map(find_task, ("ag_news", "vqa", "cifar100")))
MASK = np.arange(5) < np.array([[5], [3]])


def random(model):
    return reference.random_weights(jax.eval_shape(model.init, jax.random.key(0)), np.random.default_rng(3))


def run(config, frozen, block, x, upstream):
    """Token means and their gradient in the block."""

    @jax.jit
    def both(block):
        ours, pullback = jax.vjp(
            lambda b: standard.run_stack(config, frozen["backbone"], b, x, TokenLayout(MASK)), block
        )
        return ours, *pullback(upstream)

    return both(block)


def token_mean(states):
    return torch.stack([rows[:length].mean(0) for rows, length in zip(states, MASK.sum(1), strict=True)])


def draw(config):
    rng = np.random.default_rng(4)
    shape = (*MASK.shape, config.width)
    return rng.standard_normal(shape).astype(np.float32), rng.standard_normal(shape[::2]).astype(np.float32)


@pytest.mark.parametrize("name", CONFIGS)
def test_layers_are_hf_s_while_lora_is_zero(name):
    config = CONFIGS[name]
    frozen, _ = random(ServerModel(config, TASKS))
    x, upstream = draw(config)
    block = standard.init_block(jax.random.key(0), config)
    ours, _ = run(config, frozen, block, x, upstream)
    states = reference.standard_layers(config, frozen)(torch.tensor(x), reference.additive(MASK)).last_hidden_state
    close(ours, token_mean(states))


@pytest.mark.parametrize("name", CONFIGS)
def test_lora_is_peft_s(name):
    """On query, value and both linears of the feed-forward network, each with its rank; gradients of all A and B."""
    config = CONFIGS[name]
    frozen, blocks = random(ServerModel(config, TASKS))
    x, upstream = draw(config)
    block = blocks["backbone"]
    ours, gradient = run(config, frozen, block, x, upstream)

    places = {  # HF's module -> ours
        "attention.attention.query": (block["query_value"], gradient["query_value"], 0),
        "attention.attention.value": (block["query_value"], gradient["query_value"], 1),
        "intermediate.dense": (block["fc1"], gradient["fc1"], ...),
        "output.dense": (block["fc2"], gradient["fc2"], ...),
    }
    ranks = {
        module: config.expert_rank if which is ... else config.attention_rank for module, (*_, which) in places.items()
    }
    lora = peft.LoraConfig(
        r=1,
        target_modules=rf"layer\.\d+\.({'|'.join(places)})",
        rank_pattern={rf"layer\.\d+\.{module}": rank for module, rank in ranks.items()},
        alpha_pattern={rf"layer\.\d+\.{module}": config.lora_alpha_ratio * rank for module, rank in ranks.items()},
    )
    adapted = peft.get_peft_model(reference.standard_layers(config, frozen), lora).eval()
    weights = []
    for i, layer in enumerate(adapted.base_model.model.layer):
        for module, (values, grads, which) in places.items():
            linear = layer.get_submodule(module)
            for letter, weight in (("a", linear.lora_A["default"].weight), ("b", linear.lora_B["default"].weight)):
                reference.fill(weight, values[letter][i][which].T)
                weights.append((weight, grads[letter][i][which].T))
    assert len(weights) == 2 * len(places) * sum(config.backbone_layers)
    states = adapted.base_model.model(torch.tensor(x), reference.additive(MASK)).last_hidden_state
    theirs = token_mean(states)
    close(ours, theirs)
    (theirs * torch.tensor(upstream)).sum().backward()
    for weight, mine in weights:
        assert weight.grad.abs().max() > 1e-4
        close(mine, weight.grad, 1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_bottlenecks_stand_behind_the_feed_forward_networks(name):
    config = dataclasses.replace(CONFIGS[name], bottleneck=7)
    frozen, blocks = random(ServerModel(config, TASKS))
    x, upstream = draw(config)
    ours, gradient = run(config, frozen, blocks["backbone"], x, upstream)
    leaves = reference.as_leaves(blocks["backbone"])
    layers = reference.standard_layers(config, frozen)
    reference.add_bottlenecks(layers.layer, leaves)
    theirs = token_mean(layers(torch.tensor(x), reference.additive(MASK)).last_hidden_state)
    close(ours, theirs)
    (theirs * torch.tensor(upstream)).sum().backward()
    expected = reference.gradients(leaves)
    assert set(gradient) == {"down", "down_bias", "up", "up_bias"}
    for leaf, mine in gradient.items():
        assert np.abs(expected[leaf]).max() > 1e-4
        close(mine, expected[leaf], 1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_modalities_run_by_themselves_and_are_averaged(name):
    model, task = ServerModel(CONFIGS[name], TASKS), find_task("vqa")
    frozen, blocks = random(model)
    stream, batch = task.streams[0], make_batch(task, np.random.default_rng(5))
    parts = model.collect({block: blocks[block] for block in model.blocks_of(stream)}, stream)
    for block in blocks["backbone"].values():  # the layers as they are; LoRA has its own test
        block["b"] *= 0
    vectors, (outputs, latents), decoded = jax.jit(
        lambda frozen, parts, batch: (
            (vectors := model.represent(frozen, parts, task, batch)),
            model.forward(frozen, parts, task, batch),
            model.decode(parts["head"], task, vectors.mean(1, keepdims=True), batch),
        )
    )(frozen, parts, batch)
    layers = reference.standard_layers(model.config, frozen)
    for n, tokens in enumerate(batch["tokens"]):
        one = {"images": batch["images"][n : n + 1], "tokens": tokens[None, tokens != 0]}
        expected = [
            layers(reference.encode(model.config, frozen, blocks, m, one)).last_hidden_state.mean(1)
            for m in task.modalities
        ]
        close(vectors[n], torch.cat(expected), 1e-4)
    assert latents.shape == (0, len(vectors), model.config.width) and latents.dtype == np.float32
    close(whole(outputs), np.asarray(decoded), 1e-4)


def test_dropout_needs_a_key_and_follows_it():
    model, task = ServerModel(FLAVA, TASKS), find_task("ag_news")
    frozen, blocks = random(model)
    batch, parts = make_batch(task, np.random.default_rng(7)), model.collect(blocks, task.streams[0])
    # Of the backbone alone: the encoders' is tested with them.
    x = np.random.default_rng(8).standard_normal((2, 5, 12)).astype(np.float32)
    stack = jax.jit(
        lambda key, block: standard.run_stack(model.config, frozen["backbone"], block, x, TokenLayout(MASK), key=key)
    )
    first, again, other, none = (stack(key, blocks["backbone"]) for key in (*map(jax.random.key, (0, 0, 1)), None))
    assert np.array_equal(first, again) and not np.allclose(first, other) and not np.allclose(first, none)
    for part in blocks["backbone"]:  # each of the three places drops by itself
        lone = blocks["backbone"] | {
            name: tree | {"b": 0 * tree["b"]} for name, tree in blocks["backbone"].items() if name != part
        }
        assert not np.allclose(stack(jax.random.key(0), lone), stack(None, lone))
    apply = jax.jit(lambda key: model.apply(frozen, parts, task, batch, key=key))
    assert not np.allclose(apply(jax.random.key(0)), apply(None))


@pytest.mark.parametrize("name", CONFIGS)
def test_one_block_that_every_task_touches(name):
    model = ServerModel(CONFIGS[name], TASKS)
    c = model.config
    assert model.block_names == (
        "encoder/image", "encoder/text", "backbone", "head/ag_news", "head/cifar100", "head/text_generation",
    )  # fmt: skip
    assert model.adapter_blocks == ()
    partition = model.partition(np.eye(3, dtype=bool))
    assert partition.touches[:, 2].all() and partition.shape_classes[2] == "backbone"
    assert model.roles(find_task("vqa").streams[0]) == {
        "head": "head/text_generation",
        "image/encoder": "encoder/image",
        "image/backbone": "backbone",
        "text/encoder": "encoder/text",
        "text/backbone": "backbone",
    }
    _, blocks = model.init(jax.random.key(0))
    low_rank = lambda inputs, outputs, rank: rank * (inputs + outputs)  # noqa: E731
    layer = 2 * low_rank(c.width, c.width, c.attention_rank) + 2 * low_rank(c.width, c.mlp, c.expert_rank)
    assert count(blocks["backbone"]) == sum(c.backbone_layers) * layer
    with pytest.raises(UserError, match="model.backbone: unknown 'plain'; use one of routed, standard"):
        ServerModel(dataclasses.replace(c, backbone="plain"), TASKS)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_checkpoint_fills_the_same_frozen_weights(name, tmp_path):
    c = dataclasses.replace(CONFIGS[name], text_positions=9)
    theirs = huggingface.flava_config(c, layers=4) if name == "flava" else huggingface.vilt_config(c, layers=4)
    kind = {"flava": reference.transformers.FlavaModel, "vilt": reference.transformers.ViltModel}[name]
    huggingface.randomise(kind(theirs), seed=1).save_pretrained(tmp_path)
    routed, plain = (
        checkpoints.load(str(tmp_path), ServerModel(dataclasses.replace(c, backbone=how), TASKS))
        for how in ("routed", "standard")
    )
    jax.tree.map(np.testing.assert_array_equal, plain.frozen, routed.frozen)
    frozen, blocks = ServerModel(c, TASKS).init(jax.random.key(0), plain)
    jax.tree.map(np.testing.assert_array_equal, frozen, plain.frozen)
    assert set(blocks) == set(ServerModel(c, TASKS).block_names)
