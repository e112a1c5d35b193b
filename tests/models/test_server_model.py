"""The whole forward pass against the specification's routing table, written out path by path in PyTorch."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import torch

from tap_jax.config import default_config, override, validate
from tap_jax.errors import UserError
from tap_jax.models.layers import ModelConfig
from tap_jax.models.server_model import ServerModel
from tap_jax.tasks import find_task
from tap_jax.token_logits import whole
from tests import oracle
from tests.models import reference

pytestmark = pytest.mark.usefixtures("strict")

CONFIG = ModelConfig(
    width=12, heads=3, mlp=20, image_layers=1, text_layers=2, image_size=24, patch=8, upsample=0.5, vocab=37,
    max_text=9, max_answer=6, encoder_rank=5, attention_rank=4, expert_rank=3, lora_dropout=0.3, head_hidden=(7,),
    image_channels=(4, 3, 2), text_heads=2, text_cond_heads=4, text_inner=10,
)  # fmt: skip
TASKS = tuple(map(find_task, ("cifar100", "fashion_mnist", "ag_news", "mmlu", "vqa")))
LENGTHS = (9, 4, 7)


@pytest.fixture(
    scope="module",
    params=[("flava", (1, 1)), ("flava", (2, 2)), ("vilt", (2, 1))],
    ids=["FLAVA, one layer a stage", "FLAVA, two layers a stage", "ViLT, two and one"],
)
def built(request):
    name, layers = request.param
    config = dataclasses.replace(CONFIG, name=name, backbone_layers=layers, position_grid=4)
    model = ServerModel(config, TASKS)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    return model, *reference.random_weights(shapes, np.random.default_rng(3))


@functools.lru_cache
def represent(model, stream):
    return jax.jit(
        lambda frozen, blocks, batch: model.represent(frozen, model.collect(blocks, stream), stream.task, batch)
    )


@functools.lru_cache
def decode(model, task):
    return jax.jit(lambda head, vectors, batch: model.decode(head, task, vectors, batch))


@functools.lru_cache
def forward(model, stream):
    def run(frozen, blocks, batch, key=None):
        z, latents = model.forward(frozen, model.collect(blocks, stream), stream.task, batch, key=key)
        return whole(z), latents

    return jax.jit(run)


def make_batch(task, rng):
    batch = {}
    if "image" in task.modalities:
        batch["images"] = rng.standard_normal((len(LENGTHS), 64, 64, 3)).astype(np.float32)
    if "text" in task.modalities:
        tokens = rng.integers(1, CONFIG.vocab, (len(LENGTHS), max(LENGTHS)))
        batch["tokens"] = np.where(np.arange(max(LENGTHS)) < np.array(LENGTHS)[:, None], tokens, 0).astype(np.int32)
    if task.kind == "text_generation":
        batch["answers"] = rng.integers(1, CONFIG.vocab, (len(LENGTHS), 5)).astype(np.int32)
    return batch


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_forward_pass_follows_the_routing_table(built, task):
    model, frozen, blocks = built
    batch = make_batch(task, np.random.default_rng(5))
    for stream in task.streams[-1:]:  # mmlu: another domain than the first
        # Only B_o is given: a pass through any other block would be a KeyError.
        mine = {name: blocks[name] for name in model.blocks_of(stream)}
        assert set(mine) <= set(oracle.blocks_of_task(task))
        each = [
            reference.represent(
                model.config,
                frozen,
                mine,
                task,
                stream.domain,
                {f: x[n : n + 1, :length] if f == "tokens" else x[n : n + 1] for f, x in batch.items()},
            )
            for n, length in enumerate(LENGTHS)
        ]
        pooled, theirs = zip(*each, strict=True)
        vectors = represent(model, stream)(frozen, mine, batch)
        assert vectors.shape == (len(LENGTHS), 4 * len(task.modalities), model.config.width)
        expected = torch.cat(pooled).numpy()
        np.testing.assert_allclose(vectors.mean(1), expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
        assert np.abs(expected).max() > 0.1
        # The decoder reads the mean of the paths, nothing else.
        outputs, latents = forward(model, stream)(frozen, mine, batch)
        single = decode(model, task)(mine[f"head/{task.head}"], expected[:, None], batch)
        np.testing.assert_allclose(outputs, single, rtol=1e-3, atol=1e-4 * np.abs(single).max())
        assert latents.dtype == np.float32
        reference.close(latents, torch.cat(theirs, 1), 1e-4)


@pytest.mark.parametrize("name", ["ag_news", "vqa"])
def test_padding_changes_nothing(built, name):
    model, frozen, blocks = built
    task = find_task(name)
    batch = make_batch(task, np.random.default_rng(6))
    one = {field: x[1:2] for field, x in batch.items()}
    assert (one["tokens"][:, 4:] == 0).all()
    run = functools.partial(represent(model, task.streams[-1]), frozen, blocks)
    padded, bare = run(one), run(one | {"tokens": one["tokens"][:, :4]})
    np.testing.assert_allclose(padded, bare, rtol=1e-5, atol=1e-5 * np.abs(bare).max())


def test_dropout_needs_a_key_and_follows_it(built):
    model, frozen, blocks = built
    task = find_task("ag_news")
    batch, run = make_batch(task, np.random.default_rng(7)), forward(model, task.streams[0])
    first, again, other = (run(frozen, blocks, batch, jax.random.key(seed))[0] for seed in (0, 0, 1))
    assert np.array_equal(first, again) and not np.allclose(first, other)


def test_heads_of_equal_shapes_are_of_one_group():
    """Tasks that take one program need one group for each of its parts, whatever their heads are called."""
    tasks = tuple(map(find_task, ("cifar100", "fashion_mnist", "ag_news", "mmlu")))
    own = tuple(dataclasses.replace(task, name=f"{task.name}_2", head=f"{task.name}_2") for task in tasks)
    partition = ServerModel(CONFIG, (*tasks, *own)).partition(np.ones((1, 8), bool))
    group = dict(zip(partition.names, partition.shape_classes, strict=True))
    for task, other in zip(tasks, own, strict=True):
        assert group[f"head/{task.head}"] == group[f"head/{other.head}"]
    assert len({group[f"head/{task.head}"] for task in tasks}) == 4


@pytest.mark.parametrize("name", ["cifar100", "vqa"], ids=["another number of classes", "another kind"])
def test_a_head_is_shared_by_tasks_that_need_the_same(name):
    news = find_task("ag_news")
    assert len(ServerModel(CONFIG, (news, dataclasses.replace(news, name="press"))).block_names)
    other = dataclasses.replace(find_task(name), head="ag_news")
    with pytest.raises(UserError, match=f"task {name}: its head 'ag_news' is ag_news's, .*; name another head"):
        ServerModel(CONFIG, (news, other))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model.name", "clip"),
        ("model.backbone", "plain"),
        ("model.heads", 5),
        ("model.text_heads", 5),
        ("model.text_cond_heads", 5),
        ("model.patch", 7),
        ("model.head_activation", "swish"),
        ("model.condition", "tokens"),
        ("feddat.bottleneck", -1),
    ],
)
def test_what_does_not_fit_is_refused_in_the_configuration_s_words(field, value):
    known = default_config().model
    sizes = {f"model.{name}": size for name, size in dataclasses.asdict(CONFIG).items() if name in known}
    with pytest.raises(UserError) as wanted:
        validate(override(default_config(), sizes | {field: value}))
    changed = dataclasses.replace(CONFIG, **{field.split(".")[1]: value})
    with pytest.raises(UserError) as found:
        jax.eval_shape(ServerModel(changed, TASKS).init, jax.random.key(0))
    assert str(found.value) == str(wanted.value)
