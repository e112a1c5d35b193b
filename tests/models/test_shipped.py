"""The checkpoints that come with the package: small, found by name, and the same model in PyTorch and in JAX."""

import json
import re

import jax
import numpy as np
import pytest
import torch
import transformers

from tap_jax import shipped
from tap_jax.assembly import federation_of, model_config
from tap_jax.config import load_config
from tap_jax.data import synthetic
from tap_jax.data.text import SPECIAL, load_tokenizer
from tap_jax.errors import UserError
from tap_jax.models import checkpoints
from tap_jax.models.server_model import ServerModel
from tests.models import reference
from tests.models.reference import close
from tests.models.test_checkpoints import same_layers

NAMES = {"demo_flava": "demo", "demo_vilt": "demo_vilt"}  # checkpoint -> the configuration that starts from it
MOST_BYTES = 4_000_000
FORMATS = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt"}
BESIDE = {"README.md", "losses.csv", "losses.png", "probe.json"}


@pytest.fixture(scope="module", params=NAMES)
def start(request):
    """(name, PyTorch's model, ours, frozen, blocks)."""
    config = load_config(NAMES[request.param])
    ours = ServerModel(model_config(config), federation_of(config).tasks)
    frozen, blocks = ours.init(jax.random.key(0), checkpoints.load(request.param, ours))
    kind = {"flava": transformers.FlavaModel, "vilt": transformers.ViltModel}[config.model.name]
    theirs = kind.from_pretrained(shipped.located(request.param)).eval()
    return request.param, theirs, ours, frozen, blocks


def batch(name):
    """Pictures [4, 64, 64, 3] and questions of vqa."""
    task = next(task for task in federation_of(load_config(NAMES[name])).tasks if task.name == "vqa")
    examples = synthetic.load(task, "train", size=4, seed=0)
    images = examples.images / np.float32(128) - 1
    tokens = load_tokenizer(shipped.located(name)).encode(examples.inputs, 64)
    assert len(set((tokens != 0).sum(1))) > 1
    return images, tokens


def test_there_are_these_and_they_are_small():
    assert shipped.checkpoints() == sorted(NAMES)
    files = [path for path in shipped.CHECKPOINTS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < MOST_BYTES
    for name in NAMES:
        assert {path.name for path in files if path.parent.name == name} == FORMATS | BESIDE


def test_hidden_states_equal_pytorch_s(start):
    """Of the encoders, through our random adaptor and output projection, and of each layer of the backbone."""
    name, theirs, ours, frozen, blocks = start
    images, tokens = batch(name)
    mask = tokens != 0
    pixels = torch.tensor(np.array(ours.adapt(blocks["encoder/image"], images))).permute(0, 3, 1, 2)
    ids = torch.tensor(tokens).long()
    with torch.no_grad():
        if ours.config.name == "flava":
            image = theirs.image_model(pixel_values=pixels).last_hidden_state
            text = theirs.text_model(ids, torch.tensor(mask).long()).last_hidden_state
            layers = theirs.multimodal_model.encoder.layer
        else:
            image = reference.visual_embed(theirs.embeddings, pixels)
            text = theirs.embeddings.text_embeddings(ids)
            layers = theirs.encoder.layer
        for modality, states, inputs, real in (("image", image, images, None), ("text", text, tokens, mask)):
            block = blocks[f"encoder/{modality}"]
            found = np.asarray(ours.encode(modality, frozen, block, inputs, real))
            expected = reference.output(block["output"], states).numpy()
            real = np.ones(expected.shape[:2], bool) if real is None else real
            close(found[real], expected[real])
        assert len(layers) == sum(ours.config.backbone_layers)
        same_layers(ours.config, frozen["backbone"], layers, text.numpy(), mask, 1e-5)


def test_words_of_the_tasks_are_pieces_of_the_tokenizer():
    """No word of a training set is unknown; those that frames of headlines alone have are cut, and few others."""
    for name, config in NAMES.items():
        tokenizer = load_tokenizer(shipped.located(name))
        config = load_config(config)
        assert tokenizer.size == config.model.vocab
        for task in federation_of(config).tasks:
            examples = synthetic.load(task, "train", size=200, seed=41)
            for texts in filter(None, (examples.inputs, examples.targets)):
                words = sum(len(tokenizer.normalise(text).split()) for text in texts)
                ids = tokenizer.encode(texts, 64)
                assert not (ids == SPECIAL.index("[UNK]")).any()
                assert words <= (ids >= len(SPECIAL)).sum() <= (1.2 if task.name == "ag_news" else 1.05) * words


def test_the_card_has_command_and_figures():
    for name in NAMES:
        folder = shipped.CHECKPOINTS / name
        card, probe = (folder / "README.md").read_text(), json.loads((folder / "probe.json").read_text())
        assert re.search(r"python launch/pretrain.py \w+ --out=DIR .*--seed=\d+", card)
        assert set(probe["random"]) == set(probe["trained"]) and len(probe["random"]) == 8
        for task, trained in probe["trained"].items():
            figures = [f"{score:.3f}" for shots in trained for score in (probe["random"][task][shots], trained[shots])]
            assert re.search(rf"\| {task}\b.* \| {re.escape(' | '.join(figures))} \|", card)


def test_a_folder_of_the_same_name_is_meant_by_its_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo_flava").mkdir()
    assert checkpoints.find("demo_flava") == shipped.CHECKPOINTS / "demo_flava"
    assert checkpoints.find("./demo_flava").resolve() == tmp_path / "demo_flava"
    with pytest.raises(UserError, match="no folder ./another; .* comes with the package: demo_flava, demo_vilt$"):
        checkpoints.find("./another")


def test_other_sizes_are_one_line_with_the_remedy():
    config = load_config("demo", {"model.width": 16})
    with pytest.raises(
        UserError, match="model.width: 16, but the checkpoint has 32 .*; set model.width=32, or .*weights=$"
    ):
        checkpoints.check_sizes(checkpoints.find(config.model.weights), model_config(config))
