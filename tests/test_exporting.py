"""`tap-jax export` of a run, what it refuses, and a run that starts from an export."""

import json
import re
import shutil

import jax
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from tap_jax import experiment as experiments
from tap_jax.cli import main as cli
from tap_jax.config import to_json
from tap_jax.errors import UserError
from tap_jax.export import torch_model
from tap_jax.export.naming import to_torch
from tap_jax.runs import runner as runs
from tap_jax.runs.exporting import export_client

ROWS = ({"ag_news": 0.5, "cifar100": 1.0}, {"ag_news": 0.5})
FIELDS = {"method": "fedavg", "variants": ("fedavg", "fedavg+post"), "rounds": 2, "compilation_cache": "off"}


@pytest.fixture(autouse=True)
def devices_are_chosen(monkeypatch):
    """The tests' own CPU devices stay."""
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "8")


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    """A finished run's folder; client 0 has pictures and texts."""
    folder, nothing = tmp_path_factory.mktemp("run"), lambda _: None
    runs.run(tiny(ROWS, FIELDS), folder / "run", runs.Reporter(nothing, nothing))
    return folder / "run"


@pytest.fixture(scope="module")
def experiment(tiny):
    return experiments.build(tiny(ROWS, FIELDS))


@pytest.fixture
def export(run, tmp_path, capsys):
    """`export(*argv, out=...)` -> (status, stdout, stderr, folder)."""

    def call(*argv, out="out", workdir=run):
        status = cli.main(["export", f"--workdir={workdir}", f"--out={tmp_path / out}", *argv])
        streams = capsys.readouterr()
        return status, streams.out, streams.err, tmp_path / out

    return call


def written(folder):
    return {k: v for k, v in load_file(folder / "model.safetensors").items() if k.startswith("blocks.")}


def assert_equal(tensors, blocks):
    expected = to_torch({}, blocks)
    assert set(tensors) == set(expected)
    for key, value in expected.items():
        np.testing.assert_array_equal(tensors[key], value)


def test_a_clients_personal_model(export, run, experiment):
    status, out, err, folder = export("--client=0", "--variant=fedavg+post")
    assert (status, err) == (0, "")
    assert re.search(r"outputs differ from the JAX model's by at most \d\.?\d*e-0[5-9] of the largest\n", out)
    assert f"in {folder}: README.md, config.json, model.safetensors, tap_export.json, tokenizer, torch_model.py" in out
    report = json.loads((folder / "tap_export.json").read_text())
    assert report.pop("max_difference") == max(report.pop("differences").values()) < 1e-4
    assert report == {
        "format": "torch", "model": "personal", "client": "client0", "variant": "fedavg+post", "round": 2,
        "tasks": ["cifar100", "ag_news"], "seed": 41,
    }  # fmt: skip
    assert_equal(written(folder), runs.stored_model(experiment, run, "fedavg+post", 0))
    model = torch_model.load(folder)
    images = torch_model.standardise(torch.from_numpy(experiment.data.test["cifar100"].images))
    assert model("cifar100", images=images).shape == (6, 4)
    assert (folder / "tokenizer" / "vocab.txt").read_text() == (run / "tokenizer" / "vocab.txt").read_text()


def test_federated_and_server_models(export, experiment, run):
    status, _, err, folder = export("--client=1", "--model=federated", out="federated")
    assert (status, err) == (0, "")
    one = written(folder)
    assert {key.split(".")[1] for key in one} == set(experiment.partition.blocks_of(1))
    assert set(torch_model.load(folder).config["tasks"]) == {"ag_news"}
    # The variant without a phase of its own is the same model.
    assert export("--client=1", "--variant=fedavg", out="fedavg")[0] == 0
    whole = json.loads(json.dumps(export("--model=server", out="server")[:1]))
    assert whole == [0]
    server = written(folder.parent / "server")
    assert {key.split(".")[1] for key in server} == set(experiment.partition.names)
    for name in ("fedavg", "server"):
        other = written(folder.parent / name)
        assert all(np.array_equal(other[key], value) for key, value in one.items())
    assert json.loads((folder.parent / "server" / "tap_export.json").read_text())["client"] is None
    personal = runs.stored_model(experiment, run, "fedavg+post", 1)
    assert any(not np.array_equal(one[key], value) for key, value in to_torch({}, personal).items())


@pytest.mark.parametrize(
    ("format", "file"), [("peft", "adapter_model.safetensors"), ("huggingface", "model.safetensors")]
)
def test_the_encoders_for_others(export, format, file):
    status, out, err, folder = export("--client=0", "--variant=fedavg+post", f"--format={format}")
    assert (status, err) == (0, "")
    assert (folder / file).is_file() and file in out
    report = json.loads((folder / "tap_export.json").read_text())
    assert (report["format"], report["client"], report["variant"]) == (format, "client0", "fedavg+post")
    assert report["max_difference"] < 1e-4


def test_fewer_tasks_from_python(run, tmp_path):
    difference = export_client(run, tmp_path / "out", client=0, model="federated", tasks=["cifar100"])
    assert 0 < difference < 1e-4
    assert set(torch_model.load(tmp_path / "out").config["tasks"]) == {"cifar100"}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--client=2"], "client: no client .2.; the run has numbers 0 to 1"),
        (["--client=one"], "client: no client .one.; the run has numbers 0 to 1"),
        (["--client=-1"], "client: no client .-1.; the run has numbers"),
        ([], "client: missing; a personal model is some client's, name one of 0 to 1"),
        (["--client=1", "--tasks=ag_news,cifar100"], "tasks: client 1 does not have 'cifar100'; it has ag_news"),
        (["--model=server", "--tasks=vqa"], "tasks: the federation does not have 'vqa'; it has cifar100, ag_news"),
        (["--client=0", "--variant=tap"], "variant: unknown 'tap'; use one of fedavg, fedavg.post"),
        (["--client=0", "--model=federated", "--variant=fedavg"], "variant: a federated model is of no variant"),
        (["--client=0", "--format=onnx"], "format: unknown 'onnx'; use one of torch, peft, huggingface"),
        (["--client=0", "--model=best"], "model: unknown 'best'; use one of personal, federated, server"),
    ],
)
def test_what_there_is_not_is_named(export, argv, message):
    status, out, err, folder = export(*argv)
    assert (status, out) == (2, "")
    assert re.fullmatch(f"tap-jax: {message}.*\n", err)
    assert not folder.exists()


def test_runs_that_cannot_be_exported_and_folders_in_use(export, run, tmp_path):
    def refused(message, **places):
        before = sorted(tmp_path.rglob("*"))
        status, out, err, _ = export("--client=0", **places)
        assert (status, out) == (2, "")
        assert re.fullmatch(f"tap-jax: {message}.*\n", err), err
        assert sorted(tmp_path.rglob("*")) == before

    refused("workdir: .*none holds no run", workdir=tmp_path / "none")
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "results.json").unlink()
    refused("workdir: the run in .* has not finished", workdir=tmp_path / "run")
    refused("out: .*run is not empty; name another folder or remove it", out="run")
    (tmp_path / "file").write_text("")
    refused("out: .*file is a file; name a folder", out="file")
    shutil.copy(run / "results.json", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "models")
    status, _, err, folder = export("--client=0", "--variant=fedavg+post", workdir=tmp_path / "run")
    assert status == 2 and re.fullmatch("tap-jax: workdir: .*client_0000.safetensors is missing; train again\n", err)
    assert not folder.exists()


def test_a_local_run_has_no_server_model(export, run, tmp_path):
    """Its server's blocks were never trained."""
    shutil.copytree(run, tmp_path / "run")
    config = json.loads((run / "config.json").read_text()) | {"method": "local", "variants": []}
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    status, _, err, folder = export("--model=server", workdir=tmp_path / "run")
    assert status == 2 and re.match("tap-jax: model: a run of method=local trains no server model", err), err
    assert not folder.exists()


def test_a_diverged_model_is_refused_in_every_format(export, run, tmp_path):
    """Even where only blocks behind the encoders are broken."""
    shutil.copytree(run, tmp_path / "run")
    path = tmp_path / "run" / "models" / "fedavg+post" / "client_0000.safetensors"
    with safe_open(path, "numpy") as file:
        tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()
    tensors = {key: np.full_like(x, np.nan) if key.startswith("mote/shared/") else x for key, x in tensors.items()}
    save_file(tensors, path, metadata)
    for format in ("torch", "peft", "huggingface"):
        status, _, err, folder = export(
            "--client=0", "--variant=fedavg+post", f"--format={format}", workdir=tmp_path / "run"
        )
        assert status == 2 and re.search("block 'mote/shared/.*' holds .* no numbers, .* another variant", err), err
        assert not folder.exists()


def test_a_new_run_starts_from_an_export(export, experiment, tiny, tmp_path, capsys):
    folder = export("--client=0", "--model=federated")[3]
    rows = ({"ag_news": 0.5}, {"ag_news": 0.5, "fashion_mnist": 1.0})
    fields = FIELDS | {"model.start_from": str(folder), "seed": 7}
    config = tiny(rows, fields | {"data.tokenizer": f"{folder}/tokenizer"})
    with config.unlocked():
        config.model.vocab = json.loads((folder / "config.json").read_text())["model"]["vocab"]
    started = experiments.build(config)
    mine = {name: block for name, block in started.initial_blocks.items() if name in experiment.partition.blocks_of(0)}
    assert len(mine) > 10
    assert_equal({k: v for k, v in written(folder).items() if k.split(".")[1] in mine}, mine)
    jax.tree.map(
        np.testing.assert_array_equal, jax.device_get(started.engine.frozen), jax.device_get(experiment.engine.frozen)
    )
    new, unused = (note for note in started.notes if "export" in note)
    assert "not in the export, as initialised: head/image_generation, mome/image_generation/attention" in new
    assert "of the export, unused: head/cifar100, mome/image_classification/attention" in unused

    other = tiny(rows, fields)  # trains word pieces of its own, on texts drawn with another seed
    with pytest.raises(UserError, match="model.start_from: .*set data.tokenizer="):
        experiments.build(other)
    (tmp_path / "tiny.json").write_text(to_json(tiny(ROWS, FIELDS | {"model.start_from": f"{folder}/nothing"})))
    assert cli.main(["train", f"--config={tmp_path}/tiny.json", f"--workdir={tmp_path}/new"]) == 2
    assert re.search("tap-jax: model.start_from: cannot read .*nothing", capsys.readouterr().err)
    assert not (tmp_path / "new").exists()
