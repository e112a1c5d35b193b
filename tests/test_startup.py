"""What is decided before JAX starts."""

import os

import pytest

from tap_jax.cli import distributed, startup
from tap_jax.config import default_config, override


@pytest.mark.parametrize(
    ("fields", "count", "devices"),
    [
        ({"mesh.clients": 4, "mesh.data": 1}, None, 4),
        ({"mesh.clients": 4, "mesh.data": 1}, 2, 2),
        ({"mesh.clients": 2, "mesh.data": 4}, 4, 2),
        ({"mesh.clients": 3, "mesh.data": 1}, 2, 2),
        ({"cohort_size": 2}, None, 2),
        ({"cohort_size": 2}, 2, 1),
        ({"cohort_size": 3}, 8, 1),
    ],
)
def test_processes_share_out_the_cpu_devices(fields, count, devices, monkeypatch):
    monkeypatch.delenv("JAX_NUM_CPU_DEVICES", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    config = override(default_config(), fields)
    assert startup.cpu_devices(config, count and distributed.Processes("h:1", count, 0)) == devices
