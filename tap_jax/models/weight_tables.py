"""Hugging Face's FLAVA and ViLT and our trees, weight by weight: one table per model, read in both directions.

A row is (HF's name, our place, transform). `{i}` in a name runs over the layers. A place is `tree:entry:leaf[index]`:
tree is "frozen" (Ŵ) or "block" (initial values of trainables), entry its top-level name, leaf the path below, index
where in a stacked leaf one layer lies. What a checkpoint may hold besides is listed in `UNUSED`, name by name.

Checked against transformers' modeling_flava.py and modeling_vilt.py; letters as elsewhere (D width, F inner width).
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

Tree = Mapping


@dataclasses.dataclass(frozen=True)
class Transform:
    """A change of layout and nothing else: `ours` and `theirs` return views and undo one another.

    Attributes:
      ours: HF's array -> as our leaf (one layer of it) has it.
      theirs: the inverse.
    """

    ours: Callable[[np.ndarray], np.ndarray]
    theirs: Callable[[np.ndarray], np.ndarray]


def _to_conv(kernel: np.ndarray) -> np.ndarray:
    side = math.isqrt(kernel.shape[0] // 3)
    return kernel.T.reshape(-1, 3, side, side)


SAME = Transform(lambda w: w, lambda w: w)
LINEAR = Transform(lambda w: w.T, lambda w: w.T)  # (outputs, inputs) <-> [inputs, outputs]
PATCHES = Transform(lambda w: w.reshape(len(w), -1).T, _to_conv)  # (D, 3, p, p) <-> [3·p², D], channel-major
TOKEN = Transform(lambda w: w.reshape(-1), lambda w: w[None, None])  # (1, 1, D) <-> [D]
TABLE = Transform(lambda w: w[0], lambda w: w[None])  # (1, N, D) <-> [N, D]

# One transformer layer; {q} and {v} are where query and value lie.
_LAYER = (
    ("layernorm_before.weight", "norm1.scale[{at}]", SAME),
    ("layernorm_before.bias", "norm1.bias[{at}]", SAME),
    ("attention.attention.query.weight", "{q}.kernel[{q_at}]", LINEAR),
    ("attention.attention.query.bias", "{q}.bias[{q_at}]", SAME),
    ("attention.attention.key.weight", "key.kernel[{at}]", LINEAR),
    ("attention.attention.key.bias", "key.bias[{at}]", SAME),
    ("attention.attention.value.weight", "{v}.kernel[{v_at}]", LINEAR),
    ("attention.attention.value.bias", "{v}.bias[{v_at}]", SAME),
    ("attention.output.dense.weight", "out.kernel[{at}]", LINEAR),
    ("attention.output.dense.bias", "out.bias[{at}]", SAME),
    ("layernorm_after.weight", "norm2.scale[{at}]", SAME),
    ("layernorm_after.bias", "norm2.bias[{at}]", SAME),
    ("intermediate.dense.weight", "fc1.kernel[{at}]", LINEAR),
    ("intermediate.dense.bias", "fc1.bias[{at}]", SAME),
    ("output.dense.weight", "fc2.kernel[{at}]", LINEAR),
    ("output.dense.bias", "fc2.bias[{at}]", SAME),
)


def _layers(theirs: str, place: str, **where: str) -> tuple:
    return tuple((f"{theirs}.{{i}}.{key}", place + leaf.format(at="i", **where), how) for key, leaf, how in _LAYER)


_TOWER = dict(q="query", q_at="i", v="value", v_at="i")
_BACKBONE = dict(q="query_value", q_at="i,0", v="query_value", v_at="i,1")  # side by side

TABLES: dict[str, tuple[tuple[str, str, Transform], ...]] = {
    "flava": (
        ("image_model.embeddings.cls_token", "frozen:encoder/image:cls", TOKEN),
        ("image_model.embeddings.position_embeddings", "frozen:encoder/image:positions", TABLE),
        ("image_model.embeddings.patch_embeddings.projection.weight", "frozen:encoder/image:patch.kernel", PATCHES),
        ("image_model.embeddings.patch_embeddings.projection.bias", "frozen:encoder/image:patch.bias", SAME),
        *_layers("image_model.encoder.layer", "frozen:encoder/image:layers.", **_TOWER),
        ("image_model.layernorm.weight", "frozen:encoder/image:norm.scale", SAME),
        ("image_model.layernorm.bias", "frozen:encoder/image:norm.bias", SAME),
        ("text_model.embeddings.word_embeddings.weight", "frozen:encoder/text:words", SAME),
        ("text_model.embeddings.position_embeddings.weight", "frozen:encoder/text:positions", SAME),
        ("text_model.embeddings.token_type_embeddings.weight", "frozen:encoder/text:types", SAME),
        ("text_model.embeddings.LayerNorm.weight", "frozen:encoder/text:embedding_norm.scale", SAME),
        ("text_model.embeddings.LayerNorm.bias", "frozen:encoder/text:embedding_norm.bias", SAME),
        *_layers("text_model.encoder.layer", "frozen:encoder/text:layers.", **_TOWER),
        ("text_model.layernorm.weight", "frozen:encoder/text:norm.scale", SAME),
        ("text_model.layernorm.bias", "frozen:encoder/text:norm.bias", SAME),
        # Layer 0 feeds MoTE, layer 1 MoME (in general the first L1, then the next L2); later ones are unused.
        *_layers("multimodal_model.encoder.layer", "frozen:backbone:", **_BACKBONE),
    ),
    "vilt": (
        ("embeddings.cls_token", "block:encoder/image:cls", TOKEN),
        ("embeddings.position_embeddings", "block:encoder/image:positions", TABLE),
        ("embeddings.patch_embeddings.projection.weight", "frozen:encoder/image:patch.kernel", PATCHES),
        ("embeddings.patch_embeddings.projection.bias", "frozen:encoder/image:patch.bias", SAME),
        ("embeddings.text_embeddings.word_embeddings.weight", "frozen:encoder/text:words", SAME),
        ("embeddings.text_embeddings.position_embeddings.weight", "frozen:encoder/text:positions", SAME),
        ("embeddings.text_embeddings.token_type_embeddings.weight", "frozen:encoder/text:types", SAME),
        ("embeddings.text_embeddings.LayerNorm.weight", "frozen:encoder/text:embedding_norm.scale", SAME),
        ("embeddings.text_embeddings.LayerNorm.bias", "frozen:encoder/text:embedding_norm.bias", SAME),
        # Layers 0-3 feed MoTE, 4-7 MoME (in general as above).
        *_layers("encoder.layer", "frozen:backbone:", **_BACKBONE),
    ),
}

# On no path of ours; {a,b} stands for each of the alternatives, {n} for 1 to the blocks of a codebook group.
UNUSED: dict[str, tuple[str, ...]] = {
    "flava": (
        "image_model.embeddings.mask_token",
        "{image,text,multimodal}_model.pooler.dense.{weight,bias}",
        "text_model.embeddings.{position,token_type}_ids",
        "multimodal_model.cls_token",
        "multimodal_model.layernorm.{weight,bias}",
        "{image,text}_projection.{weight,bias}",
        "{image,text}_to_mm_projection.{weight,bias}",
        "logit_scale",
        # FlavaForPreTraining
        "{mim,mlm,mmm_image,mmm_text}_head.bias",
        "{mim,mlm,mmm_image,mmm_text}_head.{transform.dense,transform.LayerNorm,decoder}.{weight,bias}",
        "itm_head.{pooler.dense,seq_relationship}.{weight,bias}",
        "image_codebook.blocks.{input,output.conv}.{weight,bias}",
        "image_codebook.blocks.group_{1,2,3,4}.group.block_{n}.res_path.path.conv_{1,2,3,4}.{weight,bias}",
        "image_codebook.blocks.group_{2,3,4}.group.block_1.id_path.{weight,bias}",
    ),
    "vilt": (
        "embeddings.token_type_embeddings.weight",  # modality types, see models/vilt.py
        "embeddings.text_embeddings.{position,token_type}_ids",
        "layernorm.{weight,bias}",
        "pooler.dense.{weight,bias}",
        # ViltForMaskedLM, and the image-text matching heads that other checkpoints of the family bring
        "mlm_score.bias",
        "mlm_score.{transform.dense,transform.LayerNorm,decoder}.{weight,bias}",
        "{itm_score.fc,rank_output}.{weight,bias}",
    ),
}
PREFIX = {"flava": "flava.", "vilt": "vilt."}  # of the classes with heads


@dataclasses.dataclass(frozen=True)
class Place:
    """Where one weight of HF's lies in our trees.

    Attributes:
      tree: "frozen" or "block".
      path: entry, then the path below it.
      index: position in a leaf that stacks layers; () where the leaf is the weight.
      transform: layout.
    """

    tree: str
    path: tuple[str, ...]
    index: tuple[int, ...]
    transform: Transform

    def leaf(self, trees: Mapping[str, Tree]) -> Any:
        """The whole leaf (array or shape) in {"frozen": ..., "block": ...}, or None where these trees lack it."""
        found = trees[self.tree]
        for name in self.path:
            found = found.get(name) if isinstance(found, Mapping) else None
        return found


def places(model: str, trees: Mapping[str, Tree]) -> dict[str, Place]:
    """HF's name -> place, for every weight that our trees hold.

    Args:
      model: "flava" or "vilt".
      trees: {"frozen": Ŵ, "block": blocks by name} of arrays or shapes; encoders that no task needs may be missing.
    """
    found = {}
    for key, where, transform in TABLES[model]:
        tree, entry, leaf, index = re.fullmatch(r"(\w+):([\w/]+):([\w.]+)(?:\[([i,\d]+)])?", where).groups()
        place = Place(tree, (entry, *leaf.split(".")), (), transform)
        stack = place.leaf(trees)
        if stack is None:
            continue
        for i in range(stack.shape[0]) if index else (None,):
            at = () if i is None else tuple(i if part == "i" else int(part) for part in index.split(","))
            found[key if i is None else key.format(i=i)] = dataclasses.replace(place, index=at)
    return found


def known_names(model: str, layers: Mapping[str, int], *, codebook_blocks: int = 2) -> set[str]:
    """Every name that a checkpoint of this model may hold, without prefix.

    Args:
      model: "flava" or "vilt".
      layers: HF's name of a layer list ("text_model.encoder.layer") -> its length.
      codebook_blocks: blocks per group of FLAVA's image codebook.
    """
    names, numbers = set(), ",".join(str(n + 1) for n in range(codebook_blocks))
    for key, _, _ in TABLES[model]:
        stack = key.partition(".{i}")[0]
        names |= {key.format(i=i) for i in range(layers[stack])} if "{i}" in key else {key}
    for pattern in UNUSED[model]:
        parts = re.split(r"\{([^}]*)}", pattern.replace("{n}", f"{{{numbers}}}"))
        choices = [part.split(",") if odd % 2 else [part] for odd, part in enumerate(parts)]
        names.update(map("".join, itertools.product(*choices)))
    return names


def to_huggingface(model: str, frozen: Tree, blocks: Tree) -> dict[str, np.ndarray]:
    """HF's name (without prefix) -> weight in HF's layout, for every weight that our trees hold; views where possible.

    Args:
      model: "flava" or "vilt".
      frozen: Ŵ as numpy arrays.
      blocks: blocks by name; only ViLT's "encoder/image" is read.
    """
    trees = {"frozen": frozen, "block": blocks}
    return {
        key: place.transform.theirs(np.asarray(place.leaf(trees))[place.index])
        for key, place in places(model, trees).items()
    }
