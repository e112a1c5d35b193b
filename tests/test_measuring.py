"""launch/growth.sh and launch/memory.sh from start to end, on a federation of one task."""

import os
import pathlib
import re
import subprocess

import pytest

from tests.conftest import TINY

ROOT = pathlib.Path(__file__).parents[1]
pytestmark = pytest.mark.slow


@pytest.fixture
def config(tmp_path):
    """Ten patterns, which is what the scripts count in."""
    fields = TINY | {"federation.rows": ({"ag_news": 0.1},) * 10, "data.train_size": 120, "model.vocab": 300}
    del fields["mesh.clients"]
    path = tmp_path / "ten.py"
    path.write_text(
        "from tap_jax.config import default_config, override\n"
        f"def get_config(argument=''):\n    return override(default_config(), {fields!r})\n"
    )
    return path


def run(script, *arguments, folder):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    environment |= {"JAX_COMPILATION_CACHE_DIR": str(folder / "cache")}
    command = ["bash", str(ROOT / "launch" / script), *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_growth(config, tmp_path):
    sizes = ("--clients", 30, 60, "--cohorts", 10, 20, "--rounds", 2)
    memory, speed, cohorts = run("growth.sh", "--config", config, *sizes, folder=tmp_path).strip().split("\n\n")
    assert [line.split()[:2] for line in speed.splitlines()[2:]] == [
        ["30", "memory"],
        ["60", "memory"],
        ["60", "store"],
    ]
    assert [line.split()[0] for line in cohorts.splitlines()[2:]] == ["10", "20"]
    rows = [[float(value) for value in line.replace(",", "").split()] for line in memory.splitlines()[2:]]
    assert [row[0] for row in rows] == [15, 30, 45, 60]
    # On disk: the blocks of those who have their own, free rows for an eighth more, and what all began with.
    for owners, owned, _, _, disk in rows:
        assert owned == pytest.approx(rows[0][1] * owners / 15, abs=0.2)
        assert owned <= disk <= 1.3 * owned + rows[0][1]


def test_memory(config, tmp_path):
    printed = run("memory.sh", "--config", config, folder=tmp_path)
    assert re.search(r"10 clients, 2 in training", printed)
    found = {
        name: float(value.replace(",", "")) for name, value in re.findall(r"^  (.*?) {2,}([\d,-]+)", printed, re.M)
    }
    parts = [found[name] for name in list(found)[:3]]
    assert found["= measured"] == pytest.approx(parts[0] - parts[1] - parts[2], abs=2)
    assert found["peak of the process in the rounds"] > 100
