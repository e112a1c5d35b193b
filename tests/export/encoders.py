"""Clients of both models for the exports of encoders, and what they compute through Hugging Face."""

import re

import jax
import numpy as np
import pytest
import torch
import transformers

from tap_jax.errors import UserError
from tap_jax.models import checkpoints
from tap_jax.models.server_model import ServerModel
from tests.export.conftest import CONFIGS, TASKS
from tests.models import huggingface as random
from tests.models import reference

CLASSES = {"flava": transformers.FlavaModel, "vilt": transformers.ViltModel}


def make_client(name, folder):
    """(model, Ŵ, a client's trained blocks, the checkpoint that Ŵ comes from)."""
    model = ServerModel(CONFIGS[name], TASKS)
    c = model.config
    layers = sum(c.backbone_layers) + 1
    config = random.flava_config(c, layers=layers) if c.name == "flava" else random.vilt_config(c, layers=layers)
    random.randomise(CLASSES[c.name](config), seed=2).save_pretrained(folder)
    shapes = jax.eval_shape(model.init, jax.random.key(0))[1]
    blocks = reference.random_weights(shapes, np.random.default_rng(6))
    return model, checkpoints.load(str(folder), model).frozen, blocks, str(folder)


def states(model, theirs, blocks):
    """Encoder tokens through HF, written out once more: modality -> array."""
    rng = np.random.default_rng(9)
    images = rng.standard_normal((2, 64, 64, 3)).astype(np.float32)
    tokens = rng.integers(1, model.config.vocab, (2, 5)).astype(np.int32)
    image, text = blocks["encoder/image"], blocks["encoder/text"]
    pixels = reference.adaptor(model.config, image["adaptor"], torch.tensor(images).permute(0, 3, 1, 2))
    ids = torch.tensor(tokens).long()
    with torch.no_grad():
        if model.config.name == "flava":
            seen, read = theirs.image_model(pixels), theirs.text_model(ids)
            seen, read = seen.last_hidden_state, read.last_hidden_state
        else:
            seen, read = reference.visual_embed(theirs.embeddings, pixels), theirs.embeddings.text_embeddings(ids)
        seen, read = reference.output(image["output"], seen), reference.output(text["output"], read)
    return images, tokens, seen.numpy(), read.numpy()


def same_encoders(model, frozen, blocks, theirs):
    images, tokens, seen, read = states(model, theirs.eval(), blocks)
    for modality, inputs, mask, expected in (("image", images, None, seen), ("text", tokens, tokens != 0, read)):
        ours = model.encode(modality, frozen, blocks[f"encoder/{modality}"], inputs, mask)
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def run_readme(folder, monkeypatch):
    """The model that the README's code loads."""
    monkeypatch.chdir(folder)
    code = re.search("```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[1]
    found = {}
    exec(code, found)
    return found["model"]


def refused(tmp_path, write, *args, message="encoder that was written differs from the JAX model by", **kwargs):
    with pytest.raises(UserError, match=message) as caught:
        write(*args, tmp_path / "wrong", **kwargs)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())
