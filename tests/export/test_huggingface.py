"""Encoders with LoRA merged as Hugging Face folders; a wrongly merged one is never written."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from tap_jax.errors import UserError
from tap_jax.export import hf_model, huggingface
from tap_jax.export.huggingface import write_huggingface
from tap_jax.models import checkpoints
from tap_jax.models.server_model import ServerModel
from tests.export.conftest import CONFIGS, TASKS
from tests.export.encoders import CLASSES, make_client, refused, run_readme, same_encoders
from tests.models import reference


@pytest.fixture(scope="module", params=["flava", "vilt"])
def client(request, tmp_path_factory):
    return make_client(request.param, tmp_path_factory.mktemp("checkpoint"))


@pytest.mark.parametrize("with_source", [True, False])
def test_merged_folder(client, tmp_path, with_source):
    model, frozen, blocks, source = client
    out = tmp_path / "export"
    difference = write_huggingface(
        model, frozen, blocks, out, source=source if with_source else None, origin={"client": "client3"}
    )
    assert 0 < difference < 1e-5
    report = json.loads((out / "tap_export.json").read_text())
    assert (report["format"], report["client"], report["max_difference"]) == ("huggingface", "client3", difference)
    assert sorted(report["differences"]) == ["image", "text"]
    theirs, info = CLASSES[model.config.name].from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    same_encoders(model, frozen, blocks, theirs)

    # The backbone's layers are the frozen ones, bit for bit; the encoders' are not.
    back = checkpoints.load(str(out), model)
    jax.tree.map(np.testing.assert_array_equal, back.frozen["backbone"], frozen["backbone"])
    assert any(
        not np.array_equal(a, b)
        for a, b in zip(
            jax.tree.leaves(back.frozen["encoder/image"]), jax.tree.leaves(frozen["encoder/image"]), strict=True
        )
    )
    if model.config.name == "vilt":
        np.testing.assert_array_equal(back.blocks["encoder/image"]["positions"], blocks["encoder/image"]["positions"])

    # What we do not store.
    written, original = load_file(out / "model.safetensors"), load_file(f"{source}/model.safetensors")
    pooler = "image_model.pooler.dense.weight" if model.config.name == "flava" else "pooler.dense.weight"
    readme = (out / "README.md").read_text()
    if with_source:
        assert not report["initialised"] and set(written) == set(original)
        np.testing.assert_array_equal(written[pooler], original[pooler])
    else:
        assert pooler in report["initialised"] and f"- `{pooler}`" in readme
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_the_readme_s_code_runs(client, tmp_path, monkeypatch):
    model, frozen, blocks, source = client
    write_huggingface(model, frozen, blocks, tmp_path / "export", source=source)
    same_encoders(model, frozen, blocks, run_readme(tmp_path / "export", monkeypatch))


@pytest.mark.parametrize("wrong", ["unscaled", "transposed", "unmerged"])
def test_wrongly_merged_weights_fail(client, tmp_path, monkeypatch, wrong):
    model, frozen, blocks, source = client
    right = hf_model.merge

    def merge(config, frozen, blocks):
        merged = right(config, frozen, blocks)

        def spoil(good, plain):
            if isinstance(good, dict):
                return {name: spoil(good[name], plain[name]) for name in good}
            update = good - plain
            if wrong == "unscaled":
                return plain + update / np.float32(config.lora_alpha_ratio)
            if wrong == "transposed" and update.ndim > 1 and update.any():
                square = update.shape[-1] == update.shape[-2]
                return plain + (update.swapaxes(-1, -2) if square else update[::-1])
            return plain

        return {name: spoil(merged[name], frozen[name]) for name in merged}

    monkeypatch.setattr(hf_model, "merge", merge)
    refused(tmp_path, write_huggingface, model, frozen, blocks, source=source)


def test_damage_on_the_way_to_disk_fails(client, tmp_path, monkeypatch):
    """What is compared is what a reader will get, not what was in memory."""
    model, frozen, blocks, source = client
    save = huggingface.safetensors.torch.save_file

    def worse(tensors, *args):
        key = next(key for key in tensors if "projection.weight" in key and tensors[key].ndim == 4)
        return save({**tensors, key: tensors[key] * 1.01}, *args)

    monkeypatch.setattr(huggingface.safetensors.torch, "save_file", worse)
    refused(tmp_path, write_huggingface, model, frozen, blocks, source=source)


def test_source_must_be_where_the_run_started(client, tmp_path):
    model, frozen, blocks, source = client
    other = {**frozen, "backbone": jax.tree.map(lambda leaf: leaf + 1, frozen["backbone"])}
    refused(tmp_path, write_huggingface, model, other, blocks, source=source, message="is not what the run has; name")
    message = "model.weights: no folder"
    refused(tmp_path, write_huggingface, model, frozen, blocks, source=f"{tmp_path}/no", message=message)


def test_folder_in_use(client, tmp_path):
    model, frozen, blocks, source = client
    (tmp_path / "mine").write_text("")
    with pytest.raises(UserError, match="is not empty"):
        write_huggingface(model, frozen, blocks, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_tasks_of_one_modality(client, tmp_path):
    """The blocks of one modality are enough."""
    model, frozen, blocks, source = client
    text = ServerModel(model.config, [task for task in TASKS if task.name == "ag_news"])
    mine = {name: blocks[name] for name in text.block_names}
    assert write_huggingface(text, frozen, mine, tmp_path / "export", source=source) < 1e-5


def test_sliced_positions(tmp_path):
    """ViltModel interpolates; a table of the grid in use is left alone by that."""
    model = ServerModel(CONFIGS["vilt, other choices"], TASKS)
    frozen, blocks = reference.random_weights(jax.eval_shape(model.init, jax.random.key(0)), np.random.default_rng(3))
    assert write_huggingface(model, frozen, blocks, tmp_path / "export") < 1e-5
