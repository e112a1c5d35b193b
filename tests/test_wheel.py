"""The wheel by itself: what it holds runs from another folder, without the repository."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import zipfile

import pytest

from tap_jax import shipped
from tap_jax.config import load_config
from tap_jax.config.files import names

ROOT = pathlib.Path(__file__).parents[1]
ALL = """
import json, tap_jax
from tap_jax.config.files import names
print(json.dumps([tap_jax.__file__, {name: tap_jax.load_config(name).to_dict() for name in names()}]))
"""

READ = """
from tap_jax import shipped
from tap_jax.data.text import load_tokenizer
from tap_jax.models import checkpoints
for name in shipped.checkpoints():
    folder = checkpoints.find(name)
    print(folder, checkpoints.model_fields(folder)["vocab"], load_tokenizer(shipped.located(name)).size)
    assert checkpoints.read(folder, checkpoints.model_fields(folder)["name"])
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with what pip puts into site-packages."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("tap_jax", "configs"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = [sys.executable, "-m", "pip", "wheel", str(source), "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*build, f"--wheel-dir={folder}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = folder.glob("tap_jax-*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "installed")
    return folder / "installed"


def python(installed, folder, *arguments):
    environment = os.environ | {"PYTHONPATH": str(installed), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


def test_it_holds_the_package_alone(installed):
    (information,) = installed.glob("tap_jax-*.dist-info")
    assert {path.name for path in installed.iterdir()} == {"tap_jax", information.name}
    held = {path.relative_to(installed) for path in (installed / "tap_jax").rglob("*.py")}
    expected = {path.relative_to(ROOT) for path in (ROOT / "tap_jax").rglob("*.py")}
    expected |= {pathlib.Path("tap_jax") / path.relative_to(ROOT) for path in (ROOT / "configs").rglob("*.py")}
    assert held == expected and (installed / "tap_jax" / "py.typed").is_file()
    assert "tap-jax = tap_jax.cli.main:main" in (information / "entry_points.txt").read_text()


def test_its_configurations_are_those_of_the_repository(installed, tmp_path):
    done = python(installed, tmp_path, "-c", ALL)
    assert done.returncode == 0, done.stderr
    file, found = json.loads(done.stdout)
    assert pathlib.Path(file).is_relative_to(installed)
    assert found == json.loads(json.dumps({name: load_config(name).to_dict() for name in names()}))


def test_its_checkpoints_are_found_and_read(installed, tmp_path):
    done = python(installed, tmp_path, "-c", READ)
    assert done.returncode == 0, done.stderr
    files = [path for path in (ROOT / "tap_jax" / "checkpoints").rglob("*") if path.is_file()]
    held = [path for path in (installed / "tap_jax" / "checkpoints").rglob("*") if path.is_file()]
    assert {path.relative_to(installed) for path in held} == {path.relative_to(ROOT) for path in files}
    found = [line.split() for line in done.stdout.splitlines()]
    assert len(found) == len(shipped.checkpoints()) and all(words[1] == words[2] for words in found)
    assert all(pathlib.Path(words[0]).is_relative_to(installed) for words in found)


def test_a_command_takes_them_by_name(installed, tmp_path):
    done = python(installed, tmp_path, "-m", "tap_jax", "describe", "--config=demo:seed=42")
    assert done.returncode == 0 and "30 clients" in done.stdout, done.stdout + done.stderr
    done = python(installed, tmp_path, "-m", "tap_jax", "describe", "--config=configs/demo.py")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "no file 'configs/demo.py'; name a Python file, or a configuration: checks/distillation, " in done.stderr
