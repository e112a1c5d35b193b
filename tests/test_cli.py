"""The command line: what its arguments mean, what it prints and writes, and how it ends."""

import dataclasses
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys

import jax
import pytest

from tap_jax.cli import main as cli
from tap_jax.cli import startup
from tap_jax.cli.arguments import parse
from tap_jax.cli.commands import COMMANDS
from tap_jax.config import config_hash, default_config, load_config, to_json
from tap_jax.errors import UserError
from tap_jax.runs import runner as runs
from tap_jax.runs.writers import of_round

DEMO = "configs/demo.py"


@pytest.fixture(autouse=True)
def devices_are_chosen(monkeypatch):
    """The tests' own CPU devices stay."""
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "8")


def parsed(*argv):
    return parse(COMMANDS["train"], [f"--config={DEMO}", "--workdir=w", *argv])["config"]


# --- the package ---------------------------------------------------------------------------------------------------


def test_importing_the_package_is_cheap_and_all_its_names_are_there():
    code = """if True:
        import sys, tap_jax
        heavy = {"jax", "flax", "torch", "transformers", "datasets", "numpy"} & set(sys.modules)
        assert not heavy, heavy
        for name in tap_jax.__all__:
            assert callable(getattr(tap_jax, name)) and name in dir(tap_jax)
        assert not {"torch", "transformers", "datasets"} & set(sys.modules)
        import jax
        assert not jax._src.xla_bridge.backends_are_initialized()
        assert tap_jax.replace.__module__ == "tap_jax.blocks"
        try:
            tap_jax.agregate
        except AttributeError as error:
            assert "aggregate" in str(error)
    """
    subprocess.run([sys.executable, "-c", code], check=True)


# --- arguments -----------------------------------------------------------------------------------------------------


def test_fields_are_overridden_by_type():
    config = parsed(
        "--config.rounds=7",
        "--config.seed",
        "42",
        "--config.model.head_layer_norm",
        "--noconfig.model.qv_delta",
        "--config.optimizer.learning_rate=1e-2",
        "--config.data.root=some=where",
        "--config.model.backbone_layers=(2, 3)",
        "--config.variants=tap,tap-no-kd,fedavg+2p",
        "--config.mesh.clients=2",
    )
    assert (config.rounds, config.seed, config.model.head_layer_norm, config.model.qv_delta) == (7, 42, True, False)
    assert (config.optimizer.learning_rate, config.data.root) == (1e-2, "some=where")
    assert config.model.backbone_layers == (2, 3)
    assert config.variants == ("tap", "tap-no-kd", "fedavg+2p")
    assert config.mesh.clients == 2
    assert config.is_locked


def test_config_argument_flag_order_and_one_value_tuples():
    found = parse(COMMANDS["train"], ["--config.seed=1", "--workdir", "w", "--config", f"{DEMO}:rounds=5,seed=2"])
    assert (found["config"].rounds, found["config"].seed, found["workdir"]) == (5, 1, "w")
    assert parsed("--config.variants=local").variants == ("local",)
    assert parsed("--config.variants=()").variants == ()


def test_one_margin_for_all_kinds():
    assert parsed("--config.margins=0.02").margins == 0.02
    assert parsed("--config.margins", "0.02").margins == 0.02
    assert parsed("--config.margins.text_generation=0.5").margins.text_generation == 0.5


def test_steps_of_bench():
    assert parse(COMMANDS["bench"], [f"--config={DEMO}", "--steps=3"])["steps"] == 3
    found = parse(COMMANDS["bench"], [f"--config={DEMO}", "--clients=30", "--against=torch"])
    assert [found[name] for name in ("steps", "clients", "rounds", "against")] == [0, 30, 0, "torch"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--config.rouns=3"], "rouns: unknown field; did you mean 'rounds'.*config has: .*rounds, screening, seed"),
        (["--config.optimizer.rate=1"], "optimizer.rate: unknown field; .*optimizer has: .*learning_rate"),
        (["--config.rounds=many"], "rounds: 'many' is no int"),
        (["--config.rounds=2.5"], "rounds: '2.5' is no int"),
        (["--config.optimizer.clip_norm=x"], "optimizer.clip_norm: 'x' is no float"),
        (["--config.model.head_layer_norm=perhaps"], "model.head_layer_norm: 'perhaps' is no bool"),
        (["--config.rounds=-1"], "rounds: -1; use at least 0"),
        (["--config.rounds"], "rounds: --config.rounds lacks a value"),
        (["--config.model=3"], "model: is a section, not a value; model has: .*, name, "),
        (["--config.model=vilt"], "model: is a section, not a value; did you mean model.name=vilt[?]$"),
        (["--noconfig.rounds"], "rounds: --noconfig is for switches"),
        (["--config.margins=low"], "margins: 'low'; use numbers"),
        (["--config.method=tapp"], "method: unknown 'tapp'; use one of tap, fedavg, local"),
        (["--workdri=x"], "unknown argument '--workdri'; did you mean --workdir"),
        (["extra"], "unknown argument 'extra'; .*--config.KEY"),
    ],
)
def test_a_wrong_argument_is_named(argv, message):
    with pytest.raises(UserError, match=message):
        parsed(*argv)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["train", f"--config={DEMO}"], "--workdir=DIR is missing; see tap-jax train --help"),
        (["train", "--workdir=x"], "--config=NAME"),
        (["train", "--workdir"], "workdir"),
        (["trian"], "unknown command 'trian'; did you mean 'train'"),
        (["tables"], "unknown command 'tables'; .*there are train, evaluate, report, export, describe, bench"),
        (["help", "trian"], "unknown command 'trian'; did you mean 'train'"),
        (["evaluate", "--workdir=w", "--config=x"], "unknown argument '--config'"),
        (["bench", f"--config={DEMO}", "--steps=few"], "steps: 'few' is no whole number"),
        (["bench", f"--config={DEMO}", "--steps=-1"], "steps: -1; use at least 1"),
        (["describe", "--config=configs/none.py"], "no file 'configs/none.py'"),
        (["describe", "--config=dmo:rounds=5"], "config: no file 'dmo:rounds=5'; name a Python file, or .* demo, "),
        (["describe", "--config=README.md"], "config: README.md, line .*, is not Python .*; name a Python file"),
    ],
)
def test_a_wrong_command_is_one_line_and_status_2(argv, message, capsys):
    assert cli.main(argv) == 2
    streams = capsys.readouterr()
    assert streams.out == ""
    assert re.fullmatch(f"tap-jax: .*{message}.*\n", streams.err)


def test_a_missing_writer_is_said_before_anything_is_built(tiny, tmp_path, monkeypatch, capsys):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "wandb" else found(name, *a))
    monkeypatch.setattr(runs, "build", lambda config, **given: pytest.fail("something is built"))
    (tmp_path / "tiny.json").write_text(to_json(tiny(({"ag_news": 0.5},) * 2, {"compilation_cache": "off"})))
    command = ["train", f"--config={tmp_path}/tiny.json", f"--workdir={tmp_path}/run", "--config.writers=wandb"]
    assert cli.main(command) == 2
    error = capsys.readouterr().err
    assert error == "tap-jax: writers: 'wandb' is not installed; pip install 'tap-jax[wandb]', or leave it out\n"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("process", [0, 1])
def test_only_the_process_that_writes_needs_the_writers(process, tiny, tmp_path, monkeypatch):
    def build(config, **given):
        raise RuntimeError("something is built")

    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None)
    monkeypatch.setattr(runs, "build", build)
    monkeypatch.setattr(jax, "process_index", lambda: process)
    config = tiny(({"ag_news": 0.5},) * 2, {"writers": ("wandb",)})
    with pytest.raises(RuntimeError if process else UserError, match="is built" if process else "writers: 'wandb'"):
        runs.run(config, tmp_path / "run", runs.Reporter(print, print))


def test_help_is_complete(capsys):
    assert cli.main(["--help"]) == 0
    whole = capsys.readouterr().out
    assert cli.main([]) == 2
    assert capsys.readouterr().err == whole
    for name, command in COMMANDS.items():
        assert f"  {name}" in whole
        assert cli.main([name, "--help"]) == 0
        text = capsys.readouterr().out
        assert text.startswith(f"usage: tap-jax {name}")
        assert all(f"--{flag.name}{'' if flag.default is False else '='}" in text for flag in command.flags)
        assert len(text.splitlines()) <= 20
        assert max(map(len, text.splitlines())) <= 110
        assert f"Example: tap-jax {name}" in text and "Exit status: 0; 2," in text
        assert cli.main(["help", name]) == 0
        assert capsys.readouterr().out == text


def test_interrupted(monkeypatch, capsys):
    def interrupt(**_):
        raise KeyboardInterrupt

    monkeypatch.setitem(COMMANDS, "describe", dataclasses.replace(COMMANDS["describe"], run=interrupt))
    assert cli.main(["describe", f"--config={DEMO}"]) == 130
    assert re.fullmatch("tap-jax: interrupted; .*\n", capsys.readouterr().err)


def test_full_disk_is_one_line_and_a_bug_is_not(monkeypatch, capsys):
    errors = [OSError(28, "No space left on device", "w/metrics.jsonl"), FileNotFoundError(2, "No such file", "x")]

    def fail(**_):
        raise errors.pop(0)

    monkeypatch.setitem(COMMANDS, "describe", dataclasses.replace(COMMANDS["describe"], run=fail))
    assert cli.main(["describe", f"--config={DEMO}"]) == 2
    assert re.fullmatch("tap-jax: w/metrics.jsonl: No space left.*\n", capsys.readouterr().err)
    with pytest.raises(FileNotFoundError):
        cli.main(["describe", f"--config={DEMO}"])


def test_a_reader_that_leaves_is_no_error():
    process = subprocess.run(
        f"set -o pipefail; {sys.executable} -m tap_jax describe --config=configs/demo.py | head -1",
        shell=True,
        executable="/bin/bash",
        capture_output=True,
        text=True,
    )
    assert process.stderr == ""
    assert process.stdout.startswith("flava, tap: ")


# --- before JAX starts ---------------------------------------------------------------------------------------------


def test_a_cpu_device_for_each_core_but_not_more_than_clients(monkeypatch):
    config = default_config()
    config.cohort_size = 3
    assert startup.cpu_devices(config) is None  # JAX_NUM_CPU_DEVICES is set
    monkeypatch.delenv("JAX_NUM_CPU_DEVICES")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(2)), raising=False)
    assert startup.cpu_devices(config) == 2
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    assert startup.cpu_devices(config) == 3
    config.mesh.clients = 5
    assert startup.cpu_devices(config) == 5
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=4")
    assert startup.cpu_devices(config) is None


def test_where_compiled_programs_are_kept(monkeypatch, tmp_path, caplog):
    config = default_config()
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert startup.cache_folder(config).startswith(str(tmp_path / "tap_jax" / "xla"))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "jax"))
    assert startup.cache_folder(config) == str(tmp_path / "jax")
    config.compilation_cache = str(tmp_path / "mine")
    assert startup.cache_folder(config) == str(tmp_path / "mine")
    (tmp_path / "file").write_text("")
    config.compilation_cache = str(tmp_path / "file" / "below")
    with pytest.raises(UserError, match="compilation_cache: cannot make"):
        startup.cache_folder(config)
    config.compilation_cache = ""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "file" / "below"))
    assert startup.cache_folder(config) is None
    assert "are not kept" in caplog.text
    config.compilation_cache = "off"
    assert startup.cache_folder(config) is None


def test_late_callbacks_are_dropped_and_other_errors_are_not():
    code = """if True:
        from tap_jax.cli import startup

        class Late:
            def __init__(self, message):
                self.message = message
            def __del__(self):
                raise RuntimeError(self.message)

        startup.drop_late_callbacks()
        Late("Event loop is closed")
        Late("another")
    """
    error = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stderr
    assert error.splitlines()[-1] == "RuntimeError: another"
    assert "Event loop" not in error


# --- whole runs ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """`command(*argv)`: a process of its own, with a compilation cache shared by this module."""
    cache = str(tmp_path_factory.mktemp("cache"))
    environment = os.environ | {"XDG_CACHE_HOME": cache, "JAX_COMPILATION_CACHE_DIR": cache}
    environment.pop("JAX_NUM_CPU_DEVICES", None)

    def run(*argv, program=("-m", "tap_jax")):
        command = [sys.executable, *program, *map(str, argv)]
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)

    run.cache = cache
    return run


@pytest.fixture(scope="module")
def trained(command, tiny, tmp_path_factory):
    """(folder of a finished run, its config file, the process that made it)."""
    folder = tmp_path_factory.mktemp("run")
    fields = {"method": "fedavg", "variants": ("fedavg", "fedavg+post"), "rounds": 2}
    (folder / "tiny.json").write_text(to_json(tiny(({"ag_news": 0.5}, {"ag_news": 0.5}), fields)))
    done = command("train", f"--config={folder}/tiny.json", f"--workdir={folder}/run")
    assert done.returncode == 0, done.stderr
    return folder / "run", folder / "tiny.json", done


def test_train_writes_the_files_of_the_contract(trained):
    folder, config, done = trained
    assert load_config(folder / "config.json").to_dict() == load_config(config).to_dict()
    lines = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [entry["round"] for entry in lines] == [0, 1]
    results = json.loads((folder / "results.json").read_text())
    parts = {"config", "config_hash", "versions", "results", "replacements", "screening", "timing"}
    assert set(results) == parts
    assert results["config_hash"] == config_hash(load_config(config))
    assert results["versions"]["jax"] == jax.__version__
    assert set(results["results"][0]) == {"variant", "client", "task", "metric", "value"}
    assert {row["variant"] for row in results["results"]} == {"fedavg", "fedavg+post"}
    assert (folder / "report.md").is_file() and (folder / "checkpoints").is_dir() and (folder / "models").is_dir()
    assert done.stderr == ""


def test_train_says_what_it_does(trained):
    folder, _, done = trained
    text = done.stdout
    assert "1 x cpu, float32" in text
    assert re.search(r"memory beside activations: [\d.]+ MiB on a device, [\d.]+ MiB with the host", text)
    assert "fedavg: 2 rounds, 2 of 2 clients in each" in text
    assert "tasks: ag_news; data: synthetic" in text
    assert re.search(r"parameters a client trains: [\d,]+ on average", text)
    assert "round 2/2: loss federated" in text
    assert re.search(r"ag_news Acc ↑ +\d", text)
    assert "after the last round: fedavg, fedavg+post for 2 clients\n" in text
    assert "scored 2/2: fedavg\n" in text
    assert re.search(
        rf"in {folder}: results.json, report.md, .*metrics.jsonl, config.json, figures, checkpoints, models", text
    )
    page, drawn = (folder / "report.html").read_text(), sorted(path.name for path in (folder / "figures").iterdir())
    assert drawn == ["losses_flava_fedavg.png"] and page.count("data:image/png;base64,") == 1
    assert re.search(r"took \d+:\d\d in all\n$", text)


def test_evaluate_finds_the_same_scores(trained, command):
    folder, _, _ = trained
    before = json.loads((folder / "results.json").read_text())
    done = command("evaluate", f"--workdir={folder}")
    assert done.returncode == 0, done.stderr
    after = json.loads((folder / "results.json").read_text())
    assert after["results"] == before["results"]
    assert "fedavg: 2 rounds, finished" in done.stdout and "scored 2/2: fedavg+post" in done.stdout
    assert "ag_news Acc" in done.stdout


def test_bench_prints_one_json_line(trained, command):
    _, config, _ = trained
    # As many steps as the run took, and its cache, so that this test need not compile again.
    done = command("bench", f"--config={config}", "--steps=3", f"--config.compilation_cache={command.cache}")
    assert done.returncode == 0, done.stderr
    (text,) = done.stdout.splitlines()
    found = json.loads(text)
    assert found["client_steps_per_s"] > 0
    assert found["samples_per_s"] == pytest.approx(8 * found["client_steps_per_s"], rel=1e-3)
    assert found["tflops"] > 0 and found["mfu"] is None
    assert found["compile_s"] > 0 and found["peak_bytes"] > 1e6
    assert (found["device"], found["clients"], found["steps"]) == ("cpu", 2, 3)
    assert len(found["seconds"]) >= 5


WITH_A_WRITER = """if True:
    import json, sys
    from tap_jax.runs import runner as runs
    from tap_jax.config import load_config

    class Mine:
        def write(self, step, scalars):
            print("==", json.dumps([step, scalars]))

        def close(self):
            print("==", json.dumps("closed"))

    config = load_config(sys.argv[1], {"writers": json.loads(sys.argv[3])})
    runs.run(config, sys.argv[2], runs.Reporter(print, lambda line: None, writers=[Mine()]))
"""


def test_a_damaged_checkpoint_is_passed_over_and_said_so(trained, command, tmp_path):
    folder, config, _ = trained
    shutil.copytree(folder, tmp_path / "run")
    parts = [path for path in (tmp_path / "run" / "checkpoints" / "2").rglob("*") if path.is_file()]
    damaged = max(parts, key=lambda path: path.stat().st_size)
    damaged.write_bytes(damaged.read_bytes()[: damaged.stat().st_size // 2])  # as a full disk or a kill leaves it
    names = ("tensorboard",) if importlib.util.find_spec("tensorboard") else ()
    done = command(config, tmp_path / "run", json.dumps(names), program=("-c", WITH_A_WRITER))
    assert done.returncode == 0, done.stderr
    assert "checkpoint 2 passed over: " in done.stdout
    assert "resuming after round 1 of 2" in done.stdout
    results = [json.loads((run / "results.json").read_text())["results"] for run in (folder, tmp_path / "run")]
    assert results[0] == results[1]
    # One's own writer gets what this process plays, and the scores.
    lines = [json.loads(text) for text in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    *written, closed = [json.loads(text[3:]) for text in done.stdout.splitlines() if text.startswith("== ")]
    assert closed == "closed" and [step for step, _ in written] == [2, 3]
    assert written[0][1] == of_round(lines[1])
    assert set(written[1][1]) == {f"score/{name}/ag_news/accuracy" for name in ("fedavg", "fedavg+post")}
    scores = [row["value"] for row in results[0] if row["variant"] == "fedavg"]
    assert written[1][1]["score/fedavg/ag_news/accuracy"] == pytest.approx(sum(scores) / len(scores))
    assert len(list(tmp_path.glob("run/tensorboard/*"))) == len(names)

    for number in (1, 2):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / str(number) / "state")
    before = snapshot(tmp_path / "run")
    done = command("train", f"--config={config}", f"--workdir={tmp_path}/run")
    assert done.returncode == 2
    assert re.fullmatch(r"tap-jax: checkpoints in .*: none of 2 can be used .*\n", done.stderr)
    assert snapshot(tmp_path / "run") == before


OWN_TASK = """
from tap_jax.data.synthetic import RULES
from tap_jax.tasks import Task, register_task

register_task(Task("our_news", "text_classification", ("text",), ("news",), "our_news", classes=4))
RULES["our_news"] = RULES["ag_news"]

def get_config():
    from tap_jax.config import load_config
    return load_config("tiny.json", {"federation.rows": ({"our_news": 1.0},), "method": "local", "rounds": 1})
"""


def test_a_run_with_a_task_of_ones_own(command, tiny, tmp_path, monkeypatch, capsys):
    """Its configuration registers it, and every other command is told where that is."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.json").write_text(to_json(tiny(({"ag_news": 1.0},), {"cohort_size": 1})))
    (tmp_path / "ours.py").write_text(OWN_TASK)
    done = command("train", "--config=ours.py", "--workdir=run")
    assert done.returncode == 0, done.stderr
    assert cli.main(["evaluate", "--workdir=run"]) == 2
    error = capsys.readouterr().err
    assert "our_news" in error and "--register" in error, error
    for argv in (("evaluate", "--workdir=run"), ("report", "run", "--out=report")):
        done = command(*argv, "--register=ours.py")
        assert done.returncode == 0, done.stderr
    assert "our_news" in (tmp_path / "report" / "report.md").read_text()
    assert cli.main(["evaluate", "--workdir=run", "--register=none.py"]) == 2
    assert capsys.readouterr().err == "tap-jax: register: no file 'none.py'; name a Python file\n"


def test_evaluate_says_what_a_run_lacks(trained, tmp_path, capsys):
    folder, _, _ = trained
    assert cli.main(["evaluate", f"--workdir={tmp_path}/none"]) == 2
    assert re.fullmatch("tap-jax: workdir: .*none holds no run .*; train one there first\n", capsys.readouterr().err)
    shutil.copytree(folder, tmp_path / "run")
    (tmp_path / "run" / "results.json").unlink()
    assert cli.main(["evaluate", f"--workdir={tmp_path}/run"]) == 2
    assert "the run has not finished; call train again" in capsys.readouterr().err
    good = json.loads((folder / "results.json").read_text())
    for damaged in ('{"config"', "[]", json.dumps(good | {"replacements": [3]}), json.dumps(good | {"timing": None})):
        (tmp_path / "run" / "results.json").write_text(damaged)
        assert cli.main(["evaluate", f"--workdir={tmp_path}/run"]) == 2
        error = capsys.readouterr().err
        assert re.fullmatch("tap-jax: workdir: results.json is damaged; call train again, which .*\n", error)


def snapshot(folder):
    """Every file's bytes."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
