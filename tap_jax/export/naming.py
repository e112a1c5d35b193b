"""Our trees <-> the state dict of `torch_model.Model`: one table of names and axes, used in both directions.

A weight's key is "frozen." or "blocks.", the block's name, and the path in the block with PyTorch's names. Our trees
stack layers, and query and value, on leading axes; there every layer has tensors of its own. Nothing but the order
of axes changes, so that a round trip is bit-identical.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from tap_jax.blocks import Tree

# End of our path -> PyTorch's name, and the order of our axes in it; what is not here keeps its name and axes.
TABLE = (
    (r"(^|\.)(lora\.)?a$", r"\1lora_A", (1, 0)),  # [inputs, R] -> [R, inputs]
    (r"(^|\.)(lora\.)?b$", r"\1lora_B", (1, 0)),
    (r"(^|\.)delta$", r"\1delta", (1, 0)),
    (r"^(down|up)$", r"\1.weight", (1, 0)),  # a bottleneck's linears
    (r"^(down|up)_bias$", r"\1.bias", None),
    (r"\bconv3$", "conv3.weight", (3, 2, 0, 1)),  # [3, 3, in, out] -> Conv2d
    (r"\bconv1$", "conv1.weight", (1, 0)),
    (r"\bbias1$", "conv1.bias", None),
    (r"\b(deconv_\d+)\.kernel$", r"\1.weight", (0, 3, 1, 2)),  # [in, 4, 4, out] -> ConvTranspose2d
    (r"\bin_proj_kernel$", "in_proj_weight", (1, 0)),
    (r"^output$", "output.weight", (1, 0)),  # of the text head: no bias, so no tree of its own
    (r"(^|\.)kernel$", r"\1weight", (1, 0)),
    (r"(^|\.)scale$", r"\1weight", None),
)


class Entry(NamedTuple):
    """A tensor of the state dict.

    Attributes:
      key: its name there.
      index: where it lies in our leaf, on the leading axes; () where it is the leaf.
      axes: the order of that part's axes in it; None: as they are.
    """

    key: str
    index: tuple[int, ...]
    axes: tuple[int, ...] | None


def entries(collection: str, name: str, path: tuple[str, ...], shape: tuple[int, ...]) -> Iterator[Entry]:
    """The tensors of one leaf.

    Args:
      collection: "frozen" or "blocks". name: of the block, or of the frozen tree.
      path: of the leaf in it. shape: its shape.
    """
    routed = name.startswith(("mote/", "mome/"))
    stacked = routed or name == "backbone" or (name.startswith("encoder/") and name.endswith("/adapters"))
    paired = path[0] == "query_value" or (routed and "/expert/" not in name)
    own = [step for step in path if step not in ("query_value", "layers")]
    layered = stacked or "layers" in path
    place = ("layers",) if "layers" in path else ()
    for index in np.ndindex(shape[: layered + paired]):
        which = (("query", "value")[index[1]],) if paired else ()
        lead, ours, order = (collection, name, *place, *map(str, index[:1]), *which), ".".join(own), None
        for pattern, theirs, axes in TABLE:
            renamed, found = re.subn(pattern, theirs, ours)
            if found:
                ours, order = renamed, axes
                break
        yield Entry(".".join((*lead, ours)), index, order)


def to_torch(frozen: Tree, blocks: Mapping[str, Tree]) -> dict[str, np.ndarray]:
    """The state dict, float32 and contiguous: safetensors would write a transposed array wrongly.

    Args:
      frozen, blocks: name -> tree of arrays on the host; {} for none.
    """
    out = {}
    for collection, name, path, leaf in leaves(frozen, blocks):
        leaf = np.asarray(leaf, np.float32)
        for key, index, axes in entries(collection, name, path, leaf.shape):
            out[key] = np.ascontiguousarray(leaf[index] if axes is None else leaf[index].transpose(axes))
    return out


def from_torch(tensors: Mapping[str, np.ndarray], frozen: Tree, blocks: Mapping[str, Tree]) -> tuple[Tree, dict]:
    """The inverse of `to_torch`.

    Args:
      tensors: key -> float32 array; keys of no given tree are not looked at.
      frozen, blocks: name -> tree of shapes, the trees to fill.

    Returns:
      (frozen, blocks), NumPy arrays in float32.

    Raises:
      KeyError: a tensor that is missing. ValueError: one of another shape. Both name it.
    """
    out: dict[str, dict] = {"frozen": {}, "blocks": {}}
    for collection, name, path, like in leaves(frozen, blocks):
        leaf = np.empty(like.shape, np.float32)
        for key, index, axes in entries(collection, name, path, like.shape):
            tensor, target = tensors[key], leaf[index] if axes is None else leaf[index].transpose(axes)
            if tensor.shape != target.shape:
                raise ValueError(f"{key} is {list(tensor.shape)}, not {list(target.shape)}")
            target[...] = tensor
        tree = out[collection].setdefault(name, {})
        for step in path[:-1]:
            tree = tree.setdefault(step, {})
        tree[path[-1]] = leaf
    return out["frozen"], out["blocks"]


def leaves(frozen: Tree, blocks: Mapping[str, Tree]) -> Iterator[tuple[str, str, tuple[str, ...], Any]]:
    """Every leaf of name -> tree (nested dicts): "frozen" or "blocks", the tree's name, the path in it, the leaf."""
    for collection, trees in (("frozen", frozen), ("blocks", blocks)):
        for name, tree in trees.items():
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
                yield collection, name, tuple(str(entry.key) for entry in path), leaf
