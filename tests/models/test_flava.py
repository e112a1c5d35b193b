"""Encoders, adaptors and the resize against HF's FLAVA, PEFT and torch: values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import torch.nn.functional as F

from tap_jax.models import flava
from tap_jax.models.layers import InputAdaptor, ModelConfig, resize
from tests.models import reference
from tests.models.reference import close, variables

pytestmark = pytest.mark.usefixtures("strict")

# No two sizes agree: width, inner width, rank, tokens (odd), vocabulary.
CONFIG = ModelConfig(
    width=12, heads=3, mlp=20, image_layers=2, text_layers=3, image_size=32, patch=8, upsample=0.75, vocab=37,
    max_text=11, encoder_rank=5, lora_alpha_ratio=1.5, lora_dropout=0.3,
)  # fmt: skip


def text_batch():
    rng = np.random.default_rng(2)
    tokens = rng.integers(1, CONFIG.vocab, (3, 7)).astype(np.int32)
    tokens[0, 4:], tokens[2, 2:] = 0, 0
    return tokens, tokens != 0


def test_image_encoder_is_hf_flava():
    images = np.random.default_rng(0).standard_normal((2, 64, 64, 3)).astype(np.float32)
    encoder = flava.ImageEncoder(CONFIG)
    weights = variables(encoder, images, None)
    ours = jax.jit(lambda w: encoder.apply(w, images, None, deterministic=True))(weights)
    batch = {"images": images}
    frozen, blocks = ({"encoder/image": weights[kind]} for kind in ("frozen", "params"))
    assert ours.shape == (2, 17, CONFIG.width)
    close(ours, reference.encode(CONFIG, frozen, blocks, "image", batch))


@pytest.mark.parametrize("modality", ["text", "image"])
def test_encoder_is_hf_flava_with_peft(modality):
    """LoRA unmerged, through PEFT itself: values, and gradients of A and B."""
    rng = np.random.default_rng(3)
    if modality == "text":
        encoder, (inputs, mask) = flava.TextEncoder(CONFIG), text_batch()
        real = mask
    else:
        encoder, inputs, mask = flava.ImageEncoder(CONFIG), rng.standard_normal((3, 64, 64, 3)).astype(np.float32), None
        real = np.ones((3, 17), bool)
    weights = variables(encoder, inputs, mask)
    frozen, params = weights["frozen"], weights["params"]
    upstream = rng.standard_normal((*real.shape, CONFIG.width)).astype(np.float32) * real[..., None]

    @jax.jit
    def run(params):
        apply = lambda p: encoder.apply({"params": p, "frozen": frozen}, inputs, mask, deterministic=True)  # noqa: E731
        ours, pullback = jax.vjp(apply, params)
        return ours, pullback(jnp.asarray(upstream))[0]

    ours, gradient = run(params)

    rank = CONFIG.encoder_rank
    lora = peft.LoraConfig(
        r=rank, lora_alpha=CONFIG.lora_alpha_ratio * rank, target_modules=["query", "value"], lora_dropout=0.3
    )
    tower = getattr(reference, f"{modality}_tower")(CONFIG, frozen)
    tower = peft.get_peft_model(tower, lora).eval()
    adapters = {}
    for i, layer in enumerate(tower.base_model.model.encoder.layer):
        for name in ("query", "value"):
            module = getattr(layer.attention.attention, name)
            for letter, linear in (("a", module.lora_A["default"]), ("b", module.lora_B["default"])):
                reference.fill(linear.weight, params["layers"][name]["lora"][letter][i].T)
                adapters[i, name, letter] = linear.weight
    if modality == "text":
        states = tower(input_ids=torch.tensor(inputs).long(), attention_mask=torch.tensor(mask).long())
    else:
        pixels = reference.adaptor(CONFIG, params["adaptor"], torch.tensor(inputs).permute(0, 3, 1, 2))
        states = tower(pixel_values=pixels)
    theirs = reference.output(params["output"], states.last_hidden_state)
    close(np.asarray(ours)[real], theirs.detach().numpy()[real])
    (theirs * torch.tensor(upstream)).sum().backward()
    for (i, name, letter), weight in adapters.items():
        assert weight.grad.abs().max() > 1e-3
        close(gradient["layers"][name]["lora"][letter][i], weight.grad.T, 1e-4)


def test_padding_does_not_reach_the_text():
    tokens, mask = text_batch()
    encoder = flava.TextEncoder(CONFIG)
    weights = variables(encoder, tokens, mask)
    whole = encoder.apply(weights, tokens, mask, deterministic=True)
    alone = encoder.apply(weights, tokens[2:, :2], mask[2:, :2], deterministic=True)
    np.testing.assert_allclose(whole[2, :2], alone[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("size", "target"), [(64, 128), (128, 224), (64, 16), (24, 32), (7, 7), (5, 13), (13, 5)])
def test_resize_is_torch_interpolate(size, target):
    images = np.random.default_rng(size).standard_normal((2, size, size, 3)).astype(np.float32)
    theirs = F.interpolate(  # in float64: torch's float32 coordinates are off by 1e-5 themselves
        torch.tensor(images).double().permute(0, 3, 1, 2), size=(target, target), mode="bilinear", align_corners=False
    )
    close(np.asarray(resize(jnp.asarray(images), target)), theirs.permute(0, 2, 3, 1), 1e-5)


def test_input_adaptor_is_torch_conv2d():
    images = np.random.default_rng(4).standard_normal((2, 64, 64, 3)).astype(np.float32)
    module = InputAdaptor(CONFIG)
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), images))
    weights = jax.device_get(reference.random_weights(shapes, np.random.default_rng(5)))
    theirs = reference.adaptor(CONFIG, weights["params"], torch.tensor(images).permute(0, 3, 1, 2))
    close(np.asarray(module.apply(weights, images)), theirs.permute(0, 2, 3, 1))
