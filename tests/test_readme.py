"""Every command and every Python block of README.md and of the pages in launch/docs is run, in order, page by page.

Commands are taken as they are, but for their size: the configurations that they name are made small (SMALL), and the
scripts that would train for hours or days are given a tap-jax that only notes what it is asked to do
(tests/test_launch.py checks what that is). Installing and testing is what .ci/run does, with the same two commands.
All pages share one folder. Python blocks share their names with the later ones of the same page alone; a page that goes
on from the demo says so, and finds it in runs/demo, also where its tests are run by themselves.
"""

import importlib
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
from tap_jax.registry import METHODS
from tap_jax.tasks import TASKS

ROOT = pathlib.Path(__file__).parents[1]
DOCS = sorted((ROOT / "launch" / "docs").glob("*.md"))
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *DOCS)}
README = PAGES["README.md"]
# Pages whose blocks are not run here, but whose links lead somewhere, too.
LINKING = PAGES | {
    name: (ROOT / name).read_text(encoding="utf-8") for name in ("CONTRIBUTING.md", "launch/benchmarks.md")
}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCKS = [
    pytest.param(
        page, found[1], found[2], id=f"{pathlib.Path(page).stem}-line{text[: found.start()].count(chr(10)) + 1}"
    )
    for page, text in PAGES.items()
    for found in FENCE.finditer(text)
    if found[1] in ("bash", "python")
]
DEMO = "tap-jax train --config=demo --workdir=runs/demo"
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
    "mesh.clients": 1,
    "mesh.data": 1,
}
# Client 8 of the demo, which weights_and_exports.md exports, has the tasks that it has there. Later runs have one task:
# each further one is more to compile.
OF_THE_DEMO = ({"ag_news": 0.125},) * 8 + ({"fashion_mnist": 1.0, "common_gen": 1.0},)
OF_LATER_RUNS = ({"ag_news": 0.1},) * 9
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
        rows = OF_LATER_RUNS if pathlib.Path("runs/demo").exists() else OF_THE_DEMO
        small = SMALL | {"federation.rows": rows} if re.match(r"(configs/)?(demo|mini)", str(path)) else {}
        small = {field: value for field, value in small.items() if f"{field}=" not in str(path)}
        return load_config(path, small | dict(overrides or {}))

    # The package first: it looks its names up when they are first asked for, and what it finds is what comes back.
    monkeypatch.setattr(tap_jax, "load_config", load_small)
    monkeypatch.setattr(configuration, "load_config", load_small)
    return folder


@pytest.mark.parametrize(("page", "language", "code"), BLOCKS)
def test_block(page, language, code, place, namespaces):
    if goes_on_from_the_demo(PAGES[page]) and not pathlib.Path("runs/demo").exists():
        run(shlex.split(DEMO))
    if language == "python":
        exec(compile(code, page, "exec"), namespaces.setdefault(page, {"__name__": pathlib.Path(page).stem}))
        return
    for line in code.replace("\\\n", " ").splitlines():
        for command in shlex.split(line, comments=True) and line.split("&&"):
            run(shlex.split(command, comments=True))


def goes_on_from_the_demo(text):
    return "goes on from the demo of the [README](../../README.md#two-commands)" in text


@pytest.fixture(scope="module")
def namespaces():
    """Page -> what its Python blocks share: later ones use what earlier ones define."""
    path, modules, methods, tasks = list(sys.path), set(sys.modules), dict(METHODS), dict(TASKS)
    yield {}
    sys.path[:] = path
    for name in METHODS.keys() - methods.keys():  # registered by a page
        del METHODS[name]
    for name in TASKS.keys() - tasks.keys():
        del TASKS[name]
    for name in set(sys.modules) - modules:
        if name == "torch_model":
            del sys.modules[name]


def run(words):
    """One command, made small."""
    match words:
        case ["tap-jax", *arguments]:
            if "--config.data.root=data" in words and not DATA.is_dir():
                pytest.skip("needs the slices of the real data sets")
            assert cli.main(arguments) == 0
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


def test_a_page_says_what_it_goes_on_from():
    assert DEMO in README
    for page, text in PAGES.items():
        code = "".join(found[2] for found in FENCE.finditer(text))
        assert page == "README.md" or goes_on_from_the_demo(text) or not re.search(r"runs/demo\b", code), page


def test_the_readme_is_short_and_leads_to_every_page():
    assert len(README.splitlines()) <= 150
    table = README.split("## Where next")[1]
    linked = {target for _, target in links("README.md", table)}
    assert {path.relative_to(ROOT).as_posix() for path in DOCS} <= linked


@pytest.mark.parametrize("page", LINKING)
def test_files_that_are_named_exist(page):
    named = [target for target, _ in places(page)]
    named += re.findall(r"`((?:tap_jax|configs|launch|tests)/[\w./]+\.\w+)`", LINKING[page])
    missing = [name for name in named if "NAME" not in name and not (ROOT / name).exists()]
    assert not missing


@pytest.mark.parametrize("page", LINKING)
def test_links_lead_to_headings_that_there_are(page):
    for target, anchor in places(page):
        assert not anchor or anchor in anchors(target), f"{page}: {target} has no heading #{anchor}"


def links(page, text):
    """(what is written, the file that it means, from the repository's root) of every link to a file or heading."""
    for written in re.findall(r"\]\((?!https?:)([^)]+)\)", text):
        path = written.partition("#")[0]
        target = os.path.normpath(ROOT / pathlib.Path(page).parent / path) if path else ROOT / page
        yield written, pathlib.Path(os.path.relpath(target, ROOT)).as_posix()


def places(page):
    """(file, heading's anchor or nothing) of every link of a page."""
    return [(target, written.partition("#")[2]) for written, target in links(page, FENCE.sub("", LINKING[page]))]


def anchors(page):
    """As GitHub makes them of a page's headings."""
    titles = re.findall(r"^#+ (.*)$", FENCE.sub("", (ROOT / page).read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_functions_that_are_named_exist():
    rows = [row for text in PAGES.values() for row in re.findall(r"^\|[^|]*\| (\[`tap_jax/.*) \|$", text, re.MULTILINE)]
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
            assert hasattr(found, part), f"{path} has no {name}"
            found = getattr(found, part)


def test_the_picture_of_the_method_is_what_its_script_draws(tmp_path, monkeypatch):
    """Its size, that is: pixels differ between versions of matplotlib."""
    monkeypatch.setattr(sys, "argv", ["method_figure.py", str(tmp_path / "method.png")])
    runpy.run_path(str(ROOT / "launch" / "method_figure.py"), run_name="__main__")
    drawn, kept = (path.read_bytes() for path in (tmp_path / "method.png", ROOT / "launch" / "figures" / "method.png"))
    assert drawn[:24] == kept[:24]
