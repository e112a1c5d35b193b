"""launch/full_size.sh: what it asks of `tap-jax train`, and its checkpoints; a run takes too long for a test."""

import importlib.util
import pathlib
import subprocess

import pytest

from tap_jax.cli import arguments, commands
from tap_jax.config import validate, variants_of

ROOT = pathlib.Path(__file__).parents[1]
SCRIPT = ROOT / "launch" / "full_size.sh"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("full_size", SCRIPT.with_suffix(".py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def started(script, monkeypatch, tmp_path):
    """started(*arguments) -> (exit status, words of each command); nothing is run."""
    calls = []
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(script.subprocess, "run", lambda command, **_: calls.append(command))

    class Process:
        pid = 0

        def __init__(self, command, **_):
            calls.append(command)

    usage = type("Usage", (), {"ru_utime": 60.0, "ru_stime": 6.0, "ru_maxrss": 5_000_000})
    monkeypatch.setattr(script.subprocess, "Popen", Process)
    monkeypatch.setattr(script.os, "wait4", lambda pid, options: (pid, 0, usage))
    monkeypatch.setattr(script, "write_tokenizer", lambda folder: folder)
    (tmp_path / "data" / "caltech101").mkdir(parents=True)
    (tmp_path / "data" / "vqa").mkdir()

    def start(*words):
        status = script.main([str(tmp_path / "data"), "--out", str(tmp_path / "out"), *words])
        return status, [[str(word) for word in call] for call in calls]

    return start


def test_the_shell_script_is_sound():
    subprocess.run(["bash", "-n", SCRIPT], check=True)
    shown = subprocess.run(["bash", SCRIPT, "--help"], capture_output=True, text=True, timeout=60, check=True)
    assert all(flag in shown.stdout for flag in ("--models", "--out", "--tests", "--keep"))


def test_both_models_run_as_the_paper_has_them_but_for_what_is_in_little(started, script, capsys):
    status, calls = started("--tests", "3", "--config.seed=42")
    assert status == 0
    kinds = [(call[-2], "checkpoint") if "--child" in call else (call[4].split("/")[-1], "train") for call in calls]
    assert kinds == [("flava", "checkpoint"), ("flava.py", "train"), ("vilt", "checkpoint"), ("vilt.py", "train")]
    for call in calls[1::2]:
        config = arguments.parse(commands.COMMANDS["train"], call[4:])["config"]
        validate(config)
        assert config.federation.groups == 3 and len(variants_of(config)) == 5 and config.model.width == 768
        assert (config.rounds, config.batch_size, config.data.test_size, config.seed) == (1, 2, 3, 42)
    lines = capsys.readouterr().out.splitlines()[-2:]
    assert all('"peak_gb": 5.12' in line and '"cpu_minutes": 1.1' in line for line in lines)


@pytest.mark.parametrize(
    ("words", "message"), [(["--batch=3"], "--config.KEY=VALUE"), (["--models", "bert"], "invalid choice")]
)
def test_other_words_are_refused(started, capsys, words, message):
    with pytest.raises(SystemExit) as ended:
        started(*words)
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_data_that_are_not_there_are_named(script, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        script.main([str(tmp_path / "none")])
    assert ended.value.code == 2 and "no folder" in capsys.readouterr().err


@pytest.mark.parametrize("model", ["flava", "vilt"])
def test_a_checkpoint_has_the_published_sizes(script, model, monkeypatch, tmp_path):
    """With the weights left out, which are gigabytes."""
    transformers = pytest.importorskip("transformers")
    from tap_jax.assembly import model_config
    from tap_jax.config import load_config
    from tap_jax.models.checkpoint_sizes import check_sizes

    class Made:
        def __init__(self, config):
            self.config = config

        def save_pretrained(self, folder):
            self.config.save_pretrained(folder)

    monkeypatch.setattr(transformers, "FlavaForPreTraining", Made)
    monkeypatch.setattr(transformers, "ViltForMaskedLM", Made)
    (tmp_path / "checkpoint.unfinished").mkdir()
    script.write_checkpoint(model, tmp_path / "checkpoint")
    check_sizes(tmp_path / "checkpoint", model_config(load_config(ROOT / "configs" / f"{model}.py")))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
