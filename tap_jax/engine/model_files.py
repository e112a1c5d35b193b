"""Finished models on disk: one safetensors file per variant and client, so that one can be had without the others.

A key is a block's name, a colon, and the path of the leaf in the block: "mote/image/attention:lora.a".
"""

import os
import pathlib
import urllib.parse
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from tap_jax.blocks import Blocks
from tap_jax.errors import UserError
from tap_jax.whole_files import replaced


def model_file(folder: str | os.PathLike, variant: str, client: int, name: str = "") -> pathlib.Path:
    """Where the model is, or will be.

    Args:
      name: of a client that has one; letters that not every file system takes are written as in addresses, "%2F". The
        number tells names apart that differ in upper and lower case alone.
    """
    name = f"_{urllib.parse.quote(name, safe=' ')}" if name else ""
    return pathlib.Path(folder) / variant / f"client_{client:04d}{name}.safetensors"


def write_model(
    folder: str | os.PathLike, variant: str, client: int, blocks: Blocks, rounds: int, name: str = ""
) -> None:
    """Writes one client's blocks as they are after `rounds` rounds; the file is there whole or not at all.

    Raises:
      UserError: it cannot be written.
    """
    path = model_file(folder, variant, client, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    # safetensors writes the memory of an array as it lies, whatever its strides.
    tensors = {key: np.ascontiguousarray(leaf) for key, leaf in _leaves(blocks)}
    try:
        with replaced(path) as fresh:
            save_file(tensors, fresh, metadata={"rounds": str(rounds)})
    except SafetensorError as error:
        raise UserError(f"workdir: {path} cannot be written ({error}); free some space, and call train again") from None


def read_model(
    folder: str | os.PathLike, variant: str, client: int, like: Blocks, rounds: int, name: str = ""
) -> Blocks:
    """One client's blocks, in the shapes of `like`.

    Raises:
      UserError: the file is missing or damaged, or of another round.
    """
    path = model_file(folder, variant, client, name)
    try:
        with safe_open(path, "numpy") as file:
            if (file.metadata() or {}).get("rounds") != str(rounds):
                raise UserError(f"workdir: {path} is not of round {rounds}; train again")
            tensors = {key: file.get_tensor(key) for key, _ in _leaves(like)}
    except FileNotFoundError as error:
        raise UserError(f"workdir: {path} is missing; train again") from error
    except (SafetensorError, OSError) as error:
        raise UserError(f"workdir: {path} cannot be read ({error}); train again") from error
    return jax.tree.unflatten(jax.tree.structure(dict(like)), [tensors[key] for key, _ in _leaves(like)])


def _leaves(blocks: Blocks) -> Iterator[tuple[str, Any]]:
    for (block, *path), leaf in jax.tree_util.tree_leaves_with_path(dict(blocks)):
        yield f"{block.key}:{'.'.join(str(entry.key) for entry in path)}", leaf
