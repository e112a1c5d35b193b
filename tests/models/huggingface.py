"""Random Hugging Face checkpoints, and one transformer layer in our order built from HF's own modules."""

import math

import torch
import transformers

from tap_jax.models.layers import ModelConfig

torch.set_num_threads(1)  # tiny tensors


def randomise(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Values such that nothing hides behind a 0 or a 1; matrices keep the signal's size."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            if name.lower().endswith("norm.weight") or "layernorm" in name and name.endswith("weight"):
                parameter.copy_(1 + 0.3 * values)
            else:
                fan_in = math.prod(parameter.shape[1:]) if parameter.ndim in (2, 4) else 10
                parameter.copy_(values / math.sqrt(fan_in))
    return model.eval()


def flava_config(c: ModelConfig, *, layers: int, codebook_blocks: int = 2) -> transformers.FlavaConfig:
    """FLAVA of our sizes, with `layers` multimodal layers and a small codebook."""
    common = dict(hidden_size=c.width, num_attention_heads=c.heads, intermediate_size=c.mlp)
    return transformers.FlavaConfig(
        image_config=common
        | dict(num_hidden_layers=c.image_layers, image_size=c.image_size, patch_size=c.patch, vocab_size=9),
        text_config=common
        | dict(num_hidden_layers=c.text_layers, vocab_size=c.vocab, max_position_embeddings=c.text_rows),
        multimodal_config=common | dict(num_hidden_layers=layers),
        image_codebook_config=dict(hidden_size=8, vocab_size=9, num_blocks_per_group=codebook_blocks),
        hidden_size=c.width,
        projection_dim=6,
    )


def vilt_config(c: ModelConfig, *, layers: int) -> transformers.ViltConfig:
    """ViLT of our sizes."""
    return transformers.ViltConfig(
        hidden_size=c.width,
        num_attention_heads=c.heads,
        intermediate_size=c.mlp,
        num_hidden_layers=layers,
        image_size=c.position_grid * c.patch,
        patch_size=c.patch,
        vocab_size=c.vocab,
        max_position_embeddings=c.text_rows,
    )


def routed_layer(layer: torch.nn.Module, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """A FlavaLayer or ViltLayer with q and v reading n + FFN(n), as the backbone does while all adapters are zero."""

    def feed_forward(n):
        return layer.output.dense(layer.intermediate(n))

    attention = layer.attention.attention
    n = layer.layernorm_before(x)
    expert = n + feed_forward(n)
    heads = (attention.num_attention_heads, attention.attention_head_size)
    q, k, v = (
        linear(y).unflatten(-1, heads).transpose(1, 2)
        for linear, y in ((attention.query, expert), (attention.key, n), (attention.value, expert))
    )
    scores = q @ k.transpose(-1, -2) / math.sqrt(heads[1])
    scores = scores.masked_fill(~mask[:, None, None, :], -torch.inf)
    x = x + layer.attention.output.dense((scores.softmax(-1) @ v).transpose(1, 2).flatten(-2))
    return x + feed_forward(layer.layernorm_after(x))
