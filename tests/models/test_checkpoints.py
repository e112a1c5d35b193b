"""Checkpoints of Hugging Face's FLAVA and ViLT: every format into the same trees, and back; what is wrong is named."""

import dataclasses
import json
import os
import pickle
import re

import flax.serialization
import jax
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from tap_jax.errors import UserError
from tap_jax.models import backbone, checkpoints, weight_tables
from tap_jax.models.accounting import shapes
from tap_jax.models.layers import InputAdaptor, ModelConfig
from tap_jax.models.server_model import ServerModel
from tap_jax.tasks import find_task
from tests.models import huggingface, reference

pytestmark = pytest.mark.usefixtures("strict")

TASKS = tuple(map(find_task, ("fashion_mnist", "ag_news")))
# No two sizes agree.
FLAVA = ModelConfig(
    width=12, heads=3, mlp=20, image_layers=2, text_layers=3, image_size=40, patch=8, vocab=37, max_text=11,
    text_positions=13, backbone_layers=(1, 2), text_heads=2, text_cond_heads=4, text_inner=10, max_answer=6,
)  # fmt: skip
VILT = dataclasses.replace(FLAVA, name="vilt", position_grid=3)
LAYERS = 4  # in the checkpoints' multimodal encoder
CLASSES = {
    "FlavaModel": (transformers.FlavaModel, FLAVA),
    "FlavaForPreTraining": (transformers.FlavaForPreTraining, FLAVA),
    "ViltModel": (transformers.ViltModel, VILT),
    "ViltForMaskedLM": (transformers.ViltForMaskedLM, VILT),
}


def make(name):
    """A random model of that class."""
    kind, c = CLASSES[name]
    config = huggingface.flava_config if c.name == "flava" else huggingface.vilt_config
    return huggingface.randomise(kind(config(c, layers=LAYERS)), seed=1)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Class -> (model, its folder in safetensors)."""
    found = {}
    for name in CLASSES:
        folder = tmp_path_factory.mktemp(name)
        model = make(name)
        model.save_pretrained(folder)
        found[name] = model, folder
    return found


def server(name):
    return ServerModel(CLASSES[name][1], TASKS)


def load(folder, name="FlavaModel", **kwargs):
    return checkpoints.load(str(folder), server(name), **kwargs)


def trees_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def both(pretrained):
    return {"frozen": pretrained.frozen, "blocks": pretrained.blocks}


def close(ours, theirs, tolerance=1e-5):
    theirs = theirs.detach().numpy()
    assert ours.shape == theirs.shape
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * np.abs(theirs).max())


# --- values --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["FlavaForPreTraining", "ViltForMaskedLM"])
def test_all_that_the_model_stores_comes_from_the_checkpoint(saved, name):
    """Every leaf of Ŵ is filled; of the trainables only ViLT's CLS and positions."""
    pretrained = load(saved[name][1], name)
    frozen, blocks = shapes(server(name))
    assert jax.tree.map(np.shape, pretrained.frozen) == jax.tree.map(lambda leaf: leaf.shape, frozen)
    if name.startswith("Flava"):
        assert not pretrained.blocks
    else:
        assert {n: sorted(tree) for n, tree in pretrained.blocks.items()} == {"encoder/image": ["cls", "positions"]}
    assert all(np.abs(leaf).min() < np.abs(leaf).max() < 10 for leaf in jax.tree.leaves(both(pretrained)))


def test_flava_towers_equal_hugging_face(saved):
    """Last hidden states, through our encoders without adaptor and output projection."""
    model, folder = saved["FlavaForPreTraining"]
    frozen = load(folder).frozen
    rng = np.random.default_rng(0)
    ours = server("FlavaModel")
    _, blocks = ours.init(jax.random.key(0), load(folder))
    images = rng.standard_normal((2, 64, 64, 3)).astype(np.float32)
    pixels = torch.tensor(np.array(ours.adapt(blocks["encoder/image"], images))).permute(0, 3, 1, 2)
    theirs = model.flava.image_model(pixel_values=pixels).last_hidden_state
    assert theirs.shape == (2, 26, 12)
    close(
        ours.encode("image", frozen, blocks["encoder/image"], images, None),
        reference.output(blocks["encoder/image"]["output"], theirs),
    )
    tokens = rng.integers(1, FLAVA.vocab, (3, 7)).astype(np.int32)
    tokens[0, 4:], tokens[2, 2:] = 0, 0
    mask = tokens != 0
    theirs = model.flava.text_model(torch.tensor(tokens).long(), torch.tensor(mask).long()).last_hidden_state
    theirs = reference.output(blocks["encoder/text"]["output"], theirs)
    close(np.asarray(ours.encode("text", frozen, blocks["encoder/text"], tokens, mask))[mask], theirs[mask])


@pytest.mark.parametrize("name", ["FlavaForPreTraining", "ViltForMaskedLM"])
def test_backbone_layers_equal_hugging_face(saved, name):
    """FLAVA's multimodal layers and ViLT's layers, first MoTE's and then MoME's; adapters at their start, B = 0."""
    model, folder = saved[name]
    c = CLASSES[name][1]
    frozen = load(folder, name).frozen["backbone"]
    layers = model.flava.multimodal_model.encoder.layer if c.name == "flava" else model.vilt.encoder.layer
    x = np.random.default_rng(1).standard_normal((2, 7, c.width)).astype(np.float32)
    same_layers(c, frozen, layers[: sum(c.backbone_layers)], x, np.arange(7) < np.array([[7], [4]]), 1e-5)


def same_layers(c, frozen, layers, x, mask, tolerance):
    """Each layer by itself on x [B, T, D]."""
    zero = {part: backbone.init_block(jax.random.key(0), c, 1, part) for part in ("attention", "domain", "expert")}
    zero = {part: jax.tree.map(lambda leaf: leaf[0], tree) for part, tree in zero.items()}
    for i, layer in enumerate(layers):
        weights = jax.tree.map(lambda leaf, i=i: leaf[i], frozen)
        flat = x.reshape(-1, c.width)
        flat = backbone.attention_part(c, weights, zero["attention"], zero["domain"], flat, mask, None)
        ours = np.asarray(backbone.expert_part(c, weights, zero["expert"], flat, None)).reshape(x.shape)
        theirs = huggingface.routed_layer(layer, torch.tensor(x), torch.tensor(mask))
        close(ours[mask], theirs[torch.tensor(mask)], tolerance)


# --- formats and round trips ---------------------------------------------------------------------------------------


def state(model):
    return {key: tensor.contiguous() for key, tensor in model.state_dict().items()}


def write_bin(model, folder):
    torch.save(state(model), folder / "pytorch_model.bin")


def write_old_bin(model, folder):
    torch.save(state(model), folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)


def write_sharded_bin(model, folder):
    tensors = state(model)
    shards = {key: f"pytorch_model-{1 + n % 2:05}-of-00002.bin" for n, key in enumerate(tensors)}
    for shard in set(shards.values()):
        torch.save({key: tensors[key] for key in tensors if shards[key] == shard}, folder / shard)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))


def write_sharded_safetensors(model, folder):
    model.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1


def write_msgpack(model, folder):
    """Flax's names and layouts: kernels [in, out] and HWIO, scales and embeddings by their own names."""
    tree = {}
    for key, tensor in state(model).items():
        *path, leaf = key.split(".")
        value = tensor.numpy()
        if leaf == "weight":
            if value.ndim == 4:
                leaf, value = "kernel", value.transpose(2, 3, 1, 0)
            elif value.ndim == 1:
                leaf = "scale"
            elif path[-1].endswith("embeddings"):
                leaf = "embedding"
            else:
                leaf, value = "kernel", value.T
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[leaf] = np.ascontiguousarray(value)
    (folder / "flax_model.msgpack").write_bytes(flax.serialization.msgpack_serialize(tree))


@pytest.mark.parametrize(
    "write", [write_sharded_safetensors, write_bin, write_old_bin, write_sharded_bin, write_msgpack]
)
@pytest.mark.parametrize("name", ["FlavaForPreTraining", "ViltForMaskedLM"])
def test_every_format_gives_the_same_trees(saved, tmp_path, name, write):
    model, folder = saved[name]
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    write(model, tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    trees_equal(both(load(tmp_path, name)), both(load(folder, name)))


@pytest.mark.parametrize(("bare", "headed"), [("FlavaModel", "FlavaForPreTraining"), ("ViltModel", "ViltForMaskedLM")])
def test_with_and_without_prefix(saved, tmp_path, bare, headed):
    model = saved[headed][0]
    inner = model.flava if headed.startswith("Flava") else model.vilt
    inner.save_pretrained(tmp_path)
    assert not any(key.startswith(("flava.", "vilt.")) for key in load_file(tmp_path / "model.safetensors"))
    trees_equal(both(load(tmp_path, bare)), both(load(saved[headed][1], headed)))


@pytest.mark.parametrize("name", CLASSES)
def test_the_tables_know_every_weight_and_no_more(saved, name):
    """The tables' names are those of the class with heads, plus a few that other versions write."""
    model, folder = saved[name]
    known = weight_tables.known_names(
        CLASSES[name][1].name, checkpoints.layer_counts(folder), codebook_blocks=checkpoints.codebook_blocks(folder)
    )
    theirs = {re.sub("^(flava|vilt)\\.", "", key) for key in model.state_dict()}
    assert theirs <= known
    if name in ("FlavaForPreTraining", "ViltForMaskedLM"):
        more = {
            key for key in known - theirs if not re.search("(position|token_type)_ids$|^(itm_score|rank_output)", key)
        }
        # Group 1 of the codebook has as many channels in as out; ViLT's head keeps its bias in the decoder.
        assert more <= {"mlm_score.bias"}


@pytest.mark.parametrize("name", ["FlavaForPreTraining", "ViltForMaskedLM"])
def test_to_hugging_face_and_back_is_bit_identical(saved, tmp_path, name):
    model, folder = saved[name]
    pretrained = load(folder, name)
    theirs = weight_tables.to_huggingface(CLASSES[name][1].name, pretrained.frozen, pretrained.blocks)
    prefix = "flava." if name.startswith("Flava") else "vilt."
    original = {key.removeprefix(prefix): tensor.numpy() for key, tensor in model.state_dict().items()}
    # The sixteen weights of each layer, and the embeddings and norms.
    assert len(theirs) == (16 * (2 + 3 + 3) + 6 + 7 if name.startswith("Flava") else 16 * 3 + 9)
    for key, value in theirs.items():
        np.testing.assert_array_equal(value, original[key], err_msg=key)
    save_file({key: np.ascontiguousarray(value) for key, value in theirs.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    trees_equal(both(load(tmp_path, name)), both(pretrained))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_half_precision_is_widened(tmp_path, dtype, file):
    model = make("FlavaModel").to(dtype)
    if file.endswith("bin"):
        write_bin(model, tmp_path)
        model.config.save_pretrained(tmp_path)
    else:
        model.save_pretrained(tmp_path)
    frozen = load(tmp_path).frozen
    assert frozen["encoder/text"]["words"].dtype == np.float32
    words = model.text_model.embeddings.word_embeddings.weight.detach().float().numpy()
    np.testing.assert_array_equal(frozen["encoder/text"]["words"], words)


def test_only_needed_encoders_are_read(saved):
    text = ServerModel(FLAVA, TASKS[1:])
    assert set(checkpoints.load(str(saved["FlavaModel"][1]), text).frozen) == {"backbone", "encoder/text"}


def test_initial_blocks_do_not_depend_on_the_checkpoint(saved):
    """But for ViLT's CLS and positions: all other trainables are those of a run on stand-ins."""
    model = server("ViltModel")
    pretrained = load(saved["ViltModel"][1], "ViltModel")
    _, standard = model.init(jax.random.key(3))
    frozen, blocks = model.init(jax.random.key(3), pretrained)
    trees_equal(jax.device_get(frozen), pretrained.frozen)
    taken = pretrained.blocks["encoder/image"]
    for name in ("cls", "positions"):
        np.testing.assert_array_equal(blocks["encoder/image"].pop(name), taken[name])
        del standard["encoder/image"][name]
    trees_equal(jax.device_get(blocks), jax.device_get(standard))


# --- the cache -----------------------------------------------------------------------------------------------------


def test_converted_weights_are_kept(saved, tmp_path, monkeypatch, caplog):
    model, folder = saved["ViltForMaskedLM"]
    (tmp_path / "checkpoint").mkdir()
    for file in folder.iterdir():
        (tmp_path / "checkpoint" / file.name).write_bytes(file.read_bytes())
    folder, cache = tmp_path / "checkpoint", tmp_path / "cache"
    first = load(folder, "ViltModel", cache_dir=cache)
    (file,) = cache.iterdir()  # and nothing half-written
    convert = checkpoints.convert
    monkeypatch.setattr(checkpoints, "convert", None)
    trees_equal(both(load(folder, "ViltModel", cache_dir=cache)), both(first))
    monkeypatch.setattr(checkpoints, "convert", convert)

    file.write_bytes(file.read_bytes()[:-9])
    trees_equal(both(load(folder, "ViltModel", cache_dir=cache)), both(first))
    assert "is damaged" in caplog.text

    os.utime(folder / "model.safetensors", ns=(0, 1))  # another checkpoint by the same name
    load(folder, "ViltModel", cache_dir=cache)
    assert len(list(cache.iterdir())) == 2


# --- what does not fit, and what is broken -------------------------------------------------------------------------


def refused(message, folder, name="FlavaModel", config=None):
    """Loading raises one line that says so."""
    model = server(name) if config is None else ServerModel(config, TASKS)
    with pytest.raises(UserError, match=message) as caught:
        checkpoints.load(str(folder), model)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.fixture
def copy(saved, tmp_path):
    """`copy(edit, name)`: the checkpoint with its tensors edited in place by `edit`."""

    def make(edit, name="FlavaModel"):
        tensors = load_file(saved[name][1] / "model.safetensors")
        edit(tensors)
        save_file(tensors, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_bytes((saved[name][1] / "config.json").read_bytes())
        return tmp_path

    return make


def test_missing_weight(copy):
    key = "image_model.encoder.layer.1.attention.attention.key.bias"
    refused(f"'{key}' is missing in", copy(lambda tensors: tensors.pop(key)))


def test_missing_layer(copy):
    def drop(tensors):
        for key in [key for key in tensors if key.startswith("text_model.encoder.layer.2.")]:
            del tensors[key]

    refused(r"'text_model.encoder.layer.2.layernorm_before.weight' is missing in", copy(drop))


def test_unknown_weight(copy):
    folder = copy(lambda tensors: tensors.update({"vision_model.x": np.zeros(3)}))
    refused("'vision_model.x' in .*model.safetensors is not a weight of flava", folder)


def test_layer_beyond_the_config(copy):
    first, beyond = (f"encoder.layer.{i}.output.dense.bias" for i in (0, LAYERS))
    folder = copy(lambda tensors: tensors.update({beyond: tensors[first]}), "ViltModel")
    refused(f"'{beyond}' in .* is not a weight of vilt", folder, "ViltModel")


def test_weight_with_and_without_prefix(copy):
    folder = copy(lambda tensors: tensors.update({"vilt.layernorm.bias": tensors["layernorm.bias"]}), "ViltModel")
    refused("'layernorm.bias' is in .* twice, with 'vilt.' before it and without", folder, "ViltModel")


@pytest.mark.parametrize(
    "key", ["text_model.embeddings.position_embeddings.weight", "image_model.embeddings.cls_token"]
)
def test_wrong_shape(copy, key):
    def transpose(tensors):
        tensors[key] = np.ascontiguousarray(tensors[key].T)

    shape = {"t": r"\(12, 13\), not \(13, 12\)", "i": r"\(12, 1, 1\), not \(1, 1, 12\)"}[key[0]]
    refused(f"'{key}' in .* has shape {shape}", copy(transpose))


@pytest.mark.parametrize("dtype", [np.float64, np.int64])
def test_wrong_dtype(copy, dtype):
    key = "image_model.encoder.layer.0.intermediate.dense.weight"

    def cast(tensors):
        tensors[key] = tensors[key].astype(dtype)

    refused(f"'{key}' in .* is {dtype.__name__}, not float32", copy(cast))


def test_another_architecture(tmp_path, saved):
    bert = transformers.BertConfig(hidden_size=12, num_hidden_layers=1, num_attention_heads=3, intermediate_size=20)
    transformers.BertModel(bert).save_pretrained(tmp_path)
    refused("is a checkpoint of 'bert'; use one of flava, vilt", tmp_path)
    refused("model.name: 'flava', but the checkpoint .* is of 'vilt'; set model.name=vilt", saved["ViltModel"][1])
    # The wrong weights under the right config.
    config = (saved["FlavaModel"][1] / "config.json").read_bytes()
    (tmp_path / "config.json").write_bytes(config)
    refused("'embeddings.LayerNorm.bias' in .* is not a weight of flava", tmp_path)


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin", "flax_model.msgpack"])
@pytest.mark.parametrize("left", [0, 5, -100])
def test_truncated_file(saved, tmp_path, file, left):
    model, folder = saved["FlavaModel"]
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    if file.endswith("bin"):
        write_bin(model, tmp_path)
    elif file.endswith("msgpack"):
        write_msgpack(model, tmp_path)
    else:
        (tmp_path / file).write_bytes((folder / file).read_bytes())
    (tmp_path / file).write_bytes((tmp_path / file).read_bytes()[:left])
    refused(f"{file} (is|holds more than tensors .* or is) damaged", tmp_path)


class Code:
    """Runs when unpickled."""

    def __reduce__(self):
        return os.mkdir, (os.environ["TAP_TEST_TRAP"],)


@pytest.mark.parametrize("save", [torch.save, lambda what, path: path.write_bytes(pickle.dumps(what, 2))])
def test_pickle_with_code_is_refused_and_not_run(saved, tmp_path, monkeypatch, save):
    monkeypatch.setenv("TAP_TEST_TRAP", str(tmp_path / "trap"))
    (tmp_path / "config.json").write_bytes((saved["FlavaModel"][1] / "config.json").read_bytes())
    save({"logit_scale": Code()}, tmp_path / "pytorch_model.bin")
    refused("holds more than tensors and could run code when loaded", tmp_path)
    assert not (tmp_path / "trap").exists()


def test_values_that_are_no_numbers(copy):
    key = "text_model.encoder.layer.0.output.dense.bias"

    def spoil(tensors):
        tensors[key] = np.full_like(tensors[key], np.nan)

    refused(f"'{key}' in .*model.safetensors holds values that are no numbers", copy(spoil))


def test_a_pickle_of_parameters_and_one_of_sparse_tensors(saved, tmp_path):
    model, folder = saved["FlavaModel"]
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    state = {name: torch.nn.Parameter(value.bfloat16()) for name, value in model.state_dict().items()}
    torch.save(state, tmp_path / "pytorch_model.bin")
    checkpoints.load(str(tmp_path), server("FlavaModel"))
    torch.save({"logit_scale": torch.eye(2).to_sparse()}, tmp_path / "pytorch_model.bin")
    refused("holds 'logit_scale', which is no named dense tensor", tmp_path)


def test_sizes_that_no_model_has(saved, tmp_path):
    _, folder = saved["ViltModel"]
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"patch_size": 0}))
    refused("config.json has patch_size = 0; download it again", tmp_path, "ViltModel")


def test_an_index_without_shards(saved, tmp_path):
    (tmp_path / "config.json").write_bytes((saved["FlavaModel"][1] / "config.json").read_bytes())
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    refused("model.safetensors.index.json is no index of shards", tmp_path)


def test_shards_that_are_missing_or_lie_elsewhere(saved, tmp_path):
    model, _ = saved["FlavaModel"]
    write_sharded_safetensors(model, tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    shard = next(iter(listed["weight_map"].values()))
    (tmp_path / shard).rename(tmp_path / "away")
    refused(f"{shard} is missing; download it again", tmp_path)
    (tmp_path / "away").rename(tmp_path / shard)
    listed["weight_map"]["logit_scale"] = "../../etc/model.safetensors"
    index.write_text(json.dumps(listed))
    refused("which is no file beside it", tmp_path)
    del listed["weight_map"]["logit_scale"]
    listed["weight_map"]["nowhere.weight"] = shard
    index.write_text(json.dumps(listed))
    refused(f"'nowhere.weight' is not in .*{shard}", tmp_path)
    index.write_text("{")
    refused("is no index of shards", tmp_path)


def test_folders_without_a_checkpoint(tmp_path):
    refused("no folder .*/nowhere; name a checkpoint's folder or a hub id", tmp_path / "nowhere")
    refused("no config.json in", tmp_path)
    (tmp_path / "config.json").write_text("{}")
    refused("config.json is no model's", tmp_path)
    make("FlavaModel").config.save_pretrained(tmp_path)
    refused("no weights in .*; it must hold one of model.safetensors", tmp_path)


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_hub_id_in_the_hub_s_cache(saved, tmp_path, monkeypatch, file):
    """Offline: what an earlier download left behind is found, in whatever format it is."""
    model, folder = saved["FlavaForPreTraining"]
    cached = tmp_path / "models--somebody--flava"
    snapshot = cached / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0" * 40)
    (snapshot / "config.json").write_bytes((folder / "config.json").read_bytes())
    if file.endswith("bin"):
        write_bin(model, snapshot)
    else:
        (snapshot / file).write_bytes((folder / file).read_bytes())
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    trees_equal(both(load("somebody/flava")), both(load(folder)))


def test_hub_that_cannot_be_reached():
    message = "cannot get 'somebody/flava' from the hub .*; check name and network, or name a local folder"
    refused(message, "somebody/flava")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("width", 24, r"model.width: 24, but the checkpoint has 12 \(image_config.hidden_size\); set model.width=12"),
        ("heads", 4, "model.heads: 4, but the checkpoint has 3"),
        ("mlp", 48, "model.mlp: 48, but the checkpoint has 20"),
        ("image_layers", 12, "model.image_layers: 12, but the checkpoint has 2"),
        ("text_layers", 2, "model.text_layers: 2, but the checkpoint has 3"),
        ("image_size", 32, "model.image_size: 32, but the checkpoint has 40"),
        ("patch", 4, "model.patch: 4, but the checkpoint has 8"),
        ("vocab", 38, "model.vocab: 38, but the checkpoint has 37"),
        ("text_positions", 0, "model.text_positions: 11, but the checkpoint has 13 .*; set model.text_positions=13"),
        ("layer_norm_eps", 1e-5, "model.layer_norm_eps: 1e-05, but the checkpoint has 1e-12"),
        ("backbone_layers", (3, 2), r"model.backbone_layers: \(3, 2\), but the checkpoint has 4 layers in all"),
    ],
)
def test_sizes_that_differ_are_named(saved, field, value, message):
    refused(message, saved["FlavaModel"][1], config=dataclasses.replace(FLAVA, **{field: value}))


def test_vilt_sizes_that_differ_are_named(saved):
    _, folder = saved["ViltModel"]
    config = dataclasses.replace(VILT, position_grid=12)
    refused("model.position_grid: 12, but the checkpoint has 3", folder, config=config)
    load(folder, "ViltModel")
    checkpoints.check_sizes(folder, dataclasses.replace(VILT, image_size=16))  # any: positions are interpolated


def test_several_sizes_that_differ_are_one_line(saved):
    config = dataclasses.replace(FLAVA, width=24, vocab=50)
    message = r"model.width: 24.* model.vocab: 50.*; set model.width=12,model.vocab=37, or"
    refused(message, saved["FlavaModel"][1], config=config)


def test_architectures_that_our_layers_are_not(saved, tmp_path):
    values = json.loads((saved["ViltModel"][1] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | {"hidden_act": "relu"}))
    refused("config.json has hidden_act = relu; only gelu is supported", tmp_path, "ViltModel")


def test_a_config_can_adopt_the_sizes(saved):
    for name, c in (("FlavaForPreTraining", FLAVA), ("ViltModel", VILT)):
        fields = checkpoints.model_fields(saved[name][1])
        assert {field: getattr(c, field) for field in fields} == fields
        checkpoints.check_sizes(saved[name][1], ModelConfig(**fields, backbone_layers=(2, 2)))


# --- base size -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_base_size_flava(tmp_path):
    """The published sizes: parity at depth twelve."""
    ours = ServerModel(ModelConfig(), TASKS)
    c = ours.config
    rng = np.random.default_rng(0)
    images = rng.standard_normal((1, 64, 64, 3)).astype(np.float32)
    tokens = rng.integers(1, c.vocab, (2, 9)).astype(np.int32)
    tokens[1, 5:] = 0
    mask = tokens != 0
    adaptor = InputAdaptor(c).init(jax.random.key(1), images)["params"]
    model = transformers.FlavaModel(transformers.FlavaConfig()).eval()
    with torch.no_grad():
        for start in (model.image_model.embeddings.position_embeddings, model.image_model.embeddings.cls_token):
            start.normal_(std=0.02)
        pixels = torch.tensor(np.array(ours.adapt({"adaptor": adaptor}, images))).permute(0, 3, 1, 2)
        seen = model.image_model(pixels).last_hidden_state
        read = model.text_model(torch.tensor(tokens).long(), torch.tensor(mask).long()).last_hidden_state
    model.save_pretrained(tmp_path)
    layers = model.multimodal_model.encoder.layer[: sum(c.backbone_layers)]
    del model  # one copy of it at a time

    frozen, blocks = ours.init(jax.random.key(0), checkpoints.load(str(tmp_path), ours))
    blocks["encoder/image"]["adaptor"] = adaptor
    for modality, states, inputs, known in (("image", seen, images, None), ("text", read, tokens, mask)):
        block, real = blocks[f"encoder/{modality}"], slice(None) if known is None else known
        encoded = np.asarray(ours.encode(modality, frozen, block, inputs, known))
        close(encoded[real], reference.output(block["output"], states)[real], 1e-4)
    with torch.no_grad():
        same_layers(c, frozen["backbone"], layers, read.numpy(), mask, 1e-4)
