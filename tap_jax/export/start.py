"""An exported PyTorch folder as the start of a run (`model.start_from`)."""

import json
import os
import pathlib
import tempfile
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import safetensors
import safetensors.numpy

from tap_jax.blocks import Blocks, Tree
from tap_jax.data.text import WordPiece
from tap_jax.errors import UserError
from tap_jax.export import naming, torch_model
from tap_jax.models.accounting import shapes
from tap_jax.models.server_model import ServerModel

# Sizes of a model that shapes do not show, or not well; a run that starts from an export must have the same.
_SAME = (
    "name", "width", "heads", "mlp", "image_size", "patch", "upsample", "vocab", "backbone", "backbone_layers",
    "bottleneck", "qv_delta", "encoder_rank", "attention_rank", "expert_rank", "lora_alpha_ratio", "head_hidden",
    "head_activation", "head_layer_norm", "text_heads", "text_cond_heads", "condition", "position", "position_grid",
    "layer_norm_eps",
)  # fmt: skip
_UNSAID = {"backbone": "routed", "bottleneck": 0}  # by exports from before there was a choice


class Start(NamedTuple):
    """What a run can take from an export.

    Attributes:
      frozen, blocks: the trees that both have, NumPy arrays in float32, by the names of `ServerModel.init`.
      notes: one line each for what only one of the two has.
    """

    frozen: Tree
    blocks: Blocks
    notes: tuple[str, ...]


def read_torch(folder: str | os.PathLike, model: ServerModel, *, tokenizer: WordPiece | None = None) -> Start:
    """Frozen weights and blocks of an exported folder, for a run of another federation or of the same.

    Args:
      folder: as `write_torch` wrote it.
      model: of the run. tokenizer: of the run; its word pieces must be the folder's.

    Returns:
      The trees that both have, bit for bit as exported.

    Raises:
      UserError: not such a folder, a damaged or incomplete file, weights that are not all numbers, sizes or word pieces
        that differ, no block in common.
    """
    folder, field = pathlib.Path(folder), "model.start_from"
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    except (OSError, ValueError, AttributeError, safetensors.SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{field}: cannot read {folder} ({reason}); name a folder of --format=torch") from None
    if not isinstance(config, dict) or config.get("format") != torch_model.FORMAT or "model" not in config:
        raise UserError(f"{field}: {folder} is no export of --format=torch; name one")
    _same_sizes(config["model"], model, field)
    theirs = folder / "tokenizer" / "vocab.txt"
    if tokenizer is not None and theirs.is_file() and theirs.read_text(encoding="utf-8") != _vocabulary(tokenizer):
        raise UserError(f"{field}: the run's word pieces differ from the export's; set data.tokenizer={theirs.parent}")
    for key, value in tensors.items():
        if key.split(".")[0] not in ("frozen", "blocks") or key.count(".") < 2:
            raise UserError(f"{field}: {folder}/model.safetensors: '{key}' is no weight of an export")
        if not np.isfinite(value).all():
            raise UserError(f"{field}: {folder}/model.safetensors: '{key}' holds values that are no numbers")
    present = {tuple(key.split(".")[:2]) for key in tensors}
    wanted = dict(zip(("frozen", "blocks"), shapes(model), strict=True))
    common = {
        collection: {n: tree for n, tree in trees.items() if (collection, n) in present}
        for collection, trees in wanted.items()
    }
    if not common["blocks"]:
        raise UserError(f"{field}: {folder} has no block of this federation; drop it or export other tasks")
    try:
        _check_tensors(tensors, **common)
        frozen, blocks = naming.from_torch(tensors, **common)
    except (KeyError, ValueError) as error:
        found = error.args[0]
        raise UserError(f"{field}: {folder}/model.safetensors: {found}; name an export of the run's sizes") from None
    here = {f"{collection} {name}" for collection, trees in wanted.items() for name in trees}
    there = {" ".join(name) for name in present}
    notes = []
    for names, what in ((here - there, "not in the export, as initialised"), (there - here, "of the export, unused")):
        if names:
            notes.append(f"{field}: {what}: {', '.join(sorted(name.removeprefix('blocks ') for name in names))}")
    return Start(frozen, blocks, tuple(notes))


def _same_sizes(theirs: Mapping, model: ServerModel, field: str) -> None:
    if not isinstance(theirs, Mapping):
        raise UserError(f"{field}: the export's config.json has no sizes; name a folder of --format=torch")
    for name in _SAME:
        mine = getattr(model.config, name)
        mine = list(mine) if isinstance(mine, tuple) else mine
        found = theirs.get(name, _UNSAID.get(name))
        if found != mine:
            raise UserError(f"{field}: the export has model.{name} = {found}, the run {mine}; make them equal")


def _check_tensors(tensors: Mapping[str, np.ndarray], frozen: Tree, blocks: Tree) -> None:
    """Raises on a tensor that a common tree lacks or has too many, or that is no float32."""
    given = {key for key in tensors if key.split(".")[1] in {"frozen": frozen, "blocks": blocks}[key.split(".")[0]]}
    expected = {
        entry.key
        for collection, name, path, leaf in naming.leaves(frozen, blocks)
        for entry in naming.entries(collection, name, path, leaf.shape)
    }
    for key in sorted(given ^ expected):
        raise ValueError(f"{key} is {'missing' if key in expected else 'unknown'}")
    for key in sorted(given):
        if tensors[key].dtype != np.float32:
            raise ValueError(f"{key} is {tensors[key].dtype}, not float32")


def _vocabulary(tokenizer: WordPiece) -> str:
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(folder)
        return (pathlib.Path(folder) / "vocab.txt").read_text(encoding="utf-8")
