"""The file formats of Hugging Face checkpoints: what is in a folder, tensor by tensor, read when asked for.

`model.safetensors`, `pytorch_model.bin` (both also in shards) and Flax's `flax_model.msgpack`. Whatever the format,
names and layouts are PyTorch's. Reading never runs code: a pickle that holds more than tensors is refused.
"""

import contextlib
import dataclasses
import functools
import json
import mmap
import pathlib
import pickle
import zipfile
from collections.abc import Callable, Iterator

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from tap_jax.errors import UserError

SINGLE = ("model.safetensors", "pytorch_model.bin", "flax_model.msgpack")  # in order of preference
SHARDS = {"model.safetensors": "model-*.safetensors", "pytorch_model.bin": "pytorch_model-*.bin"}
_POINTER = b"version https://git-lfs"  # how the file begins that a clone without Git LFS has
_SAFETENSORS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64", "I64": "int64"}


@dataclasses.dataclass(frozen=True)
class Weight:
    """One tensor of a checkpoint.

    Attributes:
      file: name of the file it lies in.
      dtype: its type there: "float32", "float16", "bfloat16", "float64", "int64"; others by whatever name the format
        has for them ("int32", "I32").
      shape: as PyTorch has it.
      read: () -> the array, perhaps a view of the mapped file; bfloat16 may come as float32.
    """

    file: str
    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


def weight_files(folder: pathlib.Path) -> tuple[pathlib.Path, ...]:
    """The files that hold the folder's weights: one, or the shards that an index lists.

    Raises:
      UserError: there are none, a shard is missing, or the index is damaged.
    """
    for name in SINGLE:
        if (folder / name).is_file():
            return (folder / name,)
        index = folder / f"{name}.index.json"
        if name in SHARDS and index.is_file():
            return tuple(folder / shard for shard in dict.fromkeys(_weight_map(index).values()))
    if (folder / "adapter_config.json").is_file():
        raise UserError(
            f"model.weights: {folder} is a PEFT adapter without its model; merge both (merge_and_unload) and save that"
        )
    raise UserError(
        f"model.weights: no weights in {folder}; it must hold one of {', '.join(SINGLE)}, whole or in shards"
    )


def _weight_map(index: pathlib.Path) -> dict[str, str]:
    """Tensor -> shard."""
    try:
        found = dict(json.loads(index.read_text())["weight_map"])
        if not found:
            raise ValueError("no shards")
    except (ValueError, KeyError, TypeError):
        raise UserError(f"model.weights: {index} is no index of shards; download it again") from None
    for shard in dict.fromkeys(map(str, found.values())):  # once each: they have thousands of tensors
        if pathlib.Path(shard).name != shard:
            raise UserError(f"model.weights: {index} names {shard!r}, which is no file beside it; download it again")
        if not (index.parent / shard).is_file():
            raise UserError(f"model.weights: {index.parent / shard} is missing; download it again")
    return found


def open_weights(folder: pathlib.Path) -> dict[str, Weight]:
    """Every tensor of a checkpoint folder by its name there, in PyTorch's layout.

    Raises:
      UserError: no weights, a damaged file, a pickle that holds code or anything but named dense tensors, a tensor that
        is in two shards or not in the one that the index says; one line each.
    """
    found: dict[str, Weight] = {}
    for path in weight_files(folder):
        read = {".safetensors": _safetensors, ".bin": _pickled, ".msgpack": _msgpack}[path.suffix]
        for name, weight in read(path):
            if name in found:
                raise UserError(f"model.weights: '{name}' is in {found[name].file} and in {path.name}; remove one")
            found[name] = weight
    for single in SHARDS:
        index = folder / f"{single}.index.json"
        if index.is_file() and not (folder / single).is_file() and path.suffix == pathlib.Path(single).suffix:
            for name, shard in _weight_map(index).items():
                if name not in found or found[name].file != shard:
                    raise UserError(f"model.weights: '{name}' is not in {folder / shard}; download it again")
    return found


def _damaged(path: pathlib.Path, error: Exception) -> UserError:
    with contextlib.suppress(OSError), open(path, "rb") as file:
        if file.read(len(_POINTER)) == _POINTER:
            return UserError(
                f"model.weights: {path} is a pointer of Git LFS and not the file; call `git lfs pull` there"
            )
    reason = (str(error).splitlines() or [""])[0][:120].strip() or type(error).__name__
    return UserError(f"model.weights: {path} is damaged or incomplete ({reason}); download it again")


def _safetensors(path: pathlib.Path) -> Iterator[tuple[str, Weight]]:
    try:
        file = safe_open(path, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error) from None
    # Of tied weights one is stored, and what else it is called is in the metadata (`safetensors.torch.save_model`).
    stored = {name: name for name in file.keys()}
    aliases = {alias: name for alias, name in (file.metadata() or {}).items() if name in stored and alias not in stored}
    for name, at in (stored | aliases).items():
        like = file.get_slice(at)
        dtype = like.get_dtype()
        yield (
            name,
            Weight(
                path.name,
                _SAFETENSORS.get(dtype, dtype),
                tuple(like.get_shape()),
                functools.partial(file.get_tensor, at),
            ),
        )


def _pickled(path: pathlib.Path) -> Iterator[tuple[str, Weight]]:
    import torch  # here alone: a run on safetensors does without it

    try:
        # Files from before PyTorch 1.6 are no zip archives and cannot be mapped.
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError:
        raise UserError(
            f"model.weights: {path} holds more than tensors and could run code when loaded, or is damaged;"
            " use a checkpoint in safetensors"
        ) from None
    except Exception as error:  # torch raises RuntimeError, EOFError, KeyError, ValueError, ... for damage
        raise _damaged(path, error) from None
    if not isinstance(tensors, dict):
        raise UserError(f"model.weights: {path} holds a {type(tensors).__name__}, not named tensors; save a state_dict")
    for name, tensor in tensors.items():
        named = isinstance(name, str) and isinstance(tensor, torch.Tensor)
        if not named or tensor.layout != torch.strided:
            raise UserError(f"model.weights: {path} holds {name!r}, which is no named dense tensor; save a state_dict")
        yield name, Weight(path.name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), _reader(tensor))


def _reader(tensor) -> Callable[[], np.ndarray]:
    import torch

    tensor = tensor.detach()  # some files hold parameters
    return lambda: (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _msgpack(path: pathlib.Path) -> Iterator[tuple[str, Weight]]:
    from flax.serialization import msgpack_restore

    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            tree = msgpack_restore(mapped)
    except Exception as error:  # msgpack raises ValueError, ExtraData, OutOfData, ... for damage
        raise _damaged(path, error) from None
    if not isinstance(tree, dict):
        raise UserError(f"model.weights: {path} holds a {type(tree).__name__}, not a tree of arrays")
    for name, array in _flax_leaves(tree.get("params", tree) if len(tree) == 1 else tree, ""):
        if not isinstance(array, np.ndarray):
            raise UserError(f"model.weights: {path} holds '{name}', which is no array; save the parameters alone")
        yield name, Weight(path.name, jnp.dtype(array.dtype).name, array.shape, lambda array=array: array)


def _flax_leaves(tree: dict, prefix: str) -> Iterator[tuple[str, np.ndarray]]:
    """Leaves under PyTorch's names and in its layouts, as transformers names them.

    A Dense kernel is transposed, a Conv kernel is height × width × in × out.
    """
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _flax_leaves(value, f"{prefix}{name}.")
        elif name == "kernel" and np.ndim(value) in (2, 4):
            yield f"{prefix}weight", value.T if np.ndim(value) == 2 else value.transpose(3, 2, 0, 1)
        else:
            yield prefix + ("weight" if name in ("scale", "embedding", "kernel") else str(name)), value
