"""Runs that start from a checkpoint, end to end: FLAVA, and ViLT with its 4 + 4 layers."""

import jax
import numpy as np
import pytest
import transformers

import tap_jax
from tap_jax.assembly import model_config
from tap_jax.cli import main as cli
from tap_jax.config import config_hash, load_config, to_json
from tap_jax.data.text import load_tokenizer
from tap_jax.errors import UserError
from tap_jax.planning.describe import describe
from tap_jax.planning.outline import outline
from tests.models import huggingface

ROWS = ({"fashion_mnist": 0.5}, {"vqa": 0.5})
VILT = {
    "model.name": "vilt",
    "model.backbone_layers": (4, 4),
    "model.position_grid": 3,
    "model.head_hidden": (12, 8),
    "model.head_activation": "gelu",
    "model.head_layer_norm": True,
}


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    """A tokenizer's folder and its size."""
    folder = tmp_path_factory.mktemp("pieces")
    tokenizer = load_tokenizer("train", ["what the news of a picture say about colours and shapes"], vocab_size=90)
    tokenizer.save(folder)
    return folder, tokenizer.size


@pytest.fixture(scope="module", params=["flava", "vilt"])
def start(request, tiny, pieces, tmp_path_factory):
    """(config, HF model): a tiny run on a random checkpoint of its sizes."""
    folder, size = pieces
    fields = (VILT if request.param == "vilt" else {}) | {
        "data.tokenizer": str(folder),
        "data.cache_dir": str(tmp_path_factory.mktemp("cache")),
        "model.vocab": size,
        "model.weights": str(tmp_path_factory.mktemp("checkpoint")),
        "rounds": 1,
    }
    config = tiny(ROWS, fields)
    sizes = model_config(config)
    if request.param == "vilt":
        model = transformers.ViltForMaskedLM(huggingface.vilt_config(sizes, layers=9))
    else:
        model = transformers.FlavaModel(huggingface.flava_config(sizes, layers=3))
    huggingface.randomise(model, seed=4).save_pretrained(config.model.weights)
    return config, model


def test_a_run_from_a_checkpoint(start):
    """Training starts at the checkpoint; with ViLT, through all stages, it leaves Ŵ alone and ends in results."""
    config, model = start
    experiment = tap_jax.build(config)
    weights = {key.removeprefix("vilt."): tensor.numpy() for key, tensor in model.state_dict().items()}
    frozen = experiment.engine.frozen
    vilt = config.model.name == "vilt"
    words = f"{'embeddings.text_embeddings' if vilt else 'text_model.embeddings'}.word_embeddings.weight"
    last = f"{'encoder.layer.7' if vilt else 'multimodal_model.encoder.layer.1'}.output.dense.weight"
    np.testing.assert_array_equal(frozen["encoder/text"]["words"], weights[words])
    np.testing.assert_array_equal(frozen["backbone"]["fc2"]["kernel"][-1], weights[last].T)
    if not vilt:
        return  # trained in many other tests
    initial = experiment.initial_blocks["encoder/image"]
    np.testing.assert_array_equal(initial["positions"], weights["embeddings.position_embeddings"][0])
    np.testing.assert_array_equal(initial["cls"], weights["embeddings.cls_token"][0, 0])
    before = jax.device_get(frozen)
    state, _ = experiment.round(experiment.init())
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(frozen))
    trained = state.client_models["personal"][0]["encoder/image"]["positions"]
    assert np.abs(trained - initial["positions"]).max() > 1e-4
    rows = experiment.evaluate(experiment.finish(state))
    assert {(row["client"], row["task"]) for row in rows} == {(0, "fashion_mnist"), (1, "vqa")}
    assert all(np.isfinite(row["value"]) for row in rows)


def test_what_does_not_go_together(start):
    config, _ = start
    other = load_copy(config)
    other.data.tokenizer = "train"
    with pytest.raises(UserError, match="data.tokenizer: 'train' makes word pieces that model.weights do not know"):
        tap_jax.build(other)
    other = load_copy(config)
    other.model.mlp = 24
    with pytest.raises(UserError, match="model.mlp: 24, but the checkpoint has 12"):
        tap_jax.build(other)


def load_copy(config):
    other = config.copy_and_resolve_references()
    other.unlock()
    return other


def test_the_command_line_says_it_in_one_line(start, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "8")
    path = tmp_path / "tiny.json"
    path.write_text(to_json(start[0]))
    arguments = [f"--config={path}", f"--config.model.weights={tmp_path}/nowhere", "--config.compilation_cache=off"]
    assert cli.main(["train", *arguments, f"--workdir={tmp_path}/run"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("tap-jax: model.weights: no folder ") and not (tmp_path / "run").exists()


def test_the_paper_s_configs_name_their_checkpoints():
    """Describing them needs neither weights nor network, and random stand-ins are another run."""
    for name, source in (("flava", "facebook/flava-full"), ("vilt", "dandelin/vilt-b32-mlm")):
        config = load_config(f"configs/{name}.py")
        assert config.model.weights == config.data.tokenizer == source
        assert "avg total" in describe(outline(config))
        assert config_hash(config) != config_hash(load_config(f"configs/{name}.py", {"model.weights": ""}))


def test_published_sizes_fit_the_paper_s_configs(tmp_path):
    """The configs of the published checkpoints are their classes' defaults."""
    from tap_jax.models import checkpoints

    for name, kind in (("flava", transformers.FlavaConfig), ("vilt", transformers.ViltConfig)):
        kind().save_pretrained(tmp_path / name)
        checkpoints.check_sizes(tmp_path / name, model_config(load_config(f"configs/{name}.py")))
