"""launch/pretrain.py: from nothing to a checkpoint that a run reads, on drawn data and on a folder."""

import contextlib
import csv
import importlib.util
import io
import json
import pathlib
import re
from unittest import mock

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from tap_jax.config import default_config
from tap_jax.models import checkpoints
from tap_jax.models.layers import ModelConfig

ROOT = pathlib.Path(__file__).parents[1]
TINY = ["--steps=4", "--minutes=5", "--width=8", "--heads=2", "--mlp=12", "--vocab=200", "--pool=40", "--batch=8"]
SIZES = {"width": 8, "heads": 2, "mlp": 12, "patch": 8, "text_positions": 64}
IMAGES = {"flava": {"image_size": 32}, "vilt": {"position_grid": 4}}


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("pretrain", ROOT / "launch" / "pretrain.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    # What the samples are worth is no matter here.
    module.PROBE_SIZE, module.PROBE_SHOTS, module.PROBE_REPEATS = 120, (2, 4), 2
    module.PENALTIES = np.array([0.01, 1.0])
    return module


@pytest.fixture(scope="module", params=["flava", "vilt"])
def made(request, script, tmp_path_factory):
    """The model's name, the folder, and what was printed."""
    out, printed = tmp_path_factory.mktemp(request.param) / "out", io.StringIO()
    with mock.patch.object(torch, "set_num_threads") as asked, contextlib.redirect_stdout(printed):
        assert script.main([request.param, f"--out={out}", *TINY]) == 0
    asked.assert_not_called()
    return request.param, out, printed.getvalue()


@pytest.fixture
def no_probe(script, monkeypatch):
    """The features are made, but nothing is fitted to them, which takes longer than so short a training."""
    monkeypatch.setattr(script, "accuracy", lambda x, labels, shots: 0.5)
    monkeypatch.setattr(script, "explained", lambda x, y, shots: 0.5)


def test_a_run_can_read_it(made):
    name, out, _ = made
    fields = checkpoints.model_fields(out)
    assert fields | SIZES | IMAGES[name] | {"name": name} == fields
    config = ModelConfig(**fields, max_text=64)
    checkpoints.check_sizes(out, config)
    assert f"{fields['vocab']} word pieces" in (out / "README.md").read_text()


def test_what_to_set_is_printed(made):
    name, out, printed = made
    printed = printed.splitlines()[-1].split()
    fields = dict(field.removeprefix("--config.").split("=") for field in printed)
    config = default_config()
    config.model.name = name
    assert fields.pop("data.tokenizer") == fields.pop("model.weights") == str(out)
    for field, value in fields.items():
        config.model[field.removeprefix("model.")] = int(value)
    config.model.backbone_layers = (1, 1)
    names = {field.name for field in ModelConfig.__dataclass_fields__.values()} & set(config.model)
    checkpoints.check_sizes(out, ModelConfig(**{field: config.model[field] for field in names}))


def test_losses_and_probe_are_left_beside_it(made):
    name, out, _ = made
    with open(out / "losses.csv") as file:
        lines = list(csv.DictReader(file))
    wanted = {"flava": ["mim", "mlm", "mmm_image", "mmm_text", "itm", "global_contrastive"]}
    assert list(lines[0]) == ["step", *wanted.get(name, ["captions", "sentences"])]
    assert lines[-1]["step"] == "4" and all(np.isfinite(float(value)) for value in lines[-1].values())
    assert Image.open(out / "losses.png").size[0] == 700
    found = json.loads((out / "probe.json").read_text())
    assert set(found["random"]) == set(found["trained"]) and len(found["random"]) == 8
    assert all(set(by_shots) == {"2", "4"} for scores in found.values() for by_shots in scores.values())


def test_same_seed_same_weights(made, no_probe, script, tmp_path):
    """And they do not depend on what the probe finds."""
    name, out, _ = made
    script.main([name, f"--out={tmp_path / 'again'}", *TINY])
    script.main([name, f"--out={tmp_path / 'other'}", *TINY, "--seed=1"])
    folders = (out, tmp_path / "again", tmp_path / "other")
    first, again, other = ((folder / "model.safetensors").read_bytes() for folder in folders)
    assert first == again != other


def test_learning_lowers_the_losses(no_probe, script, tmp_path):
    script.main(["vilt", f"--out={tmp_path / 'out'}", *TINY, "--steps=150", "--width=16", "--learning-rate=1e-2"])
    with open(tmp_path / "out" / "losses.csv") as file:
        lines = list(csv.DictReader(file))
    assert float(lines[-1]["captions"]) < 0.8 * float(lines[0]["captions"])


# --- a folder ------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "data" / "sub").mkdir(parents=True)
    for number in range(6):
        place = tmp_path / "data" / ("sub" if number % 2 else "") / f"{number}.png"
        Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(place)
        if number < 4:
            place.with_suffix(".txt").write_text(f"picture number {number}\n\nthe same in other words\n")
    (tmp_path / "data" / "news.txt").write_text("first sentence\nsecond sentence, a longer one\n")
    return tmp_path / "data"


def test_a_folder_of_ones_own(no_probe, script, folder, tmp_path):
    out = tmp_path / "out"
    assert script.main(["flava", f"--out={out}", f"--data={folder}", *TINY, "--codes=4"]) == 0
    card = (out / "README.md").read_text()
    assert "6 pictures, 8 captions, 2 sentences" in card
    vocabulary = (out / "vocab.txt").read_text().split()
    assert "picture" in vocabulary and "sentence" in vocabulary


def test_captions_go_with_their_pictures(script, folder, tmp_path):
    chosen = type("Chosen", (), {"image_size": 32})
    texts = script.read_folder(folder, chosen)
    for caption, shown in zip(texts.captions[::2], texts.shown[::2], strict=True):
        number = caption.split()[-1]
        (path,) = folder.rglob(f"{number}.png")
        image = np.asarray(Image.open(path).convert("RGB").resize((64, 64), Image.Resampling.BILINEAR))
        torch.testing.assert_close(texts.images[shown], script.pixels(image[None], 32)[0])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: [path.unlink() for path in folder.rglob("*.png")], "--data: no .png, .jpg, .jpeg in"),
        (lambda folder: [path.unlink() for path in folder.rglob("[0-9].txt")], "--data: no captions in"),
        (lambda folder: (folder / "0.png").write_bytes(b"no picture"), "--data: .*0.png: unreadable image"),
    ],
)
def test_a_folder_that_will_not_do(script, folder, tmp_path, capsys, spoil, message):
    spoil(folder)
    assert script.main(["flava", f"--out={tmp_path / 'out'}", f"--data={folder}", *TINY]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_nothing_is_overwritten(script, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert script.main(["flava", f"--out={tmp_path}", *TINY]) == 2
    assert "is not empty" in capsys.readouterr().err


# --- its parts -----------------------------------------------------------------------------------------------------


def test_masking_is_berts(script):
    torch.manual_seed(0)
    data = type("Data", (), {"mask": 4, "vocab": 50})
    tokens = torch.randint(5, 50, (400, 30))
    tokens[:, 0], tokens[:, 25:] = 2, 0
    masked, labels = script.masked_words(tokens, data)
    words = labels != -100
    assert torch.equal(words, (torch.arange(30) > 0) & (torch.arange(30) < 25) & (tokens != 0))
    assert torch.equal(labels[words], tokens[words]) and torch.equal(masked[~words], tokens[~words])
    hidden, other = masked == 4, (masked != 4) & (masked != tokens)
    assert abs(hidden[words].float().mean() - 0.8 * script.MASKED_WORDS) < 0.02
    assert abs(other[words].float().mean() - 0.1 * script.MASKED_WORDS * 44 / 45) < 0.01


def test_the_adaptor_is_tap_jax_s(script, monkeypatch):
    """Same operations as `InputAdaptor`, and weights of the same spread."""
    import jax

    from tap_jax.models.layers import InputAdaptor

    images = np.random.default_rng(0).standard_normal((2, 32, 32, 3)).astype(np.float32)
    c = ModelConfig(image_size=32, upsample=1.0)
    ours = InputAdaptor(c)
    spreads = [ours.init(jax.random.key(k), images)["params"]["conv3"].std() for k in range(5)]
    drawn = []
    original = torch.nn.functional.conv2d
    monkeypatch.setattr(script.F, "conv2d", lambda x, w, **kw: (drawn.append(w), original(x, w, **kw))[1])
    torch.manual_seed(0)
    seen = torch.tensor(images).permute(0, 3, 1, 2)
    while not drawn:
        made = script.seen_through_adaptor(seen)
    first, second = drawn
    params = {
        "conv3": first.permute(2, 3, 1, 0).numpy(),
        "conv1": second[:, :, 0, 0].T.numpy(),
        "bias1": np.zeros(3, np.float32),
    }
    np.testing.assert_allclose(ours.apply({"params": params}, images), made.permute(0, 2, 3, 1), atol=1e-5)
    assert abs(first.std() / np.mean(spreads) - 1) < 0.3


def test_probe_fits_what_is_linear_and_nothing_else(script):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((600, 4))
    labels = (x[:, 0] > 0).astype(int)
    noise = rng.integers(0, 2, len(x))
    assert script.accuracy(x, labels, 20) > 0.85 > 0.65 > script.accuracy(x, noise, 20)
    assert script.explained(x, x[:, :2] @ rng.standard_normal((2, 3)), 20) > 0.8
    assert script.explained(x, rng.standard_normal((len(x), 3)), 20) < 0.1


def test_vilt_reads_a_text_as_if_there_were_no_picture(script):
    """The empty image token is left out by the attention: its values make no difference."""
    chosen = type("C", (), dict(width=8, heads=2, mlp=12, fusion_layers=2, image_size=32, patch=8, max_text=16))
    model = script.vilt(chosen, 30).eval()
    tokens = torch.tensor([[2, 7, 8, 3, 0], [2, 9, 3, 0, 0]])
    inputs = script.without_picture(model, tokens)
    plain = model(tokens, **inputs).logits
    other = model(tokens, **inputs | {"image_embeds": torch.randn(2, 1, 8)}).logits
    torch.testing.assert_close(plain, other)
    assert isinstance(model, transformers.ViltForMaskedLM)
