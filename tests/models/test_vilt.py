"""ViLT's embeddings against HF's ViltEmbeddings and PEFT: values and gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import torch.nn.functional as F

from tap_jax.errors import UserError
from tap_jax.models import vilt
from tap_jax.models.layers import ModelConfig, bilinear_matrix
from tap_jax.models.server_model import ServerModel
from tap_jax.tasks import find_task
from tests.models import reference
from tests.models.reference import close, variables

pytestmark = pytest.mark.usefixtures("strict")

# No two sizes agree: width, rank, patches a side, positions a side, vocabulary, text positions, words in a text.
CONFIG = ModelConfig(
    name="vilt", width=12, heads=3, image_size=40, patch=8, upsample=0.75, vocab=37, max_text=9, text_positions=11,
    position_grid=3, encoder_rank=4, lora_alpha_ratio=1.5, lora_dropout=0.3,
)  # fmt: skip


def images(count=2):
    return np.random.default_rng(0).standard_normal((count, 64, 64, 3)).astype(np.float32)


def pixels(config, weights):
    """What HF sees: the images behind the trainable adaptor."""
    return reference.adaptor(config, weights["params"]["adaptor"], torch.tensor(images()).permute(0, 3, 1, 2))


@pytest.mark.parametrize("side", [16, 24, 40, 56])  # 2, 3, 5, 7 patches where the table has 3: both ways, and as it is
def test_image_encoder_is_visual_embed(side):
    config = dataclasses.replace(CONFIG, image_size=side)
    encoder = vilt.ImageEncoder(config)
    weights = variables(encoder, images(), None)
    frozen, blocks = ({"encoder/image": weights[kind]} for kind in ("frozen", "params"))
    ours = encoder.apply(weights, images(), None, deterministic=True)
    assert ours.shape == (2, 1 + (side // 8) ** 2, 12)
    close(ours, reference.encode(config, frozen, blocks, "image", {"images": images()}))


def test_hugging_face_shuffles_patches_and_no_more():
    """Its order is random, its set of tokens is not; in raster order it repeats itself."""
    weights = variables(vilt.ImageEncoder(CONFIG), images(), None)
    embeddings = reference.vilt_embeddings(
        CONFIG, {"encoder/image": weights["frozen"]}, {"encoder/image": weights["params"]}
    )
    torch.manual_seed(0)
    shown = pixels(CONFIG, weights)
    mask = torch.ones_like(shown[:, 0])
    first, second = (embeddings.visual_embed(shown, mask, -1)[0] for _ in range(2))
    assert not torch.equal(first, second)
    torch.testing.assert_close(first.sum(1), second.sum(1))
    assert torch.equal(*(reference.visual_embed(embeddings, shown) for _ in range(2)))


def test_text_encoder_is_text_embeddings():
    rng = np.random.default_rng(2)
    tokens = rng.integers(1, CONFIG.vocab, (3, 7)).astype(np.int32)
    tokens[0, 4:], tokens[2, 2:] = 0, 0
    encoder = vilt.TextEncoder(CONFIG)
    weights = variables(encoder, tokens, tokens != 0)
    frozen, blocks = ({"encoder/text": weights[kind]} for kind in ("frozen", "params"))
    ours = encoder.apply(weights, tokens, tokens != 0, deterministic=True)
    close(ours, reference.encode(CONFIG, frozen, blocks, "text", {"tokens": tokens}))


def test_modality_types_are_all_that_hugging_face_adds():
    """ViltEmbeddings.forward is the two parts that we compute, plus one vector per modality that we leave out."""
    rng = np.random.default_rng(3)
    tokens = rng.integers(1, CONFIG.vocab, (2, 7)).astype(np.int32)
    text, image = vilt.TextEncoder(CONFIG), vilt.ImageEncoder(CONFIG)
    weights = {"text": variables(text, tokens, tokens != 0), "image": variables(image, images(), None)}
    frozen = {f"encoder/{m}": tree["frozen"] for m, tree in weights.items()}
    embeddings = reference.vilt_embeddings(CONFIG, frozen, {"encoder/image": weights["image"]["params"]})
    shown, ids, mask = pixels(CONFIG, weights["image"]), torch.tensor(tokens).long(), torch.ones(2, 7)
    with torch.no_grad():
        embeddings.token_type_embeddings.weight.normal_()
        whole, _ = embeddings(ids, mask, None, shown, torch.ones_like(shown[:, 0]), None, None)
        types = embeddings.token_type_embeddings.weight
        torch.testing.assert_close(whole[:, :7], embeddings.text_embeddings(ids) + types[0])
        expected = reference.visual_embed(embeddings, shown) + types[1]
    torch.testing.assert_close(whole[:, 7], expected[:, 0])
    torch.testing.assert_close(whole[:, 8:].sum(1), expected[:, 1:].sum(1))


def test_gradients_of_the_patch_projection_equal_peft():
    """LoRA on a convolution is one of the same kernel to R channels, then a 1×1: values, and gradients of A and B."""
    encoder = vilt.ImageEncoder(CONFIG)
    weights = variables(encoder, images(), None)
    frozen, params = weights["frozen"], weights["params"]
    upstream = np.random.default_rng(4).standard_normal((2, 26, 12)).astype(np.float32)

    @jax.jit
    def run(params):
        apply = lambda p: encoder.apply({"params": p, "frozen": frozen}, images(), None, deterministic=True)  # noqa: E731
        ours, pullback = jax.vjp(apply, params)
        return ours, pullback(jnp.asarray(upstream))[0]

    ours, gradient = run(params)
    rank = CONFIG.encoder_rank
    embeddings = reference.vilt_embeddings(CONFIG, {"encoder/image": frozen}, {"encoder/image": params})
    lora = peft.LoraConfig(
        r=rank, lora_alpha=CONFIG.lora_alpha_ratio * rank, target_modules=["projection"], lora_dropout=0.3
    )
    adapted = peft.get_peft_model(embeddings, lora).eval().base_model.model
    projection = adapted.patch_embeddings.projection
    a, b = projection.lora_A["default"].weight, projection.lora_B["default"].weight
    assert (a.shape, b.shape) == ((rank, 3, 8, 8), (12, rank, 1, 1))
    reference.fill(a, params["patch"]["lora"]["a"].T.reshape(a.shape))
    reference.fill(b, params["patch"]["lora"]["b"].T.reshape(b.shape))
    for trained in (adapted.cls_token, adapted.position_embeddings):
        trained.requires_grad_(True)
    theirs = reference.output(params["output"], reference.visual_embed(adapted, pixels(CONFIG, weights)))
    close(ours, theirs)
    (theirs * torch.tensor(upstream)).sum().backward()
    for mine, parameter in (
        (gradient["patch"]["lora"]["a"].T.reshape(a.shape), a),
        (gradient["patch"]["lora"]["b"].T.reshape(b.shape), b),
        (gradient["cls"][None, None], adapted.cls_token),
        (gradient["positions"][None], adapted.position_embeddings),
    ):
        assert parameter.grad.abs().max() > 1e-3
        close(mine, parameter.grad, 1e-4)


@pytest.mark.parametrize(("size", "target"), [(12, 7), (3, 5), (4, 4), (5, 1), (2, 9)])
def test_corners_stay_corners(size, target):
    table = np.random.default_rng(size).standard_normal((1, 4, size, size))
    theirs = F.interpolate(torch.tensor(table), size=(target, target), mode="bilinear", align_corners=True)
    matrix = bilinear_matrix(size, target, align_corners=True)
    close(np.einsum("ph,qw,bchw->bcpq", matrix, matrix, table), theirs)


def test_sliced_positions_are_the_top_left_corner():
    table = np.arange(1 + 9, dtype=np.float32)[:, None]
    sliced = vilt.position_table(jnp.asarray(table), 2, "slice")
    assert sliced[:, 0].tolist() == [0, 1, 2, 4, 5]


def test_text_positions_are_the_checkpoint_s_or_as_many_as_needed():
    model = ServerModel(dataclasses.replace(CONFIG, text_heads=2, text_cond_heads=2), [find_task("ag_news")])
    shapes = jax.eval_shape(model.init, jax.random.key(0))[0]
    assert shapes["encoder/text"]["positions"].shape == (11, 12)
    assert dataclasses.replace(CONFIG, text_positions=0).text_rows == 9
    with pytest.raises(UserError, match="unknown 'clip'"):
        ServerModel(dataclasses.replace(CONFIG, name="clip"), [find_task("ag_news")])
