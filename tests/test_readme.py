"""Every command and every Python block of README.md is run, in the order in which they stand there.

Commands are taken as they are, but for their size: the configurations that they name are made small (SMALL), and the
scripts that would train for hours or days are given a tap-jax that only notes what it is asked to do
(tests/test_launch.py checks what that is). Installing and testing is what .ci/run does, with the same two commands.
"""

import importlib
import json
import os
import pathlib
import re
import runpy
import shlex
import subprocess
import sys

import pytest

import tap_jax
from tap_jax import config as configuration
from tap_jax.cli import main as cli
from tap_jax.config import load_config

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = [
    pytest.param(language, code, id=f"line{README[: found.start()].count(chr(10)) + 1}")
    for found in re.finditer(r"^```(bash|python)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    for language, code in [found.groups()]
]
SMALL = {
    "rounds": 1,
    "local_steps": 1,
    "batch_size": 8,
    "post_steps": 1,
    "cohort_size": 3,
    "data.train_size": 90,
    "data.test_size": 2,
    "federation.table": "custom",
    "federation.groups": 1,
    # Client 8, which the README exports, has the tasks that it has there.
    "federation.rows": ({"ag_news": 0.125},) * 8 + ({"fashion_mnist": 1.0, "common_gen": 1.0},),
    "mesh.clients": 1,
    "mesh.data": 1,
}
DATA = ROOT.parent / "shared" / "data"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The place of all commands: the repository's files beside what the commands write."""
    path = tmp_path_factory.mktemp("readme")
    for name in ("README.md", "configs", "constraints.txt", "launch", "pyproject.toml", "tap_jax", "tests"):
        (path / name).symlink_to(ROOT / name)
    if DATA.is_dir():
        (path / "data").symlink_to(DATA)
    noting = path / "bin" / "tap-jax"
    noting.parent.mkdir()
    noting.write_text('#!/usr/bin/env bash\necho "$*" >> "$CALLS"\n')
    noting.chmod(0o755)
    return path


@pytest.fixture
def place(folder, monkeypatch):
    monkeypatch.chdir(folder)
    for name in ("SEEDS", "RUNS", "OUT", "JOBS", "FIELDS", "SWEEP"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("CALLS", str(folder / "calls"))

    def load_small(path, overrides=None):
        small = SMALL if re.match(r"configs/(demo|mini)", str(path)) else {}
        small = {field: value for field, value in small.items() if f"{field}=" not in str(path)}
        return load_config(path, small | dict(overrides or {}))

    monkeypatch.setattr(configuration, "load_config", load_small)
    monkeypatch.setattr(tap_jax, "load_config", load_small)
    return folder


@pytest.mark.parametrize(("language", "code"), BLOCKS)
def test_block(language, code, place, namespace):
    if language == "python":
        exec(compile(code, "README.md", "exec"), namespace)
        return
    for line in code.replace("\\\n", " ").splitlines():
        for command in shlex.split(line, comments=True) and line.split("&&"):
            run(shlex.split(command, comments=True))


@pytest.fixture(scope="module")
def namespace():
    """What the Python blocks share: later ones use what earlier ones define."""
    path, modules = list(sys.path), set(sys.modules)
    yield {"__name__": "readme"}
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        if name == "torch_model":
            del sys.modules[name]


def run(words):
    """One command, made small."""
    match words:
        case ["tap-jax", *arguments]:
            if "--config.data.root=data" in words and not DATA.is_dir():
                pytest.skip("needs the slices of the real data sets")
            assert cli.main([_with_pieces_there_are(argument) for argument in arguments]) == 0
        case ["python", "-m", module, *arguments]:
            sys.argv[1:], kept = arguments, sys.argv[1:]
            try:
                with pytest.raises(SystemExit) as ended:
                    runpy.run_module(module, run_name="__main__")
            finally:
                sys.argv[1:] = kept
            assert not ended.value.code
        case ["pip", "install", "-c", "constraints.txt", "-e", target]:
            if target != ".":
                assert f"pip install -c constraints.txt -e '{target}'" in (ROOT / ".ci" / "run").read_text()
        case ["pytest"]:
            pass  # this is it
        case _:
            environment = os.environ | {"BASH_ENV": "/dev/null"}
            done = subprocess.run(["env", *words], env=environment, capture_output=True, text=True, timeout=120)
            assert done.returncode == 0, done.stderr


def _with_pieces_there_are(argument):
    """The demo's vocabulary is that of all its texts; here it is what the few texts of the small one make."""
    field, _, _ = argument.partition("=")
    if field != "--config.model.vocab":
        return argument
    made = json.loads(pathlib.Path("exports/client8/config.json").read_text())
    return f"{field}={made['model']['vocab']}"


def test_files_that_are_named_exist():
    named = re.findall(r"\]\((?!https?:|#)([^)#]+)\)", README)
    named += re.findall(r"`((?:tap_jax|configs|launch|tests)/[\w./]+\.\w+)`", README)
    assert named
    missing = [name for name in named if not (ROOT / name).exists()]
    assert not missing


def test_links_within_the_page_lead_somewhere():
    titles = re.findall(r"^#+ (.*)$", README, re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
    assert set(re.findall(r"\]\(#([^)]+)\)", README)) <= anchors


def test_functions_that_are_named_exist():
    rows = re.findall(r"^\|[^|]*\| (\[`tap_jax/.*) \|$", README, re.MULTILINE)
    named = [
        (path, name)
        for row in rows
        for path, names in re.findall(r"\[`(tap_jax/[\w/]+\.py)`\]\([^)]*\): ([^;|]*)", row)
        for name in re.findall(r"`([\w.]+)`", names)
    ]
    assert len(named) >= 12
    for path, name in named:
        found = importlib.import_module(path.removesuffix(".py").replace("/", "."))
        for part in name.split("."):
            assert hasattr(found, part), f"README: {path} has no {name}"
            found = getattr(found, part)
