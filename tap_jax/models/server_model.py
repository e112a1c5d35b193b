"""The server model W: encoders, routed or standard backbone, decoders, as pure functions of (frozen, blocks) (Fig. 1).

`frozen` is Ŵ: one copy of every pre-trained weight. `blocks` is W̃ (or X): block name -> tree of trainables. A
stream's forward pass touches the blocks of B_o and no others.
"""

import dataclasses
import functools
import zlib
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from tap_jax.blocks import Blocks, Partition
from tap_jax.errors import UserError
from tap_jax.models import backbone, flava, standard, vilt
from tap_jax.models.bottleneck import dual, init_bottleneck
from tap_jax.models.heads import ClassificationHead, ImageHead, TextHead
from tap_jax.models.layers import InputAdaptor, ModelConfig, TrainableDense
from tap_jax.models.lora import Tree
from tap_jax.models.token_layout import TokenLayout
from tap_jax.platforms import compiler_options
from tap_jax.tasks import Stream, Task
from tap_jax.token_logits import TokenLogits, whole

ENCODERS = {
    "flava": {"image": flava.ImageEncoder, "text": flava.TextEncoder},
    "vilt": {"image": vilt.ImageEncoder, "text": vilt.TextEncoder},
}
PAD = 0  # BERT's [PAD]


def _once(function, *args, static: tuple[int, ...]):
    """Calls a function as a program of its own; inside another program (shapes alone are wanted) it is part of it."""
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(args)):
        return function(*args)
    return _compiled(function, static)(*args)


@functools.cache
def _compiled(function, static: tuple[int, ...]):
    return jax.jit(function, static_argnums=static, compiler_options=compiler_options(once=True))


def _init_module(module, collections: tuple[str, ...], key, *args):
    """Some of a module's collections; the compiler leaves out the others."""
    variables = module.init(key, *args, deterministic=True)
    return {name: variables[name] for name in collections}


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """Weights from a checkpoint, as host arrays in float32.

    Attributes:
      frozen: Ŵ, all of it: "backbone" and "encoder/<modality>" -> tree.
      blocks: block name -> initial values of some of its leaves (ViLT: CLS and positions).
    """

    frozen: Tree
    blocks: Mapping[str, Tree]


class ServerModel:
    """Pure `init`, `apply` and `generate` for a set of tasks.

    Args:
      config: sizes.
      tasks: the federation's tasks; they decide which encoders, stacks, experts and heads exist.

    Attributes:
      config, tasks: those given.
      streams: the tasks' streams, in order.
      block_names: all blocks, in a fixed order.
      adapter_blocks: those of them that are bottleneck adapters; none where the model has LoRA.

    Raises:
      UserError: sizes that do not fit together, or tasks that name one head and need different ones; the message names
        the field or the task.
    """

    def __init__(self, config: ModelConfig, tasks: Sequence[Task]):
        _check(config)
        self.config = config
        self.tasks = tuple(tasks)
        self.streams = tuple(stream for task in self.tasks for stream in task.streams)
        names = [name for stream in self.streams for name in self.blocks_of(stream)]
        self.block_names = tuple(sorted(dict.fromkeys(names), key=_order))
        self.adapter_blocks = tuple(filter(_is_adapter, self.block_names)) if config.bottleneck else ()
        self._encoders = {
            modality: ENCODERS[config.name][modality](config)
            for modality in ("image", "text")
            if any(modality in task.modalities for task in self.tasks)
        }
        self._heads = {}
        for task in self.tasks:
            if self._heads.setdefault(task.head, self._head(task)) != self._head(task):
                first = next(other.name for other in self.tasks if other.head == task.head)
                raise UserError(
                    f"task {task.name}: its head '{task.head}' is {first}'s, which has another kind or number of "
                    "classes; name another head"
                )
        self._shared = TrainableDense(config.width)

    def _head(self, task: Task):
        c, dtype = self.config, jnp.dtype(self.config.dtype)
        if task.kind.endswith("classification"):
            return ClassificationHead(
                task.classes, c.head_hidden, c.head_activation, c.head_dropout, c.head_layer_norm, dtype=dtype
            )
        if task.kind == "image_generation":
            return ImageHead(c.image_channels, dtype=dtype)
        return TextHead(
            c.vocab,
            c.max_answer,
            c.width,
            heads=c.text_heads,
            inner=c.text_inner,
            cond_heads=c.text_cond_heads,
            dropout=c.text_dropout,
            condition=c.condition,
            dtype=dtype,
        )

    def roles(self, stream: Stream) -> dict[str, str | tuple[str, ...]]:
        """What the stream's forward pass is made of: part -> the block, or one block per path.

        Parts are "shared_proj", "head", and of each modality "<modality>/encoder", "<modality>/adapters" and
        "<modality>/" before the names of `backbone.roles` (standard backbone: "<modality>/backbone"), as far as the
        model has them. They do not depend on the domain, so that one program serves all domains of a task.
        """
        c, task, routed = self.config, stream.task, self.config.backbone == "routed"
        out: dict[str, str | tuple[str, ...]] = {"shared_proj": "shared_proj"} if routed else {}
        out["head"] = f"head/{task.head}"
        for modality in task.modalities:
            out[f"{modality}/encoder"] = f"encoder/{modality}"
            if c.bottleneck and c.name == "flava":  # ViLT's embeddings have no feed-forward network
                out[f"{modality}/adapters"] = f"encoder/{modality}/adapters"
            if not routed:
                out[f"{modality}/backbone"] = standard.BLOCK
                continue
            for part, names in backbone.roles(c, modality, task.kind, stream.domain).items():
                out[f"{modality}/{part}"] = names
        return out

    def blocks_of(self, stream: Stream) -> tuple[str, ...]:
        """Names of the blocks on the stream's paths: encoders, shared projection, backbone, head."""
        names = [(part,) if isinstance(part, str) else part for part in self.roles(stream).values()]
        return tuple(dict.fromkeys(name for part in names for name in part))

    def collect(self, blocks: Blocks, stream: Stream) -> dict[str, Tree]:
        """The parts of a forward pass from single blocks, named as in `roles`: those of the paths stacked, [P, ...].

        Args:
          blocks: those of `blocks_of(stream)`, or more.
        """
        return {
            part: blocks[names]
            if isinstance(names, str)
            else jax.tree.map(lambda *leaves: jnp.stack(leaves), *(blocks[name] for name in names))
            for part, names in self.roles(stream).items()
        }

    def partition(self, task_mask: np.ndarray) -> Partition:
        """The blocks, which task touches which, and who has which task.

        Args:
          task_mask: bool [K, O], client k has task o; O in the order of `tasks`.
        """
        touches = np.zeros((len(self.tasks), len(self.block_names)), bool)
        for stream in self.streams:
            for name in self.blocks_of(stream):
                touches[self.tasks.index(stream.task), self.block_names.index(name)] = True
        return Partition(self.block_names, tuple(map(self._shape_class, self.block_names)), touches, task_mask)

    def _shape_class(self, name: str) -> str:
        """Blocks of one shape class have equal shapes: all stacks' attentions of a stage, heads of as many classes, ...

        Tasks of one group (`data.task_groups`) find each of its parts in one shape class, whatever their heads' names.
        """
        stage, *rest = name.split("/")
        if stage == "head":
            head = self._heads[rest[0]]
            if isinstance(head, ClassificationHead):
                return f"head/{head.classes}"
            return "head/text_generation" if isinstance(head, TextHead) else "head/image_generation"
        return f"{stage}/{rest[1]}" if stage in ("mote", "mome") else name

    def init(self, key: Array, pretrained: Pretrained | None = None) -> tuple[Tree, dict[str, Tree]]:
        """Fresh (frozen, blocks), all float32; each block's values depend on the key and its own name only.

        Args:
          key: a JAX key.
          pretrained: the weights of a checkpoint, which are taken as they are; without them the frozen part is a
            random stand-in of the same shapes, and so are ViLT's CLS and positions.

        Returns:
          Ŵ, "backbone" and "encoder/<modality>" -> tree; and the blocks of `block_names`, name -> tree.
        """
        c = self.config
        frozen: Tree = {}
        # Small programs of their own, because all in one would take longer to compile than to train with.
        if pretrained is None:
            backbone_key = _fold(key, "backbone")
            frozen["backbone"] = _once(backbone.init_frozen, backbone_key, c, sum(c.backbone_layers), static=(1, 2))
        else:
            frozen = jax.tree.map(jnp.asarray, dict(pretrained.frozen))
        blocks = {}
        for name in self.block_names:
            block_key = _fold(key, name)
            kind, *rest = name.split("/")
            if kind in ("mote", "mome", standard.BLOCK) or name in self.adapter_blocks:
                blocks[name] = self._init_adapter(block_key, name)
            elif kind == "encoder":
                wanted = ("params", "frozen") if pretrained is None else ("params",)
                encoder, example = self._encoders[rest[0]], self._example(rest[0])
                found = _once(_init_module, encoder, wanted, block_key, *example, static=(0, 1))
                blocks[name] = found["params"]
                if pretrained is None:
                    frozen[name] = found["frozen"]
                else:
                    blocks[name] |= jax.tree.map(jnp.asarray, dict(pretrained.blocks.get(name, {})))
            elif kind == "shared_proj":
                blocks[name] = self._shared.init(block_key, jnp.zeros((1, c.width)))["params"]
            else:
                blocks[name] = self._init_head(block_key, rest[0])
        return frozen, blocks

    def init_adapters(self, key: Array) -> dict[str, Tree]:
        """Fresh values of `adapter_blocks` by name, float32: those that `init` gives with the same key."""
        return {name: self._init_adapter(_fold(key, name), name) for name in self.adapter_blocks}

    def _init_adapter(self, key: Array, name: str) -> Tree:
        """A block of the backbone, or an encoder's bottlenecks."""
        c, (kind, *rest) = self.config, name.split("/")
        if kind == "encoder":
            depth = c.image_layers if rest[0] == "image" else c.text_layers
            return init_bottleneck(key, c.width, c.bottleneck, (depth,))
        if kind == standard.BLOCK:
            return _once(standard.init_block, key, c, static=(1,))
        depth = c.backbone_layers[0 if kind == "mote" else 1]
        return _once(backbone.init_block, key, c, depth, rest[1], static=(1, 2, 3))

    def _example(self, modality: str):
        if modality == "image":
            return jnp.zeros((1, 64, 64, 3)), None
        return jnp.zeros((1, 8), jnp.int32), jnp.ones((1, 8), bool)

    def _init_head(self, key: Array, name: str) -> Tree:
        head, vectors = self._heads[name], jnp.zeros((1, self.config.width))
        if isinstance(head, TextHead):
            args = (vectors[:, None], jnp.zeros((1, 2), jnp.int32))
        else:
            args = (vectors,)
        return _once(_init_module, head, ("params",), key, *args, static=(0, 1))["params"]

    def dual(self, first: Mapping[str, Tree], second: Mapping[str, Tree]) -> dict[str, Tree]:
        """The model with two sets of bottleneck adapters at once, h + ½A_first(h) + ½A_second(h) (FedDAT's teacher).

        Args:
          first, second: parts as `collect` returns them, or blocks by name. Of `second` only adapters are read.

        Returns:
          The names of `first`: adapters joined by `bottleneck.dual`, so of both widths together, all else as it is.

        Raises:
          ValueError: the model has no bottleneck adapters.
        """
        if not self.adapter_blocks:
            raise ValueError("dual: the model has no bottleneck adapters")
        roles = {part: names for stream in self.streams for part, names in self.roles(stream).items()}
        blocks = {name: name for name in self.block_names} | roles
        kind = {name: made_of if isinstance(made_of, str) else made_of[0] for name, made_of in blocks.items()}
        return {
            name: dual(tree, second[name]) if kind[name] in self.adapter_blocks else tree
            for name, tree in first.items()
        }

    def encode(
        self,
        modality: str,
        frozen: Tree,
        block: Tree,
        inputs: Array,
        mask: Array | None,
        *,
        adapters: Tree | None = None,
        positions: Array | None = None,
        key: Array | None = None,
    ) -> Array:
        """Encoder tokens [B, T, D] of images or of word pieces; of images T = 1 + (image_size/patch)².

        Args:
          modality: "image" or "text".
          frozen: Ŵ as `init` returns it.
          inputs: images float [B, 64, 64, 3] in standardised units, or word pieces int32 [B, T], T <= text_rows.
          mask: None for images; for texts bool [B, T] or [B, T, T], see `attention`.
          block: the trainables "encoder/<modality>".
          adapters: the bottleneck adapters "encoder/<modality>/adapters", where the model has them.
          positions: of packed texts, int32 [B, T]: each token's place in its own text.
          key: dropout key; None in evaluation.
        """
        return self._encoders[modality].apply(
            {"params": block, "frozen": frozen[f"encoder/{modality}"]},
            inputs,
            mask,
            *(() if adapters is None else (adapters,)),
            **({} if positions is None else {"positions": positions}),
            deterministic=key is None,
            rngs=None if key is None else {"dropout": key},
        )

    def adapt(self, block: Tree, images: Array) -> Array:
        """What the image encoder's patches are cut from, of images [B, 64, 64, 3]: [B, image_size, image_size, 3].

        Args:
          block: the trainables "encoder/image".
        """
        return InputAdaptor(self.config).apply({"params": block["adaptor"]}, images)

    def represent(self, frozen: Tree, parts: Tree, task: Task, batch: Mapping, *, key: Array | None = None) -> Array:
        """Path vectors of a batch, [B, 4·|modalities|, D]: modalities in the task's order, paths as in `backbone`.

        The standard backbone has one path: [B, |modalities|, D]. They are in `config.dtype`.

        Args:
          frozen: Ŵ as `init` returns it, or in the compute type (`to_compute_dtype`).
          parts: as `collect` returns them.
          task: one of the model's.
          batch: "images" float [S, 64, 64, 3] in standardised units and/or "tokens" int32 [S, T], 0-padded, or packed
            as `device_data.cut` lays them out: tokens [B, T] with "text_segments" and "text_positions".
          key: dropout key; None in evaluation.
        """
        return self._represent(frozen, parts, task, batch, key)[0]

    def _represent(self, frozen: Tree, parts: Tree, task: Task, batch: Mapping, key: Array | None):
        """(path vectors [B, P, D], latents [|modalities| or 0, B, D]), see `represent` and `forward`."""
        vectors, latents = [], []
        for number, modality in enumerate(task.modalities):
            encoder_key, path_key = (None, None) if key is None else jax.random.split(jax.random.fold_in(key, number))
            if modality == "image":
                inputs, layout = batch["images"].astype(self.config.dtype), None
            else:
                inputs, layout = batch["tokens"], _text_layout(batch)
            start = f"{modality}/"
            mine = {name.removeprefix(start): part for name, part in parts.items() if name.startswith(start)}
            adapters = mine.get("adapters")
            mask, positions = (layout.mask, batch.get("text_positions")) if layout else (None, None)
            x = self.encode(
                modality, frozen, mine["encoder"], inputs, mask, adapters=adapters, positions=positions, key=encoder_key
            )
            layout = layout or TokenLayout(jnp.ones(x.shape[:2], bool))
            weights = frozen["backbone"]
            if self.config.backbone == "standard":
                vectors.append(
                    standard.run_stack(self.config, weights, mine["backbone"], x, layout, key=path_key)[None]
                )
                continue
            shared = self._shared.apply({"params": parts["shared_proj"]}, x)
            paths, latent = backbone.run_paths(self.config, weights, mine, x, shared, layout, key=path_key)
            vectors.append(paths)
            latents.append(latent.astype(jnp.float32))
        vectors = jnp.concatenate(vectors).swapaxes(0, 1)
        latents = jnp.stack(latents) if latents else jnp.zeros((0, len(vectors), self.config.width), jnp.float32)
        return vectors, latents

    def decode(self, head: Tree, task: Task, vectors: Array, batch: Mapping, *, key: Array | None = None) -> Array:
        """The head on path vectors [B, P, D]; float32 logits [B, C], image [B, 64, 64, 3], or logits [B, A-1, V].

        Text is decoded with teacher forcing: position t of the output predicts answers[:, t+1]. Images are in
        standardised units.

        Args:
          head: the block "head/<task.head>".
          task: one of the model's.
          batch: for text generation "answers" int32 [B, A], 0-padded; else it is not read.
          key: dropout key; None in evaluation.

        Raises:
          UserError: A - 1 is above `config.max_answer`.
        """
        return whole(self._decode(head, task, vectors, batch, key))

    def _decode(self, head: Tree, task: Task, vectors: Array, batch: Mapping, key: Array | None) -> Array | TokenLogits:
        """What `decode` returns; of text the factors of it."""
        module, params = self._heads[task.head], {"params": head}
        kwargs = {"deterministic": key is None, "rngs": None if key is None else {"dropout": key}}
        if isinstance(module, TextHead):
            ids = batch["answers"][:, :-1]
            if "answer_segments" in batch:
                ids = batch["answers"]
                kwargs |= {"segments": batch["answer_segments"], "positions": batch["answer_positions"]}
            return module.apply(params, self._condition(vectors), ids, method="factors", **kwargs)
        return module.apply(params, vectors.mean(1), **kwargs)

    def apply(self, frozen: Tree, parts: Tree, task: Task, batch: Mapping, *, key: Array | None = None) -> Array:
        """`decode` of `represent`: the whole forward pass of a task, with dropout where a key is given.

        Args:
          frozen: Ŵ as `init` returns it, or in the compute type (`to_compute_dtype`).
          parts: `collect(blocks, stream)`; the batch must be of that stream's domain.
          task: the stream's.
          batch: what `represent` and `decode` read.
          key: dropout key; None in evaluation.
        """
        return whole(self.forward(frozen, parts, task, batch, key=key)[0])

    def forward(
        self, frozen: Tree, parts: Tree, task: Task, batch: Mapping, *, key: Array | None = None
    ) -> tuple[Array | TokenLogits, Array]:
        """(outputs, latents), as training wants them; the latents are those that DisentAFL disentangles.

        Returns:
          What `apply` returns, but of text generation the logits' factors. And float32 [|modalities|, B, D]: the mean
          over real tokens of each modality's modality-task path between the MoTE and the MoME stage. The standard
          backbone has no such place: [0, B, D].
        """
        first, second = (None, None) if key is None else jax.random.split(key)
        vectors, latents = self._represent(frozen, parts, task, batch, first)
        return self._decode(parts["head"], task, vectors, batch, second), latents

    def generate(
        self,
        head: Tree,
        task: Task,
        vectors: Array,
        *,
        length: int,
        start: int,
        stop: int,
        wanted: Array | None = None,
    ) -> Array:
        """Greedy answers int32 [B, length] from path vectors [B, P, D], for a task of text generation.

        An answer ends with `stop`, behind which it is 0, or is cut off at `length`; `start`, which opens it, is left
        out.

        Args:
          head: the block "head/<task.head>".
          length: word pieces, <= `config.max_answer`.
          start, stop: ids of the tokens that open and end an answer.
          wanted: bool [B], whose answers are; what others get means nothing. None: all.

        Raises:
          UserError: length is above `config.max_answer`.
        """
        return self._heads[task.head].apply(
            {"params": head},
            self._condition(vectors),
            length=length,
            start_id=start,
            stop_id=stop,
            pad_id=PAD,
            wanted=wanted,
            method="generate",
        )

    def _condition(self, vectors: Array) -> Array:
        return vectors if self.config.condition == "paths" else vectors.mean(1, keepdims=True)


def to_compute_dtype(frozen: Tree, dtype: str) -> Tree:
    """Ŵ with its weights in the compute type, so that one copy serves; those of LayerNorms stay as they are, float32.

    Args:
      dtype: by name, as `ModelConfig.dtype`.
    """

    def cast(path, leaf):
        keep = any("norm" in str(getattr(entry, "key", "")) for entry in path)
        return leaf if keep else leaf.astype(dtype)

    return jax.tree_util.tree_map_with_path(cast, frozen)


def _text_layout(batch: Mapping) -> TokenLayout:
    """Of a batch's texts, padded or packed."""
    if "text_segments" not in batch:
        return TokenLayout(batch["tokens"] != PAD)
    segments = batch["text_segments"]
    return TokenLayout(segments >= 0, segments, samples=batch["samples"].shape[0])


def _fold(key: Array, name: str) -> Array:
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


def _order(name: str) -> tuple[int, str]:
    return (("encoder", "shared_proj", "mote", "mome", standard.BLOCK, "head").index(name.split("/")[0]), name)


def _is_adapter(name: str) -> bool:
    """Whether a block is one of bottleneck adapters, in a model that has them."""
    return name.split("/")[0] in ("mote", "mome", standard.BLOCK) or name.endswith("/adapters")


def _check(c: ModelConfig) -> None:
    """What `config.validate` checks too, in its words: sizes need not come from there."""
    if c.name not in ENCODERS:
        raise UserError(f"model.name: unknown '{c.name}'; use one of {', '.join(ENCODERS)}")
    if c.backbone not in ("routed", "standard"):
        raise UserError(f"model.backbone: unknown '{c.backbone}'; use one of routed, standard")
    if c.bottleneck < 0:
        raise UserError(f"feddat.bottleneck: {c.bottleneck}; use more than 0")
    for field in ("heads", "text_heads", "text_cond_heads"):
        if c.width % getattr(c, field):
            raise UserError(
                f"model.{field}: {getattr(c, field)} does not divide model.width {c.width}; use one that does"
            )
    if c.image_size % c.patch:
        raise UserError(f"model.patch: {c.patch} does not divide model.image_size {c.image_size}; use one that does")
