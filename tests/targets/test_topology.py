"""Names of targets, and what is said where one cannot be had."""

import importlib.util

import pytest

from tap_jax.cli import main as cli
from tap_jax.errors import UserError
from tap_jax.planning.targets import topology
from tap_jax.planning.targets.topology import Target, parse

NEEDED = {"gpu": "jax_cuda12_plugin", "tpu": "libtpu"}


def installed(kind):
    return importlib.util.find_spec(NEEDED[kind]) is not None


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("h100", Target("h100", "gpu", "h100", 1)),
        ("H100x8", Target("h100x8", "gpu", "h100", 8)),
        ("a100", Target("a100", "gpu", "a100", 1)),
        ("a100-40", Target("a100-40", "gpu", "a100-40", 1)),
        ("a100-40x4", Target("a100-40x4", "gpu", "a100-40", 4)),
        ("v5e:2x4", Target("v5e:2x4", "tpu", "v5e")),
        ("v4:2x2x1", Target("v4:2x2x1", "tpu", "v4")),
        ("v6e:4x4", Target("v6e:4x4", "tpu", "v6e")),
    ],
)
def test_names(name, target):
    assert parse(name) == target


@pytest.mark.parametrize("name", ["h200", "v5e", "v5e:", "v5e:2x", "v3:2x2", "a100x", "h100x-1", "x8", "h100:2x4"])
def test_unknown_names(name):
    with pytest.raises(UserError, match="target: unknown '.*'; use h100"):
        parse(name)


def test_number_of_devices():
    with pytest.raises(UserError, match="has 0 devices"):
        parse("h100x0")


def test_a_tpus_compiler_has_deep_stacks(monkeypatch):
    """Beside what the user tells libtpu, whose own size of the stack holds."""
    monkeypatch.delenv("LIBTPU_INIT_ARGS", raising=False)
    wanted = "--fibers_default_thread_stack_size=268435456"
    assert topology.environment(parse("v5e:2x4"))["LIBTPU_INIT_ARGS"] == wanted
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--one=1")
    assert topology.environment(parse("v5e:2x4"))["LIBTPU_INIT_ARGS"] == f"--one=1 {wanted}"
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--fibers_default_thread_stack_size=1")
    assert topology.environment(parse("v5e:2x4"))["LIBTPU_INIT_ARGS"] == "--fibers_default_thread_stack_size=1"
    assert "LIBTPU_INIT_ARGS" not in topology.environment(parse("h100"))


def test_gpu_description_is_complete():
    text = topology.gpu_description("a100-40")
    assert "device_memory_size: 42298834944" in text and "major: 8" in text and "core_count: 108" in text


@pytest.mark.parametrize("kind", ["gpu", "tpu"])
def test_missing_extra(kind, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    name = {"gpu": "h100", "tpu": "v5e:2x4"}[kind]
    assert cli.main(["describe", "--config=configs/demo.py", f"--target={name}"]) == 2
    error = capsys.readouterr().err
    assert error == (
        f"tap-jax: target: '{name}' needs the compiler of its maker; pip install 'tap-jax[target-{kind}]'\n"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target=h200"], "target: unknown 'h200'"),
        (["--fit"], "fit: for which target"),
        (["--target=h100", "--minutes=0"], "minutes: 0"),
    ],
)
def test_bad_flags(arguments, message, capsys):
    assert cli.main(["describe", "--config=configs/demo.py", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"tap-jax: {message}") and error.count("\n") == 1


@pytest.mark.parametrize("name", ["v5e:2x4", "v4:2x2x1", "h100x2"])
def test_devices(name):
    target = parse(name)
    if not installed(target.kind):
        pytest.skip(f"needs tap-jax[target-{target.kind}]")
    assert len(topology.devices(target)) == {"v5e:2x4": 8, "v4:2x2x1": 4, "h100x2": 2}[name]


def test_topology_that_the_compiler_refuses():
    if not installed("tpu"):
        pytest.skip("needs tap-jax[target-tpu]")
    with pytest.raises(UserError, match="target: the compiler does not take 'v5e:3x5'"):
        topology.devices(parse("v5e:3x5"))
