"""Encoders' LoRA as PEFT adapters; a transposed, unscaled or forgotten one is never written."""

import json
import sys

import jax
import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import load_file

from tap_jax.errors import UserError
from tap_jax.export import naming
from tap_jax.export import peft as adapters
from tap_jax.export.huggingface import write_huggingface
from tap_jax.export.peft import write_peft
from tap_jax.models.server_model import ServerModel
from tests.export.conftest import CONFIGS, TASKS
from tests.export.encoders import CLASSES, make_client, refused, run_readme, same_encoders
from tests.models import reference


@pytest.fixture(scope="module", params=["flava", "vilt"])
def client(request, tmp_path_factory):
    return make_client(request.param, tmp_path_factory.mktemp("checkpoint"))


@pytest.mark.parametrize("with_source", [True, False])
def test_peft_folder(client, tmp_path, with_source):
    model, frozen, blocks, source = client
    out = tmp_path / "export"
    difference = write_peft(model, frozen, blocks, out, source=source if with_source else None, origin={"client": "c"})
    assert 0 < difference < 1e-5
    report = json.loads((out / "tap_export.json").read_text())
    assert (report["format"], report["client"], report["max_difference"]) == ("peft", "c", difference)

    base = CLASSES[model.config.name].from_pretrained(source)
    vilt = model.config.name == "vilt"
    assert (out / "embeddings.safetensors").exists() == vilt
    if vilt:
        tensors = {key: torch.tensor(value) for key, value in load_file(out / "embeddings.safetensors").items()}
        assert not base.load_state_dict(tensors, strict=False).unexpected_keys
    adapted = peft.PeftModel.from_pretrained(base, out)
    same_encoders(model, frozen, blocks, adapted.base_model.model)
    same_encoders(model, frozen, blocks, adapted.merge_and_unload())
    modules = {key.split(".lora_")[0] for key in load_file(out / "adapter_model.safetensors")}
    assert len(modules) == (1 if vilt else 2 * (model.config.image_layers + model.config.text_layers))
    assert ("random stand-ins" in " ".join((out / "README.md").read_text().split())) is not with_source
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == (source if with_source else None)
    assert (config["r"], config["lora_alpha"]) == (model.config.encoder_rank, 2 * model.config.encoder_rank)

    # Nothing of the client is lost: adapters, embeddings and the rest are all its trained numbers, each once.
    files = [load_file(path) for path in out.glob("*.safetensors")]
    total = sum(value.size for file in files for value in file.values())
    assert total == sum(leaf.size for leaf in jax.tree.leaves(blocks))
    rest = load_file(out / "tap_blocks.safetensors")
    whole = naming.to_torch({}, blocks)
    for key, value in rest.items():
        np.testing.assert_array_equal(value, whole[key])


def test_the_readme_s_code_runs(client, tmp_path, monkeypatch):
    model, frozen, blocks, source = client
    write_peft(model, frozen, blocks, tmp_path / "export", source=source)
    same_encoders(model, frozen, blocks, run_readme(tmp_path / "export", monkeypatch).base_model.model)


def test_unscaled_adapter_fails(client, tmp_path, monkeypatch):
    model, frozen, blocks, source = client
    monkeypatch.setattr(adapters, "alpha", lambda c: c.encoder_rank)
    refused(tmp_path, write_peft, model, frozen, blocks, source=source)


def test_transposed_adapter_fails(client, tmp_path, monkeypatch):
    """FLAVA's query is square: (A B)ᵀ loads without complaint and is wrong."""
    model, frozen, blocks, source = client
    right = adapters.adapters

    def transposed(*args):
        tensors, modules = right(*args)
        for module in modules:
            a, b = (f"base_model.model.{module}.lora_{letter}.weight" for letter in "AB")
            if tensors[a].ndim == 2:
                tensors[a], tensors[b] = tensors[b].T.copy(), tensors[a].T.copy()
            else:  # of a patch, height and width
                tensors[a] = tensors[a].swapaxes(2, 3).copy()
        return tensors, modules

    monkeypatch.setattr(adapters, "adapters", transposed)
    refused(tmp_path, write_peft, model, frozen, blocks, source=source)


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
def test_forgotten_adapter_fails(client, tmp_path, monkeypatch):
    model, frozen, blocks, source = client
    right = adapters.adapters

    def without_one(*args):
        tensors, modules = right(*args)
        del tensors[f"base_model.model.{sorted(modules)[0]}.lora_A.weight"]
        return tensors, modules

    monkeypatch.setattr(adapters, "adapters", without_one)
    refused(tmp_path, write_peft, model, frozen, blocks, source=source, message="PEFT does not find base_model.model")


def test_source_must_be_where_the_run_started(client, tmp_path):
    model, frozen, blocks, source = client
    other = {**frozen, "backbone": jax.tree.map(lambda leaf: leaf + 1, frozen["backbone"])}
    refused(tmp_path, write_peft, model, other, blocks, source=source, message="is not what the run has; name the")


def test_without_peft(client, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    model, frozen, blocks, source = client
    refused(tmp_path, write_peft, model, frozen, blocks, message="needs the package of that name; pip install peft")


def test_folder_in_use(client, tmp_path):
    model, frozen, blocks, source = client
    (tmp_path / "mine").write_text("")
    with pytest.raises(UserError, match="is not empty"):
        write_peft(model, frozen, blocks, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_tasks_of_one_modality(client, tmp_path):
    """The blocks of one modality are enough; ViLT's texts have no LoRA."""
    model, frozen, blocks, source = client
    text = ServerModel(model.config, [task for task in TASKS if task.name == "ag_news"])
    mine = {name: blocks[name] for name in text.block_names}
    if model.config.name == "vilt":
        message = "needs a LoRA in an encoder, and these tasks have none"
        refused(tmp_path, write_peft, text, frozen, mine, source=source, message=message)
        return
    write_peft(text, frozen, mine, tmp_path / "export", source=source)
    keys = load_file(tmp_path / "export" / "adapter_model.safetensors")
    assert keys and all(key.startswith("base_model.model.text_model.") for key in keys)


def test_sliced_positions_are_refused(tmp_path):
    model = ServerModel(CONFIGS["vilt, other choices"], TASKS)
    frozen, blocks = reference.random_weights(jax.eval_shape(model.init, jax.random.key(0)), np.random.default_rng(3))
    message = "model.position: 'slice' is not what ViltModel does"
    refused(tmp_path, write_peft, model, frozen, blocks, message=message)


def test_adapters_of_the_standard_backbone_lie_beside_those_of_the_encoders(tmp_path):
    model, frozen, blocks, source = make_client("flava, standard", tmp_path / "checkpoint")
    write_peft(model, frozen, blocks, tmp_path / "export", source=source)
    rest, whole = load_file(tmp_path / "export" / "tap_blocks.safetensors"), naming.to_torch({}, blocks)
    mine = {key for key in whole if key.startswith("blocks.backbone.")}
    # A and B of query, value and both linears of the feed-forward network, in each layer
    assert len(mine) == 2 * 4 * sum(model.config.backbone_layers)
    for key in mine:
        np.testing.assert_array_equal(rest[key], whole[key])


@pytest.mark.parametrize(("write", "format"), [(write_peft, "peft"), (write_huggingface, "huggingface")])
def test_bottlenecks_are_refused(tmp_path, write, format):
    model = ServerModel(CONFIGS["flava, bottlenecks"], TASKS)
    message = f"^format: '{format}' has no place for the bottleneck adapters of feddat; export as torch$"
    with pytest.raises(UserError, match=message):
        write(model, {}, {}, tmp_path / "export")
    assert not list(tmp_path.iterdir())
