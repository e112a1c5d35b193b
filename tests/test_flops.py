"""Operations counted from shapes: by hand, and by XLA at the paper's sizes; by PyTorch in export/test_sequential."""

import functools

import jax
import jax.numpy as jnp
import pytest

from tap_jax import assembly
from tap_jax.config import load_config
from tap_jax.models.accounting import shapes
from tap_jax.planning import step_cost
from tap_jax.planning.flops import Flops, count
from tap_jax.planning.outline import outline

PRODUCT = 2 * 2 * 3 * 5  # multiply-adds of [2, 3] @ [3, 5], each 2


def shape(*axes):
    return jax.ShapeDtypeStruct(axes, jnp.float32)


def test_one_dense_layer():
    dense = lambda w, x: (x @ w["kernel"] + w["bias"]).sum()  # noqa: E731
    trained = {"kernel": shape(3, 5), "bias": shape(5)}
    assert count(dense, trained, shape(2, 3)) == Flops(PRODUCT, PRODUCT)
    # A layer below wants the gradient of its input as well, which costs as much again.
    below = lambda w, x: dense(w, x * w["scale"])  # noqa: E731
    assert count(below, trained | {"scale": shape(3)}, shape(2, 3)) == Flops(PRODUCT, 2 * PRODUCT)


def test_frozen_weights_have_no_gradient():
    two = lambda w, frozen, x: ((x @ frozen["first"]) * w @ frozen["second"]).sum()  # noqa: E731
    frozen = {"first": shape(3, 5), "second": shape(5, 7)}
    found = count(two, shape(5), frozen, shape(2, 3))
    assert found.forward == PRODUCT + 2 * 2 * 5 * 7
    assert found.backward == 2 * 2 * 5 * 7  # through the second product only: nothing below the first is trained


def test_what_has_no_effect_is_not_counted():
    unused = lambda w, x: (x @ w, x.sum())[1]  # noqa: E731
    assert count(unused, shape(3, 5), shape(2, 3)) == Flops()
    constant = lambda w, x: (jax.lax.stop_gradient(x * w["scale"]) @ w["kernel"]).sum()  # noqa: E731
    assert count(constant, {"scale": shape(3), "kernel": shape(3, 5)}, shape(2, 3)) == Flops(PRODUCT, PRODUCT)
    index = lambda w, x: (x * (w @ w).argmax()).sum()  # noqa: E731
    assert count(lambda w, x: index(w, x) + w.sum(), shape(3, 3), shape(2, 3)).forward == 2 * 27


def test_layers_in_a_scan_are_counted_one_by_one():
    def layers(adapters, frozen, x):
        return jax.lax.scan(lambda x, layer: (x @ layer[1] + layer[0], None), x, (adapters, frozen))[0].sum()

    one = 2 * 2 * 3 * 3
    # Nothing is trained below the first of four layers.
    assert count(layers, shape(4, 3), shape(4, 3, 3), shape(2, 3)) == Flops(4 * one, 3 * one)


def test_loops_conditions_and_rematerialisation():
    function = lambda w, x: jax.lax.cond(x[0, 0] > 0, lambda: (x @ w).sum(), lambda: x.sum())  # noqa: E731
    assert count(function, shape(3, 5), shape(2, 3)) == Flops(PRODUCT, PRODUCT)
    again = lambda w, x: jax.checkpoint(lambda w: x @ w)(w).sum()  # noqa: E731
    assert count(again, shape(3, 5), shape(2, 3)) == Flops(PRODUCT, PRODUCT, recomputed=PRODUCT)
    endless = lambda w, x: jax.lax.while_loop(lambda y: y.sum() < 9, lambda y: y @ w, x).sum()  # noqa: E731
    with pytest.raises(ValueError, match="unknown length"):
        count(endless, shape(3, 3), shape(2, 3))


def test_a_convolution_is_counted_as_xla_counts_it():
    convolve = functools.partial(
        jax.lax.conv_general_dilated,
        window_strides=(2, 2),
        padding="VALID",
        feature_group_count=2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    images, kernel = shape(2, 9, 9, 4), shape(3, 3, 2, 6)
    found = count(lambda w, x: convolve(x, w).sum(), kernel, images)
    theirs = jax.jit(convolve).lower(images, kernel).cost_analysis()["flops"]
    assert found.forward == found.backward == theirs


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("flava", {}),
        ("vilt", {}),
        ("vilt", {"method": "fedavg", "variants": ("fedavg",), "model.backbone": "standard"}),
    ],
)
def test_rematerialisation_is_of_all_transformer_layers(name, fields):
    model = outline(load_config(f"configs/{name}.py", {"engine.remat": "layer", **fields})).model
    task = next(one for one in model.tasks if one.modalities == ("image",))
    found = step_cost.task_flops(model, task, step_cost.padded_batch(task, 2, text=0, answer=0))
    assert 0.9 < found.recomputed / found.forward < 1


@pytest.mark.parametrize(("name", "task"), [("flava", "tiny_imagenet"), ("flava", "mmlu"), ("vilt", "vqa")])
def test_as_many_as_xla_counts_at_base_size(name, task, monkeypatch):
    found = outline(load_config(f"configs/{name}.py"))
    model = found.model
    task = next(one for one in model.tasks if one.name == task)
    batch = step_cost.padded_batch(task, 2, text=24, answer=11)
    ours = step_cost.task_flops(model, task, batch)

    # XLA counts the body of a loop once, so there must be none.
    scan = jax.lax.scan
    monkeypatch.setattr(jax.lax, "scan", lambda *args, **options: scan(*args, **options | {"unroll": True}))
    frozen, blocks = shapes(model)
    parts = jax.eval_shape(lambda trees: model.collect(trees, task.streams[0]), blocks)

    def loss(parts, frozen, batch):
        return assembly.sample_loss(model)(frozen, parts, task, batch, None)[2].sum()

    def theirs(function):
        return jax.jit(function).lower(parts, frozen, batch).cost_analysis()["flops"]

    # XLA counts what goes on element by element, too, and the gradient of the first layer's input.
    assert 1 <= theirs(loss) / ours.forward < 1.005
    assert 1 <= theirs(jax.grad(loss)) / ours.total < 1.01
