"""Hugging Face's FlavaModel or ViltModel with a client's weights, and how far its encoders are from the JAX model's."""

import contextlib
from collections.abc import Iterator, Mapping

import jax
import numpy as np
import torch
import transformers

from tap_jax.blocks import Blocks, Tree
from tap_jax.errors import UserError
from tap_jax.models import checkpoints
from tap_jax.models.checkpoint_sizes import check_sizes, huggingface_config
from tap_jax.models.layers import ModelConfig
from tap_jax.models.server_model import ServerModel
from tap_jax.models.vilt import position_table
from tap_jax.models.weight_tables import to_huggingface

TOLERANCE = 1e-4  # of the largest output; what is further off is not written
CLASSES = {"flava": transformers.FlavaModel, "vilt": transformers.ViltModel}


def encoders(model: ServerModel) -> tuple[str, ...]:
    """The modalities that the model's tasks have."""
    return tuple(m for m in ("image", "text") if f"encoder/{m}" in model.block_names)


def refuse_bottlenecks(model: ServerModel, format: str) -> None:
    """Raises UserError where an encoder has bottleneck adapters: Hugging Face's models have no place for them."""
    if any(name.startswith("encoder/") for name in model.adapter_blocks):
        raise UserError(f"format: '{format}' has no place for the bottleneck adapters of feddat; export as torch")


def merge(config: ModelConfig, frozen: Tree, blocks: Blocks) -> dict[str, Tree]:
    """Ŵ with the encoders' LoRA added in: W + alpha / rank · A B; all other leaves are those given.

    Args:
      frozen, blocks: host arrays; of the blocks those of encoders are read.
    """

    def merged(weights: Tree, adapters: Tree) -> Tree:
        out = dict(weights)
        for name, value in adapters.items():
            if name == "lora":
                out["kernel"] = weights["kernel"] + np.float32(config.lora_alpha_ratio) * (value["a"] @ value["b"])
            elif isinstance(value, Mapping) and name in weights:
                out[name] = merged(weights[name], value)
        return out

    mine = {name for name in blocks if name.startswith("encoder/")}
    return {name: merged(tree, blocks[name]) if name in mine else tree for name, tree in frozen.items()}


def build(model: ServerModel, frozen: Tree, blocks: Blocks, source: str | None) -> tuple[torch.nn.Module, list[str]]:
    """FlavaModel or ViltModel with our weights.

    Args:
      frozen: Ŵ, with LoRA merged or without; host arrays.
      blocks: "encoder/image" of ViLT holds CLS and positions; without it they are the source's, or HF's initial ones.
      source: the checkpoint that the run started from (folder or hub id), for the weights that our model does not
        store; None for none.

    Returns:
      The model in float32 and eval mode, and the names of its weights that are in neither and therefore at HF's
      initial values.

    Raises:
      UserError: `source` cannot be had or read, or has other sizes.
    """
    c = model.config
    rest = {}
    if source is None:
        config = _config(c)
    else:
        folder = checkpoints.find(source)
        check_sizes(folder, c)
        config, rest = huggingface_config(folder), checkpoints.read(folder, c.name)
    if c.name == "vilt" and c.position == "slice" and "encoder/image" in blocks:
        # HF interpolates to the image's grid; a table of that grid stays as it is.
        config.image_size = c.image_size
        image = blocks["encoder/image"]
        table = np.asarray(position_table(image["positions"], c.image_size // c.patch, "slice"))
        blocks = {**blocks, "encoder/image": image | {"positions": table}}
    theirs = CLASSES[c.name](config).eval()
    wanted = theirs.state_dict()
    ours = to_huggingface(c.name, frozen, blocks)
    with torch.no_grad():
        for key, target in wanted.items():
            if key in ours:
                target.copy_(torch.from_numpy(np.array(ours[key])))
            elif key in rest:
                target.copy_(torch.from_numpy(np.array(rest[key].read(), np.float32)))
    return theirs, [key for key in wanted if key not in ours and key not in rest]


def check_source(model: ServerModel, frozen: Tree, source: str) -> None:
    """Compares Ŵ with the checkpoint that it should come from.

    Raises:
      UserError: a weight that differs or is missing there; the message names it. Or `source` cannot be had or read.
    """
    theirs = checkpoints.read(checkpoints.find(source), model.config.name)
    for key, value in to_huggingface(model.config.name, frozen, {}).items():
        if key not in theirs or not np.array_equal(np.asarray(theirs[key].read(), np.float32), value):
            raise UserError(f"export: '{key}' in {source} is not what the run has; name the checkpoint it started from")


def _config(c: ModelConfig) -> transformers.PreTrainedConfig:
    common = dict(
        hidden_size=c.width, num_attention_heads=c.heads, intermediate_size=c.mlp, layer_norm_eps=c.layer_norm_eps
    )
    text = dict(vocab_size=c.vocab, max_position_embeddings=c.text_rows)
    layers = dict(num_hidden_layers=sum(c.backbone_layers))
    if c.name == "vilt":
        grid = dict(image_size=c.position_grid * c.patch, patch_size=c.patch)
        return transformers.ViltConfig(**common, **text, **layers, **grid)
    return transformers.FlavaConfig(
        image_config=common | dict(num_hidden_layers=c.image_layers, image_size=c.image_size, patch_size=c.patch),
        text_config=common | text | dict(num_hidden_layers=c.text_layers),
        multimodal_config=common | layers,
        hidden_size=c.width,
        projection_dim=c.width,
        layer_norm_eps=c.layer_norm_eps,
    )


def differences(model: ServerModel, frozen: Tree, blocks: Blocks, theirs: torch.nn.Module) -> dict[str, float]:
    """Runs both models' encoders on a random batch: three images, three texts of different lengths.

    HF's tower stands between the client's image adaptor (in JAX) and its output projection (in NumPy).

    Args:
      model: computing in float32.
      frozen, blocks: of the JAX model, LoRA unmerged.
      theirs: FlavaModel or ViltModel, or one with PEFT's adapters in it.

    Returns:
      Modality -> the largest difference of a real token, relative to the largest output.

    Raises:
      UserError: one is above `TOLERANCE`, or no number.
    """
    c, rng, found = model.config, np.random.default_rng(0), {}
    images = rng.standard_normal((3, 64, 64, 3)).astype(np.float32)
    length = min(c.max_text, 23)
    tokens = rng.integers(1, c.vocab, (3, length)).astype(np.int32)
    mask = np.arange(length) < np.array([[length], [max(1, length // 2)], [1]])
    tokens[~mask] = 0
    with torch.no_grad(), jax.default_matmul_precision("highest"):
        for modality in encoders(model):
            block = blocks[f"encoder/{modality}"]
            if modality == "image":
                pixels = torch.from_numpy(np.array(model.adapt(block, images), np.float32)).permute(0, 3, 1, 2)
                states, real = _image_states(c.name, theirs, pixels), slice(None)
                ours = model.encode("image", frozen, block, images, None)
            else:
                states, real = _text_states(c.name, theirs, torch.from_numpy(tokens).long(), mask), mask
                ours = model.encode("text", frozen, block, tokens, mask)
            ours, output = np.asarray(ours, np.float32)[real], _project(block["output"], states.numpy())[real]
            difference = float(np.abs(ours - output).max() / np.abs(ours).max())
            if not difference <= TOLERANCE:
                raise UserError(
                    f"export: the {modality} encoder that was written differs from the JAX model by {difference:.2g} of"
                    f" its largest output, more than {TOLERANCE:g}; nothing was written"
                )
            found[modality] = difference
    return found


def _image_states(name: str, theirs: torch.nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    if name == "flava":
        return theirs.image_model(pixel_values=pixels).last_hidden_state
    states, _, (index, (_, columns)) = theirs.embeddings.visual_embed(pixels, torch.ones_like(pixels[:, 0]), -1)
    # HF shuffles the patches; this puts them back in raster order.
    order = (index[..., 0] * columns + index[..., 1]).argsort(1)
    patches = torch.gather(states[:, 1:], 1, order[..., None].expand(-1, -1, states.shape[-1]))
    return torch.cat([states[:, :1], patches], 1)


def _text_states(name: str, theirs: torch.nn.Module, tokens: torch.Tensor, mask: np.ndarray) -> torch.Tensor:
    if name == "flava":
        return theirs.text_model(input_ids=tokens, attention_mask=torch.from_numpy(mask).long()).last_hidden_state
    return theirs.embeddings.text_embeddings(tokens)


def _project(weights: Tree, x: np.ndarray) -> np.ndarray:
    """The trainable Linear + LayerNorm behind an encoder."""
    x = x @ weights["linear"]["kernel"] + weights["linear"]["bias"]
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-5) * weights["scale"] + weights["bias"]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the progress bars of transformers."""
    logging = transformers.utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
