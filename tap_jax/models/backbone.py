"""The routed transformer backbone (Sec. 3.1, App. A.2; Chen & Zhang, 2024): MoTE stage, then MoME stage.

All stacks of a stage start from the same pre-trained layers, and all feed-forward experts of a layer from the same
pre-trained FFN, so those weights are stored once, as `frozen`, and every stack and expert is an adapter on them.
The up to four paths of a modality run as one batch: the frozen products stay single large ones.

Letters: B samples, T tokens, D width, F inner width of the FFN, R rank, L layers of a stage, P paths.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

from tap_jax.models.layers import ModelConfig, attention, layer_norm
from tap_jax.models.lora import Tree, init_lora, lora

SHARED = "shared"


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
    """The four paths of one modality of a task of that kind: shared-shared, shared-task, modality-task, modality-shared.

    The last two enter the same stack with the same input, so they share its first attention.
    """
    return (
        Path(SHARED, SHARED, SHARED, (SHARED, SHARED)),
        Path(SHARED, modality, kind, (SHARED, kind)),
        Path(modality, modality, kind, (modality, kind)),
        Path(modality, modality, SHARED, (modality, SHARED)),
    )


def path_blocks(modality: str, kind: str, domain: str) -> tuple[str, ...]:
    """Names of the backbone blocks that the four paths touch, without repetition."""
    names = []
    for path in paths(modality, kind):
        names += [f"mote/{path.mote_stack}/attention", f"mote/{path.mote_stack}/domain/{domain}", path.mote_expert]
        names += [f"mome/{path.mome_stack}/attention", f"mome/{path.mome_stack}/domain/{domain}", path.mome_expert]
    return tuple(dict.fromkeys(names))


def init_frozen(key: Array, config: ModelConfig, layers: int) -> Tree:
    """Stand-in for pre-trained weights of `layers` layers: every leaf has a leading layer axis.

    Matrices are N(0, 0.02²) as in BERT's initialisation; a checkpoint replaces them.
    """
    d, f = config.width, config.mlp
    keys = iter(jax.random.split(key, 6))

    def dense(inputs, outputs):
        return {
            "kernel": 0.02 * jax.random.normal(next(keys), (layers, inputs, outputs), jnp.float32),
            "bias": jnp.zeros((layers, outputs), jnp.float32),
        }

    def norm():
        return {"scale": jnp.ones((layers, d), jnp.float32), "bias": jnp.zeros((layers, d), jnp.float32)}

    return {
        "norm1": norm(),
        **{name: dense(d, d) for name in ("query", "key", "value", "out")},
        "norm2": norm(),
        "fc1": dense(d, f),
        "fc2": dense(f, d),
    }


def init_block(key: Array, config: ModelConfig, layers: int, part: str) -> Tree:
    """Adapters of one block with a leading layer axis; `part` is "attention", "domain" or "expert".

    attention: LoRA on query and value [D→D, R], and with `qv_delta` a full weight [D, D] starting at zero.
    domain: the experts E_q and E_v. expert: one feed-forward expert. An expert has LoRA on fc1 and fc2.
    """
    d = config.width

    def one(key):
        first, second = jax.random.split(key)
        if part == "attention":
            tree = {n: init_lora(k, d, d, config.attention_rank) for n, k in (("query", first), ("value", second))}
            if config.qv_delta:
                for adapter in tree.values():
                    adapter["delta"] = jnp.zeros((d, d), jnp.float32)
            return tree
        if part == "domain":
            return {"query": init_expert(first, config), "value": init_expert(second, config)}
        return init_expert(key, config)

    return jax.vmap(one)(jax.random.split(key, layers))


def init_expert(key: Array, config: ModelConfig) -> Tree:
    """LoRA on both linears of a feed-forward expert, D→F and F→D."""
    first, second = jax.random.split(key)
    return {
        "fc1": init_lora(first, config.width, config.mlp, config.expert_rank),
        "fc2": init_lora(second, config.mlp, config.width, config.expert_rank),
    }


def _expert(config: ModelConfig, ffn: Tree, hidden: Array, x: Array, adapter: Tree, key: Array | None) -> Array:
    """One feed-forward expert; `hidden` = x W1 + b1 is the frozen product that experts on equal input share."""
    keys = (None, None) if key is None else jax.random.split(key)
    scale = config.lora_alpha_ratio
    hidden = hidden + lora(x, adapter["fc1"], scale=scale, rate=config.lora_dropout, key=keys[0])
    hidden = jax.nn.gelu(hidden, approximate=False)
    out = _dense(hidden, ffn["fc2"])
    return out + lora(hidden, adapter["fc2"], scale=scale, rate=config.lora_dropout, key=keys[1])


def _dense(x: Array, weights: Tree) -> Array:
    return x @ weights["kernel"].astype(x.dtype) + weights["bias"].astype(x.dtype)


def _projection(config: ModelConfig, weights: Tree, adapter: Tree, x: Array, key: Array | None) -> Array:
    """x (W + delta) + b + LoRA(x): W and delta are added first, one product instead of two."""
    if "delta" in adapter:
        kernel = weights["kernel"].astype(x.dtype) + adapter["delta"].astype(x.dtype)
        y = x @ kernel + weights["bias"].astype(x.dtype)
    else:
        y = _dense(x, weights)
    return y + lora(x, adapter, scale=config.lora_alpha_ratio, rate=config.lora_dropout, key=key)


def attention_part(config: ModelConfig, weights: Tree, adapters: Tree, domain: Tree, x, mask, key) -> Array:
    """x + Wo attention(q, k, v) with q = Wq(n + E_q(n)), k = Wk n, v = Wv(n + E_v(n)), n = LN1(x).

    Args:
      weights: the frozen layer.
      adapters, domain: one block each, without their layer axis.
      x: [B, T, D]. mask: bool [B, T]. key: dropout key or None.
    """
    keys = (None,) * 4 if key is None else jax.random.split(key, 4)
    n = layer_norm(x, weights["norm1"]["scale"], weights["norm1"]["bias"], config.layer_norm_eps)
    hidden = _dense(n, weights["fc1"])
    queried = n + _expert(config, weights, hidden, n, domain["query"], keys[0])
    valued = n + _expert(config, weights, hidden, n, domain["value"], keys[1])
    q = _projection(config, weights["query"], adapters["query"], queried, keys[2])
    v = _projection(config, weights["value"], adapters["value"], valued, keys[3])
    k = _dense(n, weights["key"])
    mixed = attention(q, k, v, mask, heads=config.heads, implementation=config.attention)
    return x + _dense(mixed, weights["out"])


def expert_part(config: ModelConfig, weights: Tree, expert: Tree, x: Array, key: Array | None) -> Array:
    """x + Expert(LN2(x)); x [B, T, D], `expert` one block without its layer axis."""
    n = layer_norm(x, weights["norm2"]["scale"], weights["norm2"]["bias"], config.layer_norm_eps)
    return x + _expert(config, weights, _dense(n, weights["fc1"]), n, expert, key)


def _layer(tree: Tree, index) -> Tree:
    return jax.tree.map(lambda leaf: leaf[index], tree)


def _stacked(blocks: Tree, names: list[str]) -> Tree:
    """The named blocks as one tree with the path axis behind the layer axis: [L, P, ...]."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves, axis=1), *(blocks[name] for name in names))


def _split(key: Array | None, count: int):
    return None if key is None else jax.random.split(key, count)


def run_paths(
    config: ModelConfig,
    frozen: Tree,
    blocks: Tree,
    x: Array,
    shared: Array,
    mask: Array,
    *,
    modality: str,
    kind: str,
    domain: str,
    key: Array | None = None,
) -> Array:
    """The four paths of one modality through both stages.

    Args:
      frozen: backbone weights with a leading axis over MoTE's and then MoME's layers.
      blocks: block name -> adapters; must hold `path_blocks(modality, kind, domain)`.
      x, shared: encoder tokens and their shared projection S, [B, T, D]. mask: bool [B, T].
      key: dropout key; None in evaluation.

    Returns:
      Path vectors [4, B, D]: the mean over each path's real tokens, in the order of `paths`.
    """
    route = paths(modality, kind)
    mote_depth, mome_depth = config.backbone_layers

    def attend(weights, adapters, domains, states, key):
        step = lambda a, d, s, k: attention_part(config, weights, a, d, s, mask, k)  # noqa: E731
        return jax.vmap(step, in_axes=(0, 0, 0, None if key is None else 0))(adapters, domains, states, key)

    def transform(weights, experts, states, key):
        step = lambda e, s, k: expert_part(config, weights, e, s, k)  # noqa: E731
        return jax.vmap(step, in_axes=(0, 0, None if key is None else 0))(experts, states, key)

    def stage(states, first, depth, stacks, experts, name, key, entry=None):
        attn = _stacked(blocks, [f"{name}/{stack}/attention" for stack in stacks])
        doms = _stacked(blocks, [f"{name}/{stack}/domain/{domain}" for stack in stacks])
        exps = _stacked(blocks, experts)
        keys = _split(key, depth)

        def layer(states, index, entry=None):
            weights = _layer(frozen, first + index)
            attention_key, expert_key = (None, None) if key is None else jax.random.split(keys[index])
            adapters, domains, experts = (_layer(tree, index) for tree in (attn, doms, exps))
            if entry is not None:
                # Distinct (stack, input) pairs only; `entry` says which of them each path continues from.
                distinct, order = entry
                adapters, domains = (_layer(tree, jnp.array(distinct)) for tree in (adapters, domains))
                states = attend(weights, adapters, domains, states, _split(attention_key, len(distinct)))
                states = states[jnp.array(order)]
            else:
                states = attend(weights, adapters, domains, states, _split(attention_key, len(stacks)))
            return transform(weights, experts, states, _split(expert_key, len(stacks)))

        start = 0
        if entry is not None:
            states, start = layer(states, 0, entry), 1
        if depth - start == 1:
            return layer(states, start)
        return jax.lax.fori_loop(start, depth, lambda i, s: layer(s, i), states, unroll=depth <= start)

    mote_key, mome_key = (None, None) if key is None else jax.random.split(key)
    states = stage(
        jnp.stack([shared, shared, x]),
        0,
        mote_depth,
        [path.mote_stack for path in route],
        [path.mote_expert for path in route],
        "mote",
        mote_key,
        entry=([0, 1, 2], [0, 1, 2, 2]),
    )
    states = stage(
        states,
        mote_depth,
        mome_depth,
        [path.mome_stack for path in route],
        [path.mome_expert for path in route],
        "mome",
        mome_key,
    )
    weight = mask.astype(states.dtype)
    weight = weight / jnp.maximum(weight.sum(-1, keepdims=True), 1)
    return jnp.einsum("pbtd,bt->pbd", states, weight)
