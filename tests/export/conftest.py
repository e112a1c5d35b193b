"""Small models of every shape that the configuration allows, all weights random, and what they compute in JAX."""

import dataclasses
import functools
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from tap_jax.data.text import load_tokenizer
from tap_jax.export import folder as folders
from tap_jax.models.layers import ModelConfig
from tap_jax.models.server_model import ServerModel
from tap_jax.tasks import find_task
from tests.models.reference import random_weights

TASKS = tuple(map(find_task, ("cifar100", "fashion_mnist", "ag_news", "mmlu", "vqa")))
FLAVA = ModelConfig(
    width=12, heads=3, mlp=20, image_layers=1, text_layers=2, image_size=24, patch=8, upsample=0.5, vocab=40,
    max_text=9, max_answer=6, encoder_rank=5, attention_rank=4, expert_rank=3, head_hidden=(7,),
    image_channels=(4, 3, 2), text_heads=2, text_cond_heads=4, text_inner=10,
)  # fmt: skip
VILT = dataclasses.replace(
    FLAVA, name="vilt", backbone_layers=(2, 3), head_hidden=(14, 7), head_activation="gelu", head_layer_norm=True,
    position_grid=5,
)  # fmt: skip
CONFIGS = {
    "flava": FLAVA,
    "flava, other choices": dataclasses.replace(
        FLAVA, backbone_layers=(2, 1), condition="paths", qv_delta=False, lora_alpha_ratio=0.7, head_activation="gelu"
    ),
    "vilt": VILT,
    "vilt, other choices": dataclasses.replace(VILT, position="slice", condition="paths", backbone_layers=(1, 2)),
    "flava, standard": dataclasses.replace(FLAVA, backbone="standard", backbone_layers=(2, 1), condition="paths"),
    "vilt, standard, bottlenecks": dataclasses.replace(VILT, backbone="standard", bottleneck=6),
    "flava, bottlenecks": dataclasses.replace(FLAVA, bottleneck=6, backbone_layers=(2, 1)),
    "vilt, bottlenecks": dataclasses.replace(VILT, bottleneck=6),
}


@pytest.fixture(scope="session")
def tokenizer():
    pieces = load_tokenizer("train", ["abcdefgh ijkl mn"], vocab_size=40)
    assert pieces.size == FLAVA.vocab
    return pieces


@pytest.fixture(scope="session")
def exported(tokenizer, tmp_path_factory):
    """`exported(name)`: a model of CONFIGS, its folder, and `folder.jax_outputs` that compiles once for all tests."""

    @functools.cache
    def export(name):
        model = ServerModel(CONFIGS[name], TASKS)
        shapes = jax.eval_shape(model.init, jax.random.key(0))
        frozen, blocks = random_weights(shapes, np.random.default_rng(3))
        head = blocks["head/text_generation"]  # answers that depend on what was said before
        head["wte"], head["ln_f"]["bias"] = 30 * head["wte"], 0.1 * head["ln_f"]["bias"]
        folder = tmp_path_factory.mktemp("export") / "model"
        programs, compiled = {}, folders.jax_outputs

        def outputs(model, task, tokens):
            key = (task.name, *tokens.values())
            if key not in programs:
                programs[key] = compiled(model, task, tokens)
            return programs[key]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(folders, "jax_outputs", outputs)
            difference = folders.write_torch(
                model, frozen, blocks, folder, tokenizer=tokenizer, origin={"client": "client3"}
            )
        return SimpleNamespace(
            model=model, frozen=frozen, blocks=blocks, folder=folder, difference=difference, outputs=outputs
        )

    return export
