"""Exported folders: what is in them, what is refused, and that nothing is lost on the way back."""

import dataclasses
import json
import re
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tap_jax.data.text import load_tokenizer
from tap_jax.errors import UserError
from tap_jax.export import folder as folders
from tap_jax.export import naming, torch_model
from tap_jax.export.folder import check, write_torch
from tap_jax.export.staging import staged
from tap_jax.export.start import read_torch
from tap_jax.models.server_model import ServerModel
from tap_jax.tasks import find_task
from tests.export.conftest import CONFIGS, TASKS

DELTA = "blocks.mome/image_classification/attention.0.value.delta"


@pytest.fixture
def made(exported):
    return exported("flava")


@pytest.fixture
def copied(made, tmp_path):
    """A copy of the folder whose tensors a function may change: `copied(change)`."""

    def change(function):
        shutil.copytree(made.folder, tmp_path / "copy", dirs_exist_ok=True)
        tensors = load_file(made.folder / "model.safetensors")
        function(tensors)
        save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, tmp_path / "copy" / "model.safetensors")
        return tmp_path / "copy"

    return change


@pytest.fixture
def quick(made, monkeypatch):
    """JAX's side is compiled already."""
    monkeypatch.setattr(folders, "jax_outputs", made.outputs)


def test_what_an_export_holds(made):
    names = {path.name for path in made.folder.iterdir()}
    assert names == {
        "README.md", "config.json", "model.safetensors", "tap_export.json", "tokenizer", "torch_model.py"
    }  # fmt: skip
    report = json.loads((made.folder / "tap_export.json").read_text())
    assert report["client"] == "client3" and report["max_difference"] == made.difference < 1e-4
    assert set(report["differences"]) == {stream.name for stream in made.model.streams}
    readme = (made.folder / "README.md").read_text()
    assert 'model.generate("mmlu", domain="law", tokens=tokens)' in readme
    assert "- client: client3" in readme
    assert not list(made.folder.parent.glob("*.partial")) and not list(made.folder.parent.glob(".*"))


@pytest.mark.parametrize("name", CONFIGS)
def test_there_and_back_every_bit_is_the_same(exported, tokenizer, name):
    made = exported(name)
    start = read_torch(made.folder, made.model, tokenizer=tokenizer)
    assert start.notes == ()
    jax.tree.map(np.testing.assert_array_equal, start.blocks, made.blocks)
    jax.tree.map(np.testing.assert_array_equal, start.frozen, made.frozen)
    assert jax.tree.structure((start.frozen, start.blocks)) == jax.tree.structure((made.frozen, made.blocks))


def test_only_what_the_tasks_need_is_written(made, tokenizer, tmp_path):
    model = ServerModel(made.model.config, [find_task("fashion_mnist")])
    write_torch(model, made.frozen, made.blocks, tmp_path / "out", tokenizer=tokenizer)
    keys = load_file(tmp_path / "out" / "model.safetensors")
    assert {key.split(".")[1] for key in keys if key.startswith("blocks.")} == set(model.block_names)
    assert {key.split(".")[1] for key in keys if key.startswith("frozen.")} == {"backbone", "encoder/image"}
    assert not (tmp_path / "out" / "tokenizer").exists()


@pytest.mark.parametrize(
    ("key", "change"),
    [
        (DELTA, lambda x: x.T),
        (DELTA.replace("delta", "lora_B"), lambda x: x / 2),  # alpha / rank counted twice, or not at all
        (DELTA.replace("delta", "lora_A"), lambda x: x[::-1]),
        ("blocks.mote/image/expert/shared.0.fc2.lora_B", lambda x: 2 * x),
        ("blocks.mote/shared/domain/fine_grained.0.query.fc1.lora_B", lambda x: 2 * x),
        ("blocks.encoder/image.layers.0.query.lora_A", lambda x: 2 * x),
        ("frozen.backbone.1.query.weight", lambda x: x.T),
    ],
    ids=["transposed", "unscaled", "reversed", "expert", "domain", "encoder", "frozen"],
)
def test_a_weight_written_wrongly_is_noticed(made, copied, quick, key, change):
    folder = copied(lambda tensors: tensors.update({key: change(tensors[key])}))
    with pytest.raises(UserError, match=r"export: cifar100 differs from the JAX model by .*nothing was written"):
        check(folder, made.model, made.frozen, made.blocks)


def test_a_transposed_adapter_does_not_even_load(made, copied):
    key = "blocks.mote/image/expert/shared.0.fc2.lora_B"
    folder = copied(lambda tensors: tensors.update({key: tensors[key].T}))
    with pytest.raises(UserError, match=f"cannot be loaded: .*size mismatch for {key}"):
        check(folder, made.model, made.frozen, made.blocks)


def test_a_wrong_export_leaves_nothing_behind(made, quick, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(naming, "TABLE", (*(row for row in naming.TABLE if "delta" not in row[0]),))
    with pytest.raises(UserError, match="differs from the JAX model"):
        write_torch(made.model, made.frozen, made.blocks, tmp_path / "new" / "out", tokenizer=tokenizer)
    assert list(tmp_path.iterdir()) == []


def test_a_diverged_model_is_no_export(made, quick, tokenizer, tmp_path):
    sick = {**made.blocks, "shared_proj": jax.tree.map(lambda x: np.full_like(x, np.nan), made.blocks["shared_proj"])}
    with pytest.raises(UserError, match="the outputs for cifar100 are no numbers, .* diverged; .*learning_rate"):
        write_torch(made.model, made.frozen, sick, tmp_path / "out", tokenizer=tokenizer)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_use_is_left_alone(made, tokenizer, tmp_path):
    (tmp_path / "mine").write_text("")
    with pytest.raises(UserError, match="out: .* is not empty; name another folder or remove it"):
        write_torch(made.model, made.frozen, made.blocks, tmp_path, tokenizer=tokenizer)
    with pytest.raises(UserError, match="out: .*mine is no folder"), staged(tmp_path / "mine" / "below"):
        pass
    (tmp_path / "empty").mkdir()
    with staged(tmp_path / "empty") as folder:
        (folder / "file").write_text("new")
    assert (tmp_path / "empty" / "file").read_text() == "new"
    assert {path.name for path in tmp_path.iterdir()} == {"mine", "empty"}


# --- the start of a run --------------------------------------------------------------------------------------------


def test_what_only_one_of_the_two_has_is_said(made, tokenizer):
    model = ServerModel(made.model.config, [find_task("ag_news"), find_task("common_gen")])
    start = read_torch(made.folder, model, tokenizer=tokenizer)
    shared = set(model.block_names) & set(made.model.block_names)
    assert set(start.blocks) == shared and set(start.frozen) == {"backbone", "encoder/text"}
    jax.tree.map(np.testing.assert_array_equal, start.blocks, {name: made.blocks[name] for name in shared})
    new, unused = start.notes
    assert re.fullmatch("model.start_from: not in the export, as initialised: mome/shared/domain/common_sense, .*", new)
    assert "head/" not in new and "mote/text/domain/common_sense" in new
    assert re.match(
        "model.start_from: of the export, unused: encoder/image, frozen encoder/image, head/cifar100,", unused
    )
    assert set(unused.split(": ")[2].replace("frozen encoder/image, ", "").split(", ")) == (
        set(made.model.block_names) - shared
    )


def test_an_export_that_does_not_say_its_backbone_is_routed_with_lora(made, copied, tokenizer):
    folder = copied(lambda tensors: None)
    config = json.loads((folder / "config.json").read_text())
    for field in ("backbone", "bottleneck"):
        del config["model"][field]
    (folder / "config.json").write_text(json.dumps(config))
    assert set(read_torch(folder, made.model, tokenizer=tokenizer).blocks) == set(made.blocks)
    assert set(torch_model.load(folder).blocks) == set(made.blocks)


def test_bad_starts_are_one_clear_line(made, exported, copied, tokenizer, tmp_path):
    def refused(message, folder, model=made.model, pieces=tokenizer):
        with pytest.raises(UserError, match=f"^model.start_from: .*{message}") as error:
            read_torch(folder, model, tokenizer=pieces)
        assert "\n" not in str(error.value)

    def model(tasks=TASKS, **sizes):
        return ServerModel(dataclasses.replace(made.model.config, **sizes), tasks)

    refused("cannot read .*nothing", tmp_path / "nothing")
    unrelated = [dataclasses.replace(TASKS[0], name="new", head="new", domains=("new",))]
    read_torch(made.folder, model(unrelated))  # the backbone's shared blocks
    refused("the export has model.name = flava, the run vilt", made.folder, exported("vilt").model)
    refused(
        "the export has model.lora_alpha_ratio = 2.0, the run 1.0; make them equal",
        made.folder,
        model(lora_alpha_ratio=1.0),
    )
    refused("model.backbone_layers = .1, 1., the run .1, 2.", made.folder, model(backbone_layers=(1, 2)))
    refused("model.backbone = routed, the run standard", made.folder, model(backbone="standard"))
    refused("model.bottleneck = 0, the run 6", made.folder, model(bottleneck=6))
    refused(r"position is \[6, 12\], not \[8, 12\]", made.folder, model(max_answer=8))
    other = load_tokenizer("train", ["abcdefgh ijkl mo"], vocab_size=40)
    refused("word pieces differ from the export's; set data.tokenizer=", made.folder, pieces=other)
    fewer = [dataclasses.replace(TASKS[0], classes=10)]
    refused(r"output.bias is \[100\], not \[10\]", made.folder, model(fewer))
    refused(f"{DELTA} is missing; name an export of the run's sizes", copied(lambda tensors: tensors.pop(DELTA)))
    refused(
        f"{DELTA}.more is unknown", copied(lambda tensors: tensors.update({f"{DELTA}.more": np.zeros(1, np.float32)}))
    )
    refused(f"{DELTA} is float16", copied(lambda tensors: tensors.update({DELTA: tensors[DELTA].astype(np.float16)})))

    folder = copied(lambda tensors: None)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    refused("cannot read .*copy", folder)
    (folder / "config.json").write_text('{"model_type": "flava"}')
    (folder / "model.safetensors").write_bytes(whole)
    refused("is no export of --format=torch", folder)
    (folder / "config.json").write_text("{")
    refused("cannot read .*copy", folder)
