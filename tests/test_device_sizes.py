"""Defaults follow the device's memory by an estimate that counts arrays from shapes."""

import dataclasses

import pytest

from tap_jax import device_sizes
from tap_jax.assembly import cut
from tap_jax.config import load_config, variants_of
from tap_jax.device_sizes import Estimate, choices, row_bytes, row_tokens, sized
from tap_jax.models.layers import ModelConfig
from tap_jax.platforms import GIB, Platform
from tap_jax.registry import METHODS
from tap_jax.tasks import find_task

LARGE, MIDDLE, SMALL = (Platform("gpu", "one", memory=size * GIB) for size in (80, 40, 16))
ROWS = ({"ag_news": 0.25, "cifar100": 0.25},) * 4


def test_cpus_and_devices_of_unknown_memory(tiny):
    """Rows of one sample and the cohort's clients, or large rows and all clients; what is named is kept."""
    config = tiny(ROWS, {"engine.microbatch": 0})
    named = tiny(ROWS, {"engine.microbatch": 3, "engine.clients_at_once": 3})
    cpu, unknown = Platform("cpu", "cpu"), Platform("gpu", "unheard of")
    for platform, expected in ((cpu, (1, config.cohort_size)), (unknown, (min(32, config.batch_size), len(ROWS)))):
        for given, sizes in ((config, expected), (named, (3, 3))):
            found = sized(cut(given, platform))
            assert (found.engine.microbatch, found.engine.clients_at_once) == sizes
            assert not found.open and not found.model.remat


def test_larger_devices_have_larger_rows():
    config = load_config("configs/flava.py")
    large, small = (sized(cut(config, platform)) for platform in (LARGE, SMALL))
    assert large.engine.microbatch == 32 and small.engine.microbatch <= large.engine.microbatch
    assert not large.open and not small.open


def test_one_program_serves_rounds_and_what_follows_where_there_is_one_shard():
    sections = cut(load_config("configs/flava.py"), LARGE)
    assert sized(sections).engine.clients_at_once == sections.engine.cohort_size == 2
    assert sized(sections, devices=2).engine.clients_at_once == len(sections.federation.clients)


def test_what_is_named_is_kept():
    config = load_config("configs/flava.py", {"engine.microbatch": 4, "engine.clients_at_once": 3})
    sections = cut(config, LARGE)
    found = choices(sections)
    assert found and all((one.microbatch, one.clients) == (4, 3) for one in found)
    assert sized(sections).engine.microbatch == 4


def test_choices_fit_and_the_fastest_is_first():
    config = load_config("configs/vilt.py")
    found = choices(cut(config, MIDDLE))
    assert all(one.bytes <= device_sizes.FILLED * MIDDLE.memory for one in found)
    assert [one.time for one in found] == sorted(one.time for one in found)
    assert "--config.engine.microbatch=" in found[0].flags


def test_the_estimate_grows_with_rows_and_clients_and_shrinks_with_recomputing():
    config = load_config("configs/flava.py")
    estimate = Estimate(cut(config, LARGE))
    one = estimate(8, 2, "none")
    assert estimate(16, 2, "none").bytes > one.bytes > estimate(8, 2, "layer").bytes
    assert estimate(8, 8, "none").bytes > one.bytes
    assert estimate(8, 2, "layer").time > one.time


def test_a_rows_residuals_by_hand():
    """An encoder of three layers and a standard backbone of two, without images."""
    model = ModelConfig(
        width=4, mlp=16, text_layers=3, backbone="standard", backbone_layers=(1, 1), heads=2, dtype="bfloat16"
    )
    layer = 10 * 4 + 16
    assert row_bytes(model, (0, 10), "none") == 2 * 10 * (3 + 2) * layer
    assert row_bytes(model, (0, 10), "layer") == 2 * 10 * ((3 + 2) * 4 + layer)
    assert row_bytes(dataclasses.replace(model, dtype="float32"), (0, 10), "none") == 4 * 10 * 5 * layer


def test_tokens_of_a_row():
    """Padded rows are as wide as texts may be; packed ones have a budget of tokens, or of images."""
    news, pictures, both = map(find_task, ("ag_news", "cifar100", "vqa"))
    flava, vilt = ModelConfig(), ModelConfig(name="vilt", patch=32, max_text=40)
    assert row_tokens(flava, news, 8, False) == (0, 8 * 256) and row_tokens(flava, news, 8, True) == (0, 8 * 128)
    assert row_tokens(flava, pictures, 8, False) == row_tokens(flava, pictures, 8, True) == (8 * 197, 0)
    assert row_tokens(vilt, pictures, 8, True) == (20 * 50, 0)
    assert row_tokens(flava, both, 8, True) == (8 * 197, 8 * 128)


def test_trainings_after_the_last_round():
    """TAP: teacher, student, one without a teacher, 2P. FedAvg: P and 2P, and none for the server's blocks."""
    tap, fedavg = METHODS["tap"], METHODS["fedavg"]
    assert sum(tap.post_periods(variants_of(load_config("configs/flava.py")))) == 5
    assert tap.post_periods(("tap", "fedavg+post")) == tap.post_periods(("tap",)) == (1, 1)
    assert tap.post_periods(("tap-stage1", "tap-stage2", "local", "tap@0.5")) == (0, 1, 0, 1, 1)
    assert fedavg.post_periods(("fedavg", "fedavg+post", "fedavg+2p")) == (0, 1, 2)
    assert fedavg.post_periods(("fedavg",)) == (0,)


def test_longer_trainings_weigh_on_the_time():
    short = load_config("configs/flava.py", {"variants": ("tap",)})
    longer = load_config("configs/flava.py", {"variants": ("tap", "fedavg+2p")})
    times = [Estimate(cut(config, LARGE))(8, 30, "none").time for config in (short, longer)]
    assert times[1] - times[0] == pytest.approx(times[0] - _rounds_alone(short))


def _rounds_alone(config):
    with_none = config.copy_and_resolve_references()
    with_none.post_steps = 0
    return Estimate(cut(with_none, LARGE))(8, 30, "none").time
