"""Bad input through the command line: one clear line that names the remedy, status 2, nothing half-written.

(Damaged checkpoints: test_cli.py and engine/test_checkpointing.py. Single fields: test_config.py. A disk that fills up
while a run is under way is the one case that leaves something: what was whole before.)
"""

import errno
import fcntl
import io
import os
import pathlib
import re
import subprocess
import tempfile

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from tap_jax.cli import main as cli
from tap_jax.cli import terminal
from tap_jax.config import config_hash, to_json
from tap_jax.data.text import load_tokenizer
from tap_jax.engine.checkpointing import Checkpoints
from tap_jax.experiment import build

NEWS, PICTURES = ({"ag_news": 0.5}, {"ag_news": 0.5}), ({"cifar100": 1.0},)


@pytest.fixture(autouse=True)
def devices_are_chosen(monkeypatch):
    """The tests' own CPU devices stay."""
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "8")


@pytest.fixture
def refused(tiny, tmp_path, capsys):
    """`refused(message, *arguments, rows=..., fields=...)`: `train` says so, and leaves everything as it was."""

    def check(message, *arguments, rows=NEWS, fields=None, workdir=None):
        fields = {"cohort_size": len(rows), "compilation_cache": "off"} | (fields or {})
        path = tmp_path / "tiny.json"
        path.write_text(to_json(tiny(rows, fields)))
        workdir = workdir or tmp_path / "run"
        before = contents(workdir)
        status = cli.main(["train", f"--config={path}", f"--workdir={workdir}", *arguments])
        error = capsys.readouterr().err
        assert re.fullmatch(f"tap-jax: .*{message}.*\n", error), error
        assert status == 2
        assert contents(workdir) == before

    return check


def contents(folder):
    """None where nothing is there, else every path's bytes, but for the empty file that keeps others out."""
    if not folder.exists():
        return None
    paths = [path for path in (folder, *folder.rglob("*")) if path.name != ".lock"]
    return {path: path.read_bytes() if path.is_file() else b"" for path in paths}


def write(folder, task, columns, splits=("train", "test")):
    """A parquet folder as the hub's."""
    (folder / task).mkdir(parents=True)
    for split in splits:
        pyarrow.parquet.write_table(pyarrow.table(columns), folder / task / f"{split}.parquet")
    return f"--config.data.root={folder}"


def picture(color):
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), color).save(stream, "PNG")
    return {"bytes": stream.getvalue(), "path": None}


def test_a_device_for_bertscore_that_is_not_there(refused):
    refused(
        r"metrics\.device: PyTorch has no device 'cuda:77' .*use 'auto' or 'cpu'",
        "--config.metrics.device=cuda:77",
        rows=({"common_gen": 0.5}, {"common_gen": 0.5}),
    )


def test_unknown_config_key(refused):
    refused("rouns: unknown field; did you mean 'rounds'", "--config.rouns=3")
    refused("model.widht: unknown field; did you mean 'model.width'", "--config.model.widht=3")


def test_unknown_task_and_method(refused):
    refused("unknown task 'agnews'; known tasks: .*ag_news", "--config.federation.rows=({'agnews': 1.0},)")
    refused("method: unknown 'fedprox'; use one of tap", "--config.method=fedprox")
    refused("variants: 'tap' does not come out of method 'local'", "--config.method=local", "--config.variants=tap")


def test_missing_data(refused, tmp_path):
    refused(
        "data.root: there is no folder .*nowhere; name one with .* or use", f"--config.data.root={tmp_path}/nowhere"
    )
    root = write(tmp_path / "data", "ag_news", {"text": ["a", "b"], "label": [0, 1]}, splits=("train",))
    refused("data.root: .*ag_news has nothing to test on .it has train.; name files or a folder there 'test'", root)


def test_parquet_without_a_needed_column(refused, tmp_path):
    root = write(tmp_path / "data", "ag_news", {"text": ["a", "b"], "category": [0, 1]})
    refused(r"data.root: .*train.parquet has no column 'label' \(it has text, category\); rename or add it", root)


def test_damaged_parquet(refused, tmp_path):
    root = write(tmp_path / "data", "ag_news", {"text": ["a", "b"], "label": [0, 1]})
    (tmp_path / "data" / "ag_news" / "train.parquet").write_bytes(b"PAR1 and no more")
    refused("data.root: .*train.parquet is not readable as parquet", root)


def test_labels_that_the_task_does_not_have(refused, tmp_path):
    root = write(tmp_path / "data", "ag_news", {"text": ["a", "b"], "label": [0, 4]})
    refused("label", root)


def test_unreadable_image(refused, tmp_path):
    images = [picture("red"), {"bytes": b"no picture", "path": None}]
    root = write(tmp_path / "data", "cifar100", {"img": images, "fine_label": [0, 1]})
    refused("cifar100/train row 1, column 'img': unreadable image .*; mend or remove", root, rows=PICTURES)


def test_a_client_without_samples(refused):
    refused(
        r"federation.clients: client0 is left with no sample of ag_news \(1 for 2 clients\); give it more data",
        "--config.data.train_size=1",
    )


def test_cohort_larger_than_the_federation(refused):
    refused("cohort_size: 3 of 2 clients; use at most 2", "--config.cohort_size=3")


def test_more_devices_than_there_are(refused):
    refused("mesh.clients: 99 of 8 devices; use at most 8", "--config.mesh.clients=99")


def test_workdir_of_another_configuration(refused, tiny, tmp_path):
    folder = tmp_path / "other"
    folder.mkdir()
    (folder / "config.json").write_text(to_json(tiny(NEWS, {"seed": 42})))
    (folder / "metrics.jsonl").write_text("{}\n")
    message = "workdir: .*other holds a run of another configuration [(]{}[)]; name another folder or remove it"
    refused(message.format("seed: 42, now 41"), workdir=folder)
    refused(message.format("rounds: 3, now 4; seed: 42, now 41"), "--config.rounds=4", workdir=folder)
    many = ["--config.rounds=4", "--config.post_steps=9", "--config.local_steps=9"]
    listed = "local_steps: .*, now 9; post_steps: .*, now 9; rounds: 3, now 4; and 1 more"
    refused(message.format(listed), *many, workdir=folder)


@pytest.mark.parametrize(
    ("left", "reason"),
    [(b'{"rounds": ', "Expecting value: .*"), (b"\xff\xfe", "'utf-8' .*"), (b"[]", "no JSON object")],
)
def test_workdir_with_a_damaged_configuration(refused, tmp_path, left, reason):
    folder = tmp_path / "damaged"
    folder.mkdir()
    (folder / "config.json").write_bytes(left)
    message = f"workdir: .*damaged/config.json is damaged [(]{reason}[)]; remove it and call train again as before, or"
    refused(message, workdir=folder)


def test_workdir_of_a_run_with_fields_that_are_unknown_here(refused, tmp_path):
    folder = tmp_path / "newer"
    folder.mkdir()
    (folder / "config.json").write_text('{"rouns": 3}')
    refused("rouns: unknown field", workdir=folder)


def test_checkpoints_of_another_configuration(refused, tiny, tmp_path):
    fields = {"method": "fedavg", "compilation_cache": "off"}
    other = config_hash(tiny(NEWS, fields | {"seed": 42}))
    with Checkpoints(tmp_path / "run" / "checkpoints") as checkpoints:
        checkpoints.save(1, build(tiny(NEWS, fields)).init(), {"config": other})
    refused(
        "checkpoints in .*: none of 1 can be used [(]checkpoint 1 passed over: it is of other settings or data[)]; .*"
        "choose another workdir",
        fields=fields,
    )


def test_workdir_that_cannot_be_made(refused, tmp_path):
    (tmp_path / "file").write_text("")
    refused("workdir: .*file is a file; name a folder", workdir=tmp_path / "file")
    refused("workdir: .*file is a file; name a folder", workdir=tmp_path / "file" / "below")


def test_workdir_in_which_somebody_is_at_work(refused, tmp_path):
    (tmp_path / "run").mkdir()
    with (tmp_path / "run" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused("workdir: another process is at work in .*run; wait for it, or name another folder")


def test_workdir_without_permission(refused, tmp_path, monkeypatch):
    def mkdir(*_):  # the tests may run as root, who may write everywhere
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    (tmp_path / "locked").mkdir()
    monkeypatch.setattr(tempfile._os, "mkdir", mkdir)
    message = "workdir: cannot write in .*locked [(]Permission denied[)]; name another folder"
    refused(message, workdir=tmp_path / "locked" / "run")


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs Linux's /proc")
def test_a_folder_that_nobody_can_make(refused, tmp_path, capsys):
    refused("workdir: cannot write in /proc [(].*[)]; name another folder", workdir=pathlib.Path("/proc/x/run"))
    for command in (["report", str(tmp_path)], ["export", f"--workdir={tmp_path}"]):
        assert cli.main([*command, "--out=/proc/x"]) == 2
        assert re.fullmatch("tap-jax: out: cannot write in /proc .*; name another folder\n", capsys.readouterr().err)


def test_workdir_on_a_read_only_disk(refused, small_disk):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for workdir in (small_disk, small_disk / "run"):
        refused("workdir: cannot write in .*small_disk [(]Read-only .*[)]; name another folder", workdir=workdir)


def test_a_disk_that_fills_up_during_a_run(tiny, small_disk, tmp_path, monkeypatch, capsys):
    path, workdir, filler = tmp_path / "tiny.json", small_disk / "run", small_disk / "filler"
    fields = {"method": "fedavg", "rounds": 4, "compilation_cache": "off"}
    path.write_text(to_json(tiny(NEWS, fields)))
    command = ["train", f"--config={path}", f"--workdir={workdir}"]
    progress = terminal.Terminal.progress

    def fill_up(screen, line):
        progress(screen, line)
        if line["round"] == 2:  # checkpoint 1 is whole by now, and 2 perhaps
            disk = os.statvfs(small_disk)
            filler.write_bytes(b"x" * ((disk.f_bavail - 2) * disk.f_frsize))  # two pages stay free

    monkeypatch.setattr(terminal.Terminal, "progress", fill_up)
    assert cli.main(command) == 2
    error = capsys.readouterr().err
    assert re.fullmatch("tap-jax: .*No space left on device.*free some space.*\n", error), error
    assert not (workdir / "results.json").exists()
    saved = Checkpoints(workdir / "checkpoints").steps()
    assert saved and saved[0] in (1, 2)
    assert set(os.listdir(workdir / "checkpoints")) == set(map(str, saved))

    filler.unlink()
    monkeypatch.setattr(terminal.Terminal, "progress", progress)
    assert cli.main(command) == 0
    streams = capsys.readouterr()
    assert f"resuming after round {saved[-1]} of 4" in streams.out
    assert (workdir / "results.json").exists()


def test_sizes_that_do_not_fit_the_model(refused):
    refused("model.max_text: 600, but FLAVA's text encoder has 512 positions", "--config.model.max_text=600")
    refused("model.patch: 7 does not divide model.image_size 16", "--config.model.patch=7")
    refused("model.upsample: 0.3 makes 19.2 pixels of 64", "--config.model.upsample=0.3")
    refused("model.heads: 3 does not divide model.width 8", "--config.model.heads=3")
    refused("model.vocab: 20 is too small for [0-9]+ characters; raise it", "--config.model.vocab=20")


def test_a_tokenizer_of_another_size(refused, tmp_path):
    pieces = load_tokenizer("train", ["some words to learn from"], vocab_size=60)
    pieces.save(tmp_path / "pieces")
    refused(
        f"model.vocab: 120, but the tokenizer '.*pieces' has {pieces.size} pieces; set it to that",
        f"--config.data.tokenizer={tmp_path}/pieces",
    )
    refused("data.tokenizer: cannot load '.*nothing'", f"--config.data.tokenizer={tmp_path}/nothing")


def test_other_commands_say_it_the_same_way(tiny, tmp_path, capsys):
    path = tmp_path / "tiny.json"
    path.write_text(to_json(tiny(NEWS)))
    for command in ("describe", "bench"):
        assert cli.main([command, f"--config={path}", "--config.cohort_size=3"]) == 2
        assert re.fullmatch("tap-jax: cohort_size: 3 of 2 clients; .*\n", capsys.readouterr().err)
    assert cli.main(["bench", f"--config={path}", f"--config.data.root={tmp_path}/nowhere"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("tap-jax: data.root: there is no folder")
