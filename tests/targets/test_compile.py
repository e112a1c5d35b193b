"""What the compiler says, and how it is told apart: fits, does not, is not known."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tap_jax import platforms
from tap_jax.assembly import cut
from tap_jax.config import override
from tap_jax.planning.targets import fit, report, roofline
from tap_jax.planning.targets.compile import Built, Found, compile_program, refused_bytes
from tap_jax.platforms import GIB, Platform

DEVICE = Platform("gpu", "test", memory=10 * GIB, peak=1e14, bandwidth=1e12)
BUILT = Built(("a line about it",), ("one",), DEVICE, 2, {"training": roofline.Work(4e15, 3e15)}, {"training": 90})


def test_refusals():
    text = (
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 32.80G of"
        " 15.75G hbm. Exceeded hbm capacity by 17.05G.\n\nTotal hbm usage >= 33.05G:\n reserved 258.00M"
    )
    assert refused_bytes(text) == int(33.05 * 2**30)
    assert refused_bytes("Ran out of memory in memory space hbm. Used 512.00M of 15.75G hbm.") == 2**29
    assert refused_bytes("INTERNAL: Used 3 of 4 tiles") == 0


def test_a_program_that_compiles():
    shape = jax.ShapeDtypeStruct((128, 256), np.float32)
    found, text = compile_program(
        lambda: jax.jit(lambda x: jnp.tanh(x) @ x.T).lower(shape), Platform("cpu", "cpu"), name="one", bodies=3
    )
    assert found.arguments == 4 * 128 * 256 and found.seconds > 0
    assert found.peak >= found.arguments + 4 * 128 * 128
    assert not found.problem and "ENTRY" in text and found.bodies == 3
    assert found.fits(Platform("cpu", "cpu")) is None


def test_fits():
    assert Found("one", peak=10 * GIB).fits(DEVICE) is True
    assert Found("one", peak=10 * GIB + 1).fits(DEVICE) is False
    assert Found("one", problem="not known after 3 minutes").fits(DEVICE) is None


def test_roofline():
    work = roofline.Work(4e15)
    assert roofline.seconds(work, None, DEVICE, 2) == pytest.approx(20)
    assert roofline.seconds(work, 3e13, DEVICE, 2) == pytest.approx(30)
    assert roofline.seconds(None, None, DEVICE, 2) is None
    assert roofline.seconds(work, None, Platform("gpu", "unheard of"), 2) is None


def test_report():
    found = [
        Found("one", "training", 2, 12.0, GIB, GIB, GIB, GIB, 2 * GIB, 3 * GIB, inside={"all-reduce": 1}, loops=2),
        Found("two", "prediction", peak=12 * GIB, problem="refused"),
        Found("three", "exchange", problem="not known after 3 minutes"),
    ]
    text = report.report(BUILT, found)
    line = next(line for line in text.splitlines() if line.startswith("one"))
    assert "1 all-reduce" in line and "0.75" in line and "20 s" in line
    assert (
        "does not fit: two wants 12 of 10 GiB; lower engine.microbatch, engine.clients_at_once, or set engine.remat"
        in text
    )
    assert "not compiled: three: not known after 3 minutes" in text
    assert "estimate, not measured: 0.5 hours of training at the devices' peak" in text
    assert len(report.markdown("h100", BUILT, found)) == 3


def test_known_devices():
    assert platforms.known("gpu", "NVIDIA A100-SXM4-40GB").memory == 42298834944
    assert platforms.known("gpu", "NVIDIA A100-SXM4-80GB").memory == 85100068864
    assert platforms.known("tpu", "TPU v5 lite").memory == int(15.75 * GIB)
    assert platforms.known("gpu", "NVIDIA H100 80GB HBM3 MIG 1g.10gb").memory is None
    assert platforms.here().kind == "cpu" and not platforms.here().accelerated


def test_fit_takes_those_that_are_smaller(tiny):
    from tap_jax.device_sizes import Sizes

    sizes = [
        Sizes(32, 4, "none", 9 * GIB, 1.0),
        Sizes(16, 4, "none", 7 * GIB, 1.1),
        Sizes(16, 4, "layer", 5 * GIB, 1.5),
    ]
    assert fit.smaller(sizes, sizes[0], 12 * GIB, 10 * GIB) == sizes[1:]
    assert fit.smaller(sizes, sizes[0], 14 * GIB, 10 * GIB) == sizes[2:]
    assert fit.smaller(sizes, sizes[0], 0, 10 * GIB) == sizes[1:]
    config = tiny(({"ag_news": 0.5},) * 2)
    small = dataclasses.replace(sizes[0], microbatch=4, clients=2)
    assert cut(override(config, small.fields)).open == frozenset()
    assert (config.engine.microbatch, config.engine.clients_at_once, config.engine.remat) == (4, 2, "none")
