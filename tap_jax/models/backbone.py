"""The routed transformer backbone (Sec. 3.1, App. A.2; Chen & Zhang, 2024): MoTE stage, then MoME stage.

All stacks of a stage start from the same pre-trained layers, and all feed-forward experts of a layer from the same
pre-trained FFN, so those weights are stored once, as `frozen`, and every stack and expert is an adapter on them.
The four paths of a modality run as one batch, so the frozen products stay single large ones. Query and value are
treated alike, so their weights lie side by side on an axis of two.

Letters: B samples, T tokens, M = B·T, D width, F inner width of the FFN, R rank, L layers of a stage, P = 4 paths,
r bottleneck.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import Array

from tap_jax.models.attention import attention
from tap_jax.models.bottleneck import init_bottleneck, with_bottleneck
from tap_jax.models.layers import ModelConfig, gelu, layer_norm
from tap_jax.models.lora import Tree, init_lora, lora, stand_in
from tap_jax.models.residuals import inputs_only
from tap_jax.models.token_layout import TokenLayout

SHARED = "shared"
MODALITY_TASK = 2  # in `paths`


@dataclasses.dataclass(frozen=True)
class Path:
    """One of the four routes of a modality through both stages.

    Attributes:
      source: "shared" where the path starts from S = shared_proj(x), else the modality (it starts from x).
      mote_stack, mome_stack: the stack taken in each stage.
      expert: (modality or shared, kind or shared), the expert's pair; MoME names it the other way round.
    """

    source: str
    mote_stack: str
    mome_stack: str
    expert: tuple[str, str]

    @property
    def mote_expert(self) -> str:
        """Block of the feed-forward expert in the MoTE stage."""
        return f"mote/{self.expert[0]}/expert/{self.expert[1]}"

    @property
    def mome_expert(self) -> str:
        """Block of the feed-forward expert in the MoME stage."""
        return f"mome/{self.expert[1]}/expert/{self.expert[0]}"


def paths(modality: str, kind: str) -> tuple[Path, Path, Path, Path]:
    """The four paths of one modality of a task: shared-shared, shared-task, modality-task, modality-shared.

    The last two enter the same stack with the same input, so they share its first attention.
    """
    return (
        Path(SHARED, SHARED, SHARED, (SHARED, SHARED)),
        Path(SHARED, modality, kind, (SHARED, kind)),
        Path(modality, modality, kind, (modality, kind)),
        Path(modality, modality, SHARED, (modality, SHARED)),
    )


def roles(config: ModelConfig, modality: str, kind: str, domain: str) -> dict[str, tuple[str, ...]]:
    """What each part of `run_paths` is made of: "stage/part" -> block names, one per path.

    Bottleneck adapters stand behind feed-forward networks only, so with them the attentions have no part.
    """
    route = paths(modality, kind)
    out = {
        "mote/attention": tuple(f"mote/{path.mote_stack}/attention" for path in route),
        "mote/domain": tuple(f"mote/{path.mote_stack}/domain/{domain}" for path in route),
        "mote/expert": tuple(path.mote_expert for path in route),
        "mome/attention": tuple(f"mome/{path.mome_stack}/attention" for path in route),
        "mome/domain": tuple(f"mome/{path.mome_stack}/domain/{domain}" for path in route),
        "mome/expert": tuple(path.mome_expert for path in route),
    }
    return {part: names for part, names in out.items() if not (config.bottleneck and part.endswith("attention"))}


def init_frozen(key: Array, config: ModelConfig, layers: int) -> Tree:
    """Stand-in for pre-trained weights of `layers` layers, float32: every leaf has a leading layer axis.

    Kernels are as `lora.stand_in` says, biases 0, LayerNorms the identity.

    Returns:
      "norm1", "norm2": {"scale", "bias"} [layers, D]. "key", "out", "fc1", "fc2": {"kernel" [layers, inputs, outputs],
      "bias" [layers, outputs]}; "query_value" likewise with a second axis of two, [layers, 2, ...].
    """
    d, f = config.width, config.mlp
    keys = iter(jax.random.split(key, 5))

    def dense(inputs, outputs, *axes):
        return {
            "kernel": stand_in(d)(next(keys), (layers, *axes, inputs, outputs), jnp.float32),
            "bias": jnp.zeros((layers, *axes, outputs), jnp.float32),
        }

    def norm():
        return {"scale": jnp.ones((layers, d), jnp.float32), "bias": jnp.zeros((layers, d), jnp.float32)}

    return {
        "norm1": norm(),
        "query_value": dense(d, d, 2),
        "key": dense(d, d),
        "out": dense(d, d),
        "norm2": norm(),
        "fc1": dense(d, f),
        "fc2": dense(f, d),
    }


def init_block(key: Array, config: ModelConfig, layers: int, part: str) -> Tree:
    """Adapters of one block, float32, with a leading layer axis; `part` is "attention", "domain" or "expert".

    attention: LoRA on query and value [L, 2, D→D], and with `qv_delta` a full weight [L, 2, D, D] starting at zero.
    domain: the experts E_q and E_v [L, 2, ...]. expert: one feed-forward expert [L, ...]. An expert has LoRA on
    both its linears, or with `bottleneck` an adapter behind them.
    """
    d = config.width
    if config.bottleneck:
        return init_bottleneck(key, d, config.bottleneck, (layers,) if part == "expert" else (layers, 2))

    def attention_adapter(key):
        adapter = init_lora(key, d, d, config.attention_rank)
        return adapter | ({"delta": jnp.zeros((d, d), jnp.float32)} if config.qv_delta else {})

    def expert(key):
        first, second = jax.random.split(key)
        return {
            "fc1": init_lora(first, d, config.mlp, config.expert_rank),
            "fc2": init_lora(second, config.mlp, d, config.expert_rank),
        }

    if part == "expert":
        return jax.vmap(expert)(jax.random.split(key, layers))
    one = attention_adapter if part == "attention" else expert
    return jax.vmap(jax.vmap(one))(jax.random.split(key, (layers, 2)))


def _dense(x: Array, weights: Tree) -> Array:
    return x @ weights["kernel"].astype(x.dtype) + weights["bias"].astype(x.dtype)


def _expert(config: ModelConfig, ffn: Tree, hidden: Array, x: Array, adapter: Tree, key: Array | None) -> Array:
    """One feed-forward expert; `hidden` = x W1 + b1 is the frozen product that experts on equal input share."""
    if config.bottleneck:
        return with_bottleneck(_dense(gelu(hidden), ffn["fc2"]), adapter)
    keys = (None, None) if key is None else jax.random.split(key)
    scale, rate = config.lora_alpha_ratio, config.lora_dropout

    def expert(ffn: Tree, hidden: Array, x: Array, adapter: Tree, keys: tuple) -> Array:
        hidden = hidden + lora(x, adapter["fc1"], scale=scale, rate=rate, key=keys[0])
        hidden = gelu(hidden)
        return _dense(hidden, ffn["fc2"]) + lora(hidden, adapter["fc2"], scale=scale, rate=rate, key=keys[1])

    return inputs_only(expert, x.dtype)({"fc2": ffn["fc2"]}, hidden, x, adapter, keys)


def attention_part(
    config: ModelConfig, layer: Tree, adapters: Tree, domain: Tree, x: Array, mask: Array, key: Array | None
) -> Array:
    """x + Wo attention(q, k, v) with q = Wq(n + E_q(n)), k = Wk n, v = Wv(n + E_v(n)), n = LN1(x).

    Args:
      layer: the frozen layer.
      adapters, domain: one block each, without the layer axis: leaves [2, ...]; no adapters: {}.
      x: [M, D]. mask: bool [B, T] or [B, T, T], see `attention`. key: dropout key or None.

    Returns:
      [M, D].
    """
    expert_keys, lora_key = (None, None) if key is None else (jax.random.split(key), jax.random.fold_in(key, 2))
    n = layer_norm(x, layer["norm1"]["scale"], layer["norm1"]["bias"], config.layer_norm_eps)
    hidden = _dense(n, layer["fc1"])
    expert = jax.vmap(
        lambda adapter, key: _expert(config, layer, hidden, n, adapter, key), in_axes=(0, None if key is None else 0)
    )
    return mix(config, layer, adapters, x, n, n + expert(domain, expert_keys), mask, lora_key)


def mix(
    config: ModelConfig,
    layer: Tree,
    adapters: Tree,
    x: Array,
    n: Array,
    inputs: Array,
    mask: Array,
    key: Array | None,
) -> Array:
    """x + Wo attention(Wq·inputs[0], Wk n, Wv·inputs[1]), Wq and Wv with their adapters.

    Args:
      layer: the frozen layer.
      adapters: LoRA on query and value and, as it may be, a full weight: leaves [2, ...]; {} for none.
      x, n: [M, D]. inputs: [2, M, D]. mask: bool [B, T] or [B, T, T], see `attention`. key: dropout key or None.

    Returns:
      [M, D].
    """
    kernel, bias = (layer["query_value"][name].astype(x.dtype) for name in ("kernel", "bias"))
    if "delta" in adapters:  # W + delta first: one product instead of two
        kernel = kernel + adapters["delta"].astype(x.dtype)
    projected = inputs @ kernel + bias[:, None]
    if adapters:
        projected += lora(inputs, adapters, scale=config.lora_alpha_ratio, rate=config.lora_dropout, key=key)
    q, v = projected
    tokens = (*mask.shape[:2], x.shape[-1])
    q, k, v = (part.reshape(tokens) for part in (q, _dense(n, layer["key"]), v))
    # Under vmap cuDNN's attention takes one mask for all, and JAX cannot give it those of packed sequences.
    implementation = "xla" if config.attention == "cudnn" and mask.ndim == 3 else config.attention
    mixed = attention(q, k, v, mask, heads=config.heads, implementation=implementation)
    return x + _dense(mixed.reshape(x.shape), layer["out"])


def expert_part(config: ModelConfig, layer: Tree, expert: Tree, x: Array, key: Array | None) -> Array:
    """x + Expert(LN2(x)), [M, D].

    Args:
      layer: the frozen layer. expert: one block without the layer axis.
      x: [M, D]. key: dropout key or None.
    """
    n = layer_norm(x, layer["norm2"]["scale"], layer["norm2"]["bias"], config.layer_norm_eps)
    return x + _expert(config, layer, _dense(n, layer["fc1"]), n, expert, key)


def _over_paths(part, config, layer, trees, states, key, *rest):
    """`part` for every path side by side: trees [P, ...], states [P, M, D]."""
    keys = None if key is None else jax.random.split(key, len(states))
    step = lambda trees, state, key: part(config, layer, *trees, state, *rest, key)  # noqa: E731
    return jax.vmap(step, in_axes=(0, 0, None if key is None else 0))(trees, states, keys)


def run_paths(
    config: ModelConfig,
    frozen: Tree,
    parts: Tree,
    x: Array,
    shared: Array,
    layout: TokenLayout,
    *,
    key: Array | None = None,
) -> tuple[Array, Array]:
    """The four paths of one modality through both stages.

    Args:
      frozen: backbone weights with a leading axis over MoTE's and then MoME's layers.
      parts: "stage/part" -> the blocks that `roles` names, stacked over paths: leaves [P, L, ...], L the stage's;
        bottleneck adapters may be of any width. Other entries are not read.
      x, shared: encoder tokens and their shared projection S, [B, T, D]. layout: of these tokens, S samples.
      key: dropout key; None in evaluation.

    Returns:
      Path vectors [P, S, D]: each sample's mean over its real tokens, paths in the order of `paths`. And the latent
      [S, D] that DisentAFL disentangles: the same mean of the modality-task path between the stages.
    """
    if config.lora_dropout == 0 or config.bottleneck:
        key = None
    mote_depth, mome_depth = config.backbone_layers
    mask = layout.mask

    def layer(stage, first, index, states, inputs=None):
        weights = jax.tree.map(lambda leaf: leaf[first + index], frozen)
        attn, domain, expert = (
            jax.tree.map(lambda leaf: leaf[:, index], parts.get(f"{stage}/{part}", {}))
            for part in ("attention", "domain", "expert")
        )
        keys = (None, None) if key is None else jax.random.split(jax.random.fold_in(key, first + index))
        if inputs is None:
            states = _over_paths(attention_part, config, weights, (attn, domain), states, keys[0], mask)
        else:
            # The last two paths enter with the same input and stack: three attentions serve four paths.
            attn, domain = jax.tree.map(lambda leaf: leaf[:3], (attn, domain))
            states = _over_paths(attention_part, config, weights, (attn, domain), inputs, keys[0], mask)
            states = jnp.concatenate([states, states[2:]])
        return _over_paths(expert_part, config, weights, (expert,), states, keys[1])

    width = x.shape[-1]
    x, shared = x.reshape(-1, width), shared.reshape(-1, width)
    wrap = jax.checkpoint if config.remat else lambda layer: layer
    mote, mome = (wrap(functools.partial(layer, *stage)) for stage in (("mote", 0), ("mome", mote_depth)))
    states = mote(0, None, jnp.stack([shared, shared, x]))
    states = _repeat(1, mote_depth, mote, states)
    latent = layout.mean(states[MODALITY_TASK].reshape(*layout.shape, width))
    states = _repeat(0, mome_depth, mome, states)
    return layout.mean(states.reshape(len(states), *layout.shape, width)), latent


def _repeat(start: int, stop: int, body, states: Array) -> Array:
    """`body` for start <= i < stop; a loop only where there is something to loop over."""
    if stop - start <= 1:
        return body(start, states) if stop > start else states
    return jax.lax.scan(lambda s, i: (body(i, s), None), states, jnp.arange(start, stop))[0]
