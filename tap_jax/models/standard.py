"""The standard backbone of the baselines (App. C.4): one plain stack of the pre-trained layers, shared by all clients.

No routing, no domain experts, no shared projection; the frozen weights are those of the routed backbone, its MoTE and
then its MoME layers.

Letters: B samples, T tokens, D width, R rank, L layers, r bottleneck.
"""

import jax
import jax.numpy as jnp
from jax import Array

from tap_jax.models.backbone import expert_part, mix
from tap_jax.models.bottleneck import init_bottleneck
from tap_jax.models.layers import ModelConfig, layer_norm
from tap_jax.models.lora import Tree, init_lora
from tap_jax.models.token_layout import TokenLayout

BLOCK = "backbone"


def init_block(key: Array, config: ModelConfig) -> Tree:
    """The block "backbone", float32: LoRA on query and value [L, 2, D→D] and on both linears of the FFN [L, ...].

    Ranks are those of the routed backbone's attention and experts; `qv_delta` is not for this one. With `bottleneck`
    one adapter behind the FFN of each layer instead, see `init_bottleneck`.
    """
    c, layers = config, sum(config.backbone_layers)
    if c.bottleneck:
        return init_bottleneck(key, c.width, c.bottleneck, (layers,))

    def one(key):
        query_value, first, second = jax.random.split(key, 3)
        pair = jax.vmap(lambda key: init_lora(key, c.width, c.width, c.attention_rank))
        return {
            "query_value": pair(jax.random.split(query_value)),
            "fc1": init_lora(first, c.width, c.mlp, c.expert_rank),
            "fc2": init_lora(second, c.mlp, c.width, c.expert_rank),
        }

    return jax.vmap(one)(jax.random.split(key, layers))


def run_stack(
    config: ModelConfig, frozen: Tree, adapters: Tree, x: Array, layout: TokenLayout, *, key: Array | None = None
) -> Array:
    """The mean of each sample's real tokens behind all layers, [S, D]; 0 where there is none.

    Args:
      frozen: backbone weights, leaves [L, ...].
      adapters: the block "backbone".
      x: encoder tokens of one modality [B, T, D]. layout: of these tokens, S samples.
      key: dropout key; None in evaluation.
    """
    if config.lora_dropout == 0 or config.bottleneck:
        key = None

    def layer(x, step):
        index, weights, adapter = step
        keys = (None, None) if key is None else jax.random.split(jax.random.fold_in(key, index))
        n = layer_norm(x, weights["norm1"]["scale"], weights["norm1"]["bias"], config.layer_norm_eps)
        both = jnp.broadcast_to(n, (2, *n.shape))
        x = mix(config, weights, adapter.get("query_value", {}), x, n, both, layout.mask, keys[0])
        return expert_part(config, weights, adapter, x, keys[1]), None

    steps = jnp.arange(sum(config.backbone_layers)), frozen, adapters
    layer = jax.checkpoint(layer) if config.remat else layer
    states, _ = jax.lax.scan(layer, x.reshape(-1, x.shape[-1]), steps)
    return layout.mean(states.reshape(x.shape))
