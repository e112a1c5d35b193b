"""The optimised training program of a small model on each target whose compiler is installed.

No float32 matrix product with a side of the width or more, no float32 residual of a scan over layers, no collective
inside loops but the gradient's sum, once a step, and nothing between host and device.
"""

import importlib.util

import pytest

from tap_jax.config import default_config, override
from tap_jax.experiment import build
from tap_jax.planning.targets import hlo, topology
from tap_jax.planning.targets.compile import compile_program
from tap_jax.planning.targets.programs import TRAINING, programs
from tap_jax.platforms import platform_of
from tests.targets.float32 import float32_products, float32_residuals

pytestmark = pytest.mark.slow

LAYERS, WIDTH, ROW, TEXT = 3, 128, 8, 32
FIELDS = {
    "cohort_size": 1,
    "batch_size": 16,
    "local_steps": 2,
    "post_steps": 2,
    "variants": ("tap",),
    "model.width": WIDTH,
    "model.heads": 2,
    "model.mlp": 4 * WIDTH,
    "model.image_layers": LAYERS,
    "model.text_layers": LAYERS,
    "model.image_size": 64,
    "model.vocab": 3000,
    "model.head_hidden": (WIDTH // 2,),  # as at the paper's size; logits are float32
    "model.max_text": TEXT,
    "federation.table": "custom",
    "federation.rows": ({"ag_news": 0.5, "cifar100": 0.5},),
    "federation.groups": 1,
    "data.train_size": 64,
    "data.test_size": 8,
    "data.image_classes": 4,
    "engine.microbatch": ROW,
    "mesh.clients": 1,
    "mesh.data": 2,
}


def program(name):
    """(`hlo.Program`, `Found`) of the training program for two devices of a target."""
    target = topology.parse(name)
    found = topology.devices(target)
    config = override(default_config(), FIELDS)
    run = build(config, target=found)
    one = next(one for one in programs(run) if one.phase == TRAINING)
    result, text = compile_program(one.lower, platform_of(found[0]), name=one.name, bodies=one.bodies)
    assert not result.problem
    return hlo.Program(text), result


EXTRAS = {"h100x2": ("jax_cuda12_plugin", "target-gpu"), "v5e:2x2": ("libtpu", "target-tpu")}


@pytest.fixture(scope="module", params=EXTRAS)
def compiled(request):
    module, extra = EXTRAS[request.param]
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"needs tap-jax[{extra}]")
    return program(request.param)


def test_no_wide_product_in_float32(compiled):
    assert float32_products(compiled[0], WIDTH) == []


def test_no_residual_of_a_scan_in_float32(compiled):
    assert float32_residuals(compiled[0], LAYERS, ROW * TEXT * WIDTH) == []


def test_gradients_are_summed_once_a_step(compiled):
    """And nothing else goes between devices inside loops."""
    text, _ = compiled
    inside, _ = hlo.collectives(text)
    assert set(inside) <= {"all-reduce"}
    assert not [
        one.name
        for loop in text.loops
        if text.trips(loop) is None and any(loop.name in text.computations[name] for name in text.looped)
        for name in text.body(loop)
        for one in text.computations[name].values()
        if one.operation.removesuffix("-start") in hlo.COLLECTIVES
    ]


def test_nothing_goes_to_the_host(compiled):
    assert hlo.host_transfers(compiled[0]) == []


def test_row_loops_are_those_of_the_engine(compiled):
    text, found = compiled
    assert found.loops == found.bodies == hlo.row_loops(text)
