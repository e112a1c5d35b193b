"""Pre-trained weights from Hugging Face checkpoints of FLAVA and ViLT, of any size, into Ŵ.

    pretrained = load("facebook/flava-full", model, cache_dir="...")
    frozen, blocks = model.init(key, pretrained)

A checkpoint is a folder or a hub id with a config.json and weights in any format of `weight_files`; what goes where
is in `weight_tables`. Every name in the checkpoint is accounted for: missing, unknown, of a wrong shape or type, each
is an error that names it. Weights are read one at a time, so that conversion holds one copy of them (and beside it the
whole file where that is Flax's or from before PyTorch 1.6, which can be read in one piece only).
"""

import contextlib
import hashlib
import json
import logging
import os
import pathlib
import re
from collections.abc import Collection, Mapping

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from tap_jax import shipped
from tap_jax.errors import UserError
from tap_jax.models.accounting import shapes
from tap_jax.models.checkpoint_sizes import check_sizes, codebook_blocks, layer_counts, model_fields
from tap_jax.models.server_model import Pretrained, ServerModel
from tap_jax.models.weight_files import SHARDS, SINGLE, Weight, open_weights, weight_files
from tap_jax.models.weight_tables import PREFIX, Place, known_names, places
from tap_jax.whole_files import replaced

__all__ = ["check_sizes", "convert", "find", "load", "model_fields", "read"]

FORMAT = 1  # raise it when the conversion changes
WRAPPERS = ("module.", "_orig_mod.")  # what DataParallel and torch.compile put before names
HEADS = re.compile(r"(\w+_)?(heads?|classifier|score)(\.|$)")  # such as those of ViltForQuestionAnswering
_LOG = logging.getLogger(__name__)


def find(source: str) -> pathlib.Path:
    """The folder of a checkpoint: one that comes with the package, by name, `source` itself, or the hub's own cache.

    Of a hub checkpoint one format is fetched, safetensors before PyTorch's before Flax's.

    Raises:
      UserError: no such folder, or the hub cannot give it.
    """
    if (folder := pathlib.Path(shipped.located(source)).expanduser()).is_dir():
        return folder
    if source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise UserError(
            f"model.weights: no folder {source}; name a checkpoint's folder or a hub id,"
            f" or one that comes with the package: {', '.join(shipped.checkpoints())}"
        )
    from huggingface_hub import snapshot_download

    for name in SINGLE:
        patterns = ["config.json", name, f"{name}.index.json", *filter(None, [SHARDS.get(name)])]
        try:
            folder = pathlib.Path(snapshot_download(source, allow_patterns=patterns))
        except (OSError, ValueError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"model.weights: cannot get '{source}' from the hub ({reason}); check name and network,"
                " or name a local folder"
            ) from None
        with contextlib.suppress(UserError):
            weight_files(folder)
            break
    return folder


def load(source: str, model: ServerModel, *, cache_dir: str | os.PathLike | None = None) -> Pretrained:
    """The weights of a checkpoint as `model` stores them.

    Args:
      source: hub id or folder.
      model: its sizes must be the checkpoint's; its tasks decide which encoders are needed.
      cache_dir: where converted weights are kept; None: nowhere.

    Returns:
      NumPy arrays, float32, for `model.init`.

    Raises:
      UserError: whatever is wrong with the checkpoint or does not fit, in one line. A cache that is damaged or cannot
        be written is a warning.
    """
    folder = find(source)
    check_sizes(folder, model.config)
    frozen, blocks = shapes(model)
    wanted = places(model.config.name, {"frozen": frozen, "block": blocks})
    like = {"frozen": frozen, "block": blocks}
    cached = cache_dir and _cache_path(pathlib.Path(cache_dir), folder, wanted, like)
    trees = _read_cache(cached, wanted, like) if cached else None
    if trees is None:
        trees = convert(folder, model.config.name, wanted, like)
        if cached:
            _write_cache(cached, wanted, trees)
    return Pretrained(trees["frozen"], trees["block"])


def read(folder: pathlib.Path, name: str) -> dict[str, Weight]:
    """Every weight of a checkpoint folder by HF's name as the bare model has it, without prefix; none is read yet.

    Names that wrappers put a prefix before (`WRAPPERS`), and LayerNorm's from before PyTorch ("gamma", "beta"), are
    taken for what they mean. What a head of another class holds (`HEADS`) is left out.

    Args:
      folder: with config.json and weights.
      name: "flava" or "vilt".

    Raises:
      UserError: missing or damaged files, a name that no such checkpoint has, or one that is there twice.
    """
    weights = {}
    known = known_names(name, layer_counts(folder), codebook_blocks=codebook_blocks(folder))
    for key, weight in open_weights(folder).items():
        bare = _bare(key, name, known)
        if bare not in known and HEADS.match(bare):
            continue
        if key.startswith("base_model.model.") or ".base_layer." in key:
            raise UserError(
                f"model.weights: '{key}' in {folder / weight.file} is of a model with a PEFT adapter; merge it"
                " (merge_and_unload) and save that model"
            )
        if bare not in known:
            raise UserError(f"model.weights: '{key}' in {folder / weight.file} is not a weight of {name}")
        if bare in weights:
            raise UserError(
                f"model.weights: '{bare}' is in {folder} twice, with '{PREFIX[name]}' before it and without"
            )
        weights[bare] = weight
    return weights


def _bare(key: str, name: str, known: Collection[str]) -> str:
    """What the bare model of today calls a weight."""
    while wrapper := next((wrapper for wrapper in WRAPPERS if key.startswith(wrapper)), ""):
        key = key.removeprefix(wrapper)
    key = key.removeprefix(PREFIX[name])
    for old, new in ((".gamma", ".weight"), (".beta", ".bias")):
        if key.endswith(old) and (today := key.removesuffix(old) + new) in known:
            return today
    return key


def convert(folder: pathlib.Path, name: str, wanted: Mapping[str, Place], like: Mapping) -> dict[str, dict]:
    """Reads a checkpoint folder into {"frozen": ..., "block": ...}, NumPy arrays in float32.

    Args:
      folder: with config.json and weights.
      name: "flava" or "vilt".
      wanted: HF's name -> place.
      like: {"frozen": ..., "block": ...} with shapes as leaves; of them those come back that `wanted` fills.

    Raises:
      UserError: a weight that is missing, unknown, of another shape or type than it should be, or not all numbers.
    """
    weights = read(folder, name)
    for key in wanted:
        if key not in weights:
            raise UserError(f"model.weights: '{key}' is missing in {folder}; use a whole checkpoint")
    trees = _empty(wanted, like)
    for key, place in wanted.items():
        weight = weights.pop(key)
        target = place.leaf(trees)[place.index]
        shape = place.transform.theirs(np.broadcast_to(np.float32(0), target.shape)).shape
        if weight.shape != shape:
            raise UserError(f"model.weights: '{key}' in {folder / weight.file} has shape {weight.shape}, not {shape}")
        if weight.dtype not in ("float32", "float16", "bfloat16"):  # what float32 holds exactly
            raise UserError(f"model.weights: '{key}' in {folder / weight.file} is {weight.dtype}, not float32")
        target[...] = place.transform.ours(weight.read())
        if not np.isfinite(target).all():
            raise UserError(f"model.weights: '{key}' in {folder / weight.file} holds values that are no numbers")
    return trees


def _empty(wanted: Mapping[str, Place], like: Mapping) -> dict[str, dict]:
    """Uninitialised arrays for all leaves that `wanted` fills."""
    trees: dict[str, dict] = {"frozen": {}, "block": {}}
    for place in wanted.values():
        node = trees[place.tree]
        for name in place.path[:-1]:
            node = node.setdefault(name, {})
        if place.path[-1] not in node:
            node[place.path[-1]] = np.empty(place.leaf(like).shape, np.float32)
    return trees


# --- converted weights on disk: one safetensors file, "tree:entry:leaf" -> array -----------------------------------


def _leaf_name(place: Place) -> str:
    return f"{place.tree}:{place.path[0]}:{'.'.join(place.path[1:])}"


def _cache_path(cache_dir: pathlib.Path, folder: pathlib.Path, wanted: Mapping[str, Place], like) -> pathlib.Path:
    """A file name that changes with the checkpoint's files and with what is taken from them."""
    stats = [(str(path.resolve()), path.stat()) for path in (*weight_files(folder), folder / "config.json")]
    files = [(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats]
    leaves = sorted({(_leaf_name(place), place.leaf(like).shape) for place in wanted.values()})
    digest = hashlib.sha256(json.dumps([FORMAT, files, leaves]).encode()).hexdigest()[:16]
    return cache_dir / f"weights-{digest}.safetensors"


def _write_cache(path: pathlib.Path, wanted: Mapping[str, Place], trees: dict[str, dict]) -> None:
    """Stores converted weights; a reader meanwhile sees the whole file or none. A full disk costs only time."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replaced(path, shared=True) as fresh:
            save_file({_leaf_name(place): place.leaf(trees) for place in wanted.values()}, fresh)
    except (OSError, SafetensorError) as error:
        _LOG.warning("model.weights: converted weights are not kept in %s (%s)", path.parent, error)


def _read_cache(path: pathlib.Path, wanted: Mapping[str, Place], like: Mapping) -> dict[str, dict] | None:
    """The stored trees, or None where there is no usable file."""
    trees = _empty(wanted, like)
    try:
        with safe_open(path, framework="numpy") as file:
            for name, place in {_leaf_name(place): place for place in wanted.values()}.items():
                place.leaf(trees)[...] = file.get_tensor(name)
        return trees
    except FileNotFoundError:
        return None
    except (SafetensorError, OSError, ValueError) as error:
        _LOG.warning("model.weights: %s is damaged (%s); converting anew", path, error)
        return None
