"""What the backward pass is given: nothing in float32 where the model computes in bfloat16, and the same gradients."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tap_jax.methods.losses import task_loss
from tap_jax.models import attention, backbone, heads, layers, lora, residuals
from tap_jax.models.server_model import ServerModel, to_compute_dtype
from tap_jax.tasks import find_task
from tests.models import reference
from tests.models.test_server_model import CONFIG, make_batch

pytestmark = pytest.mark.usefixtures("strict")

DEPTH = {"backbone_layers": (1, 1), "image_layers": 2, "text_layers": 2}
CONFIGS = {
    "flava": dataclasses.replace(CONFIG, **DEPTH),
    "vilt": dataclasses.replace(CONFIG, name="vilt", position_grid=4, condition="paths", **DEPTH),
    "flava, standard": dataclasses.replace(CONFIG, backbone="standard", **DEPTH),
    "flava, bottlenecks": dataclasses.replace(CONFIG, bottleneck=7, **DEPTH),
}
EXAMPLES = [("flava", "vqa"), ("vilt", "mmlu"), ("flava, standard", "ag_news"), ("flava, bottlenecks", "mmlu")]


def loss_of(name, task, **changes):
    """Training's loss, with dropout, and blocks to differentiate it by."""
    config, task = dataclasses.replace(CONFIGS[name], **changes), find_task(task)
    model, rng = ServerModel(config, (task,)), np.random.default_rng(3)
    frozen, blocks = reference.random_weights(jax.eval_shape(model.init, jax.random.key(0)), rng)
    frozen, batch = to_compute_dtype(jax.tree.map(jnp.asarray, frozen), config.dtype), make_batch(task, rng)
    batch["labels"] = np.zeros(len(batch["tokens"]), np.int32)

    def loss(parts):
        outputs, _ = model.forward(frozen, parts, task, batch, key=jax.random.key(5))
        return task_loss(task.kind, outputs, batch).sum()

    return loss, model.collect(blocks, task.streams[0])


@pytest.mark.parametrize("implementation", ["einsum", "xla"])
@pytest.mark.parametrize(("name", "task"), EXAMPLES)
def test_no_activation_is_kept_in_float32(name, task, implementation):
    with jax.numpy_dtype_promotion("standard"):
        loss, parts = loss_of(name, task, dtype="bfloat16", attention=implementation)
    with jax.numpy_dtype_promotion("standard"):  # JAX's own attention wants it
        kept = jax.tree.leaves(jax.eval_shape(lambda parts: jax.vjp(loss, parts)[1], parts))
    # Of 3 samples: 9 word pieces, 1 + 9 patches or 4 tokens of an answer each, as one axis or two.
    tokens = [
        x for x in kept if {27, 30} & set(x.shape) or {(3, 9), (3, 10), (3, 4)} & set(itertools.pairwise(x.shape))
    ]
    assert any(x.dtype == jnp.bfloat16 for x in tokens)
    # A token's loss and its logits, of which there is one block, are in float32.
    large = {x.shape for x in tokens if x.dtype == jnp.float32 and x.ndim > 2 and CONFIG.vocab not in x.shape}
    assert not large


@pytest.mark.parametrize(("name", "task"), EXAMPLES)
def test_what_is_computed_again_changes_no_gradient(name, task, monkeypatch):
    """In float32, where `inputs_only` does nothing by itself: values, gradients, gradients differentiated forwards."""

    def found():
        loss, parts = loss_of(name, task)
        direction = jax.tree.map(lambda x: 0.1 * jnp.asarray(x), parts)
        gradient = jax.value_and_grad(lambda parts: loss(parts))
        return jax.jit(lambda parts: jax.jvp(gradient, (parts,), (direction,)))(parts)

    plain = found()
    again = lambda function, dtype: jax.checkpoint(function, policy=residuals._policy)  # noqa: E731
    for module in (attention, backbone, heads, layers, lora):
        monkeypatch.setattr(module, "inputs_only", again)
    monkeypatch.setattr(heads, "_norm", lambda dtype: heads.nn.remat(heads._LayerNorm))
    # What is differentiated twice rounds more.
    for one, other, tolerance in zip(found(), plain, (2e-5, 2e-4), strict=True):
        for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
            np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * np.abs(y).max())


def test_random_masks_are_drawn_once():
    x, adapter = jnp.ones((64, 12), jnp.bfloat16), lora.init_lora(jax.random.key(0), 12, 12, 2)
    function = functools.partial(lora.lora, x, scale=2.0, rate=0.5, key=jax.random.key(1))
    kept = jax.tree.leaves(jax.eval_shape(lambda a: jax.vjp(function, a)[1], adapter))
    assert [(64, 12)] == [leaf.shape for leaf in kept if leaf.dtype == bool]
    program = str(jax.make_jaxpr(jax.grad(lambda a: function(a).astype(jnp.float32).sum()))(adapter))
    assert program.count("random_bits[") == 1
