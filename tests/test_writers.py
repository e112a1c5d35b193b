"""Where curves go: what is written of a round, by each writer, after an interruption, and when a writer fails."""

import json
import logging
import pathlib
import sys

import pytest

from tap_jax.config import config_hash, default_config, override, validate
from tap_jax.errors import UserError
from tap_jax.runs import writers
from tap_jax.runs.writers import Guarded, TensorBoard, open_writer

LINE = {
    "round": 4,
    "clients": [0, 3],
    "learning_rate": 0.5,
    "losses": {
        "federated": {"0": {"ag_news": 1.0, "vqa": 3.0}, "3": {"vqa": 5.0, "mmlu": None}},
        "personal": {"0": {"ag_news": 2.0, "vqa": None}, "3": {"vqa": None, "mmlu": None}},
    },
    "replacements": [
        {"round": 4, "client": 0, "task": "vqa", "variant": "tap"},
        {"round": 4, "client": 3, "task": "vqa", "variant": "tap"},
        {"round": 4, "client": 3, "task": "vqa", "variant": "tap@0.05"},
    ],
    "dropped": [{"client": 3, "why": "norm too large"}],
    "epsilon": 2.5,
    "seconds": 1.25,
}


class Recorder:
    """A writer of one's own."""

    def __init__(self):
        self.written, self.closed = [], 0

    def write(self, step, scalars):
        self.written.append((step, dict(scalars)))

    def close(self):
        self.closed += 1


def test_a_round_as_scalars():
    assert writers.of_round(LINE, ("tap", "tap@0.05")) == {
        "loss/federated": 3.0,
        "loss/federated/ag_news": 1.0,
        "loss/federated/vqa": 4.0,
        "loss/personal": 2.0,
        "loss/personal/ag_news": 2.0,
        "replacements/tap/ag_news": 0,
        "replacements/tap/vqa": 2,
        "replacements/tap/mmlu": 0,
        "replacements/tap@0.05/ag_news": 0,
        "replacements/tap@0.05/vqa": 1,
        "replacements/tap@0.05/mmlu": 0,
        "dropped": 1,
        "epsilon": 2.5,
        "learning_rate": 0.5,
        "seconds": 1.25,
    }


def test_a_round_of_a_method_that_neither_sends_nor_replaces():
    line = {"round": 0, "learning_rate": 0.5, "losses": {"local": {"0": {"vqa": 1.5}}}, "seconds": 2.0}
    expected = {"loss/local": 1.5, "loss/local/vqa": 1.5, "learning_rate": 0.5, "seconds": 2.0}
    assert writers.of_round(line) == expected


# --- the configuration ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "message"),
    [(("tensorboad",), "writers: unknown 'tensorboad'; use tensorboard, wandb"), (("wandb",) * 2, "name each once")],
)
def test_a_wrong_writer_is_named(value, message):
    with pytest.raises(UserError, match=message):
        validate(override(default_config(), {"writers": value}))


def test_a_run_may_go_on_with_other_writers():
    config = override(default_config(), {"writers": ("tensorboard", "wandb")})
    validate(config)
    assert config_hash(config) == config_hash(default_config())


def test_a_missing_package_is_one_line_that_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setattr(writers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"writers: 'wandb' is not installed; pip install 'tap-jax\[wandb\]'"):
        writers.check(("wandb",))
    writers.check(())


def test_a_folder_is_no_package(monkeypatch, tmp_path):
    """Weights & Biases leaves a folder of its own name wherever it is used."""
    (tmp_path / "left_by_a_run").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert writers.importlib.util.find_spec("left_by_a_run") is not None
    with pytest.raises(UserError, match="is not installed"):
        writers.check(("left_by_a_run",))


# --- failures ------------------------------------------------------------------------------------------------------


def test_a_writer_that_fails_is_warned_of_once_closed_and_left_alone(caplog):
    class Full(Recorder):
        def write(self, step, scalars):
            super().write(step, scalars)
            if step == 2:
                raise OSError(28, "No space left on device")

    recorder = Full()
    guarded = Guarded(recorder)
    with caplog.at_level(logging.WARNING):
        for step in (1, 2, 3):
            guarded.write(step, {"a": 1.0})
        guarded.close()
    assert [step for step, _ in recorder.written] == [1, 2]
    assert recorder.closed == 1
    (record,) = caplog.records
    assert record.getMessage() == "writers: Full has failed and gets nothing more ([Errno 28] No space left on device)"


def test_a_failure_at_the_end_is_a_warning_too(caplog):
    tries = []

    class Hangs(Recorder):
        def close(self):
            tries.append(1)
            raise TimeoutError

    Guarded(Hangs()).close()
    assert len(tries) == 1, "a writer that hangs is not waited for twice"
    assert "Hangs has failed and gets nothing more (TimeoutError)" in caplog.text


# --- TensorBoard ---------------------------------------------------------------------------------------------------


def curves(folder):
    """Tag -> [(step, value), ...], as TensorBoard itself reads them."""
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = event_accumulator.EventAccumulator(str(folder)).Reload()
    return {tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def test_tensorboard_reads_what_was_written_and_a_resumed_run_replaces_what_it_plays_again(tmp_path):
    pytest.importorskip("tensorboard")
    first = open_writer("tensorboard", tmp_path, {}, print)
    for step in (1, 2, 3):
        first.write(step, {"loss/federated": step / 2, "seconds": 1.0})
    # Killed here: no close. What was written is there.
    assert curves(tmp_path / "tensorboard")["loss/federated"] == [(1, 0.5), (2, 1.0), (3, 1.5)]
    second = open_writer("tensorboard", tmp_path, {}, print)
    for step in (2, 3, 4):
        second.write(step, {"loss/federated": step / 2, "seconds": 3.0})
    second.close()
    found = curves(tmp_path / "tensorboard")
    assert found["loss/federated"] == [(1, 0.5), (2, 1.0), (3, 1.5), (4, 2.0)]
    assert found["seconds"] == [(1, 1.0), (2, 3.0), (3, 3.0), (4, 3.0)]
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2


def test_tensorboard_that_is_not_written_to_leaves_nothing(tmp_path):
    TensorBoard(tmp_path).close()
    assert not list(tmp_path.iterdir())


def test_a_full_disk_does_not_end_the_run(small_disk, caplog):
    pytest.importorskip("tensorboard")
    guarded = Guarded(TensorBoard(small_disk))
    guarded.write(1, {"a": 1.0})
    (small_disk / "big").write_bytes(b"0" * (4 * 2**20 - 64 * 1024))
    for step in range(2, 400):
        guarded.write(step, {f"a/{number}": 1.0 for number in range(20)})
    guarded.close()
    assert caplog.text.count("TensorBoard has failed and gets nothing more (") == 1


# --- Weights & Biases ----------------------------------------------------------------------------------------------

STAND_IN = '''
"""Records what is asked of it; refuses a step that is not above the last one, as the real one does."""
import json, os, pathlib

class Error(Exception):
    pass

class Settings:
    def __init__(self, **fields):
        self.fields = fields

class Run:
    disabled, url = False, "https://wandb.example/run"

    def __init__(self, fields):
        self.offline, self.id = os.environ.get("WANDB_MODE") == "offline", fields["id"]
        self.path = pathlib.Path(fields["dir"]) / "calls.jsonl"
        self.step = 0
        if not self.offline and self.path.exists():  # a server knows
            logged = [json.loads(line) for line in self.path.read_text().splitlines()]
            self.step = 1 + max(call[1] for call in logged if call[0] == self.id)

    def log(self, scalars, step, commit):
        assert step >= self.step and commit
        self.step = step + 1
        with self.path.open("a") as stream:
            stream.write(json.dumps([self.id, step, scalars]) + "\\n")

    def finish(self):
        pass

def init(**fields):
    if os.environ.get("WANDB_MODE") == "nowhere":
        raise Error("No API key configured. Use `wandb login` to log in.")
    assert fields["resume"] == "allow" and fields["settings"].fields["finish_timeout"] > 0
    return Run(fields)
'''


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Weights & Biases without the package, which is large."""
    folder = tmp_path / "packages"
    folder.mkdir()
    (folder / "wandb.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    yield tmp_path
    sys.modules.pop("wandb", None)


def calls(workdir):
    return [json.loads(text) for text in (pathlib.Path(workdir) / "calls.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("mode", "closed"), [("offline", True), ("online", True), ("online", False)])
def test_wandb_resumes_under_its_id_and_writes_nothing_twice(stand_in, monkeypatch, mode, closed):
    monkeypatch.setenv("WANDB_MODE", mode)
    writers.check(("wandb",))
    said = []
    first = open_writer("wandb", stand_in, {"rounds": 4}, said.append)
    for step in (1, 2, 3):
        first.write(step, {"loss": 1 / step})
    if closed:
        first.close()
    second = open_writer("wandb", stand_in, {"rounds": 4}, said.append)
    for step in (3, 4):
        second.write(step, {"loss": 1 / step})
    second.close()
    logged = calls(stand_in)
    assert [(step, scalars["loss"]) for _, step, scalars in logged] == [(1, 1), (2, 1 / 2), (3, 1 / 3), (4, 1 / 4)]
    assert len({identity for identity, _, _ in logged}) == 1
    where = {"offline": f"offline, in {stand_in}/wandb", "online": "https://wandb.example/run"}[mode]
    assert said == [f"wandb: {where}"] * 2


def test_wandb_killed_offline_is_written_again(stand_in, monkeypatch):
    """What it had in memory may be lost."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    open_writer("wandb", stand_in, {}, print).write(1, {"loss": 1.0})
    open_writer("wandb", stand_in, {}, print).write(1, {"loss": 1.0})
    (one, _, _), (other, _, _) = calls(stand_in)
    assert one == other


def test_wandb_that_does_not_start_is_one_line(stand_in, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "nowhere")
    with pytest.raises(UserError, match="writers: 'wandb' does not start .No API key .*; or set WANDB_MODE=offline"):
        open_writer("wandb", stand_in, {}, print)
