"""Docstrings: every public name has one, their examples run, and `help(tap_jax)` lists what there is."""

import ast
import doctest
import importlib
import inspect
import operator
import pathlib
import pydoc

import pytest

import tap_jax
from tap_jax.experiment import Experiment

ROOT = pathlib.Path(__file__).parents[1]
FILES = sorted((ROOT / "tap_jax").rglob("*.py"))
WITH_EXAMPLES = [file for file in FILES if "    >>> " in file.read_text()]
METHODS = (Experiment.init, Experiment.round, Experiment.finish, Experiment.evaluate)
# One example in parts, each going on where the one before ended.
A_RUN = (tap_jax.build, *METHODS, tap_jax.run, tap_jax.export_client)


def examples(thing, name):
    """The docstrings with examples of a function, or of a module with all that it defines."""
    found = doctest.DocTestFinder().find(thing, name)
    return [test for test in found if test.examples]


def run(test, known):
    """Runs the examples of a docstring; what they define goes into `known`."""
    said = []
    test.globs = known
    doctest.DocTestRunner().run(test, out=said.append, clear_globs=False)
    assert not said, "".join(said)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Examples are written for the repository's folder; what they write goes elsewhere."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)


def public(node, name):
    """(name, syntax tree) of a module and everything public that it, or a class of it, defines."""
    yield name, node
    for child in node.body if isinstance(node, ast.Module | ast.ClassDef) else ():
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and not child.name.startswith("_"):
            yield from public(child, f"{name}.{child.name}")


def test_everything_public_has_a_docstring():
    found = {}
    for file in FILES:
        found |= public(ast.parse(file.read_text()), str(file.relative_to(ROOT)))
    assert len(found) > 500, "the search has lost its way"
    assert [name for name, node in found.items() if not ast.get_docstring(node)] == []


@pytest.mark.parametrize("file", WITH_EXAMPLES, ids=lambda file: file.stem)
def test_the_examples_run(file, folder):
    name = ".".join(file.relative_to(ROOT).with_suffix("").parts)
    module = importlib.import_module(name)
    parts = {f"{part.__module__}.{part.__qualname__}" for part in A_RUN}
    for test in examples(module, name):
        if test.name not in parts:
            run(test, dict(vars(module)))


def test_the_example_of_a_run(folder):
    known = {}
    for part in A_RUN:
        (test,) = examples(part, part.__qualname__)
        run(test, known)


@pytest.mark.parametrize("name", tap_jax.__all__)
def test_public_names_have_an_example(name):
    assert "Example:\n" in getattr(tap_jax, name).__doc__


LISTED = [name for name in tap_jax.__all__ if name != "Experiment"] + [part.__qualname__ for part in METHODS]


@pytest.mark.parametrize("name", LISTED)
def test_help_lists_what_there_is_with_its_arguments(name):
    value = operator.attrgetter(name)(tap_jax)
    page = pydoc.plain(pydoc.render_doc(tap_jax)).splitlines()
    (line,) = [line.strip() for line in page if line.startswith(f"      {name}(")]
    listed = line.removeprefix(name).strip("()").replace("*, ", "").split(", ")
    assert listed == [argument for argument in inspect.signature(value).parameters if argument != "self"]
    assert inspect.getdoc(value).splitlines()[0] in pydoc.plain(pydoc.render_doc(value))
