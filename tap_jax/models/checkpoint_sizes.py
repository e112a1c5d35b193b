"""A checkpoint's config.json against the run's sizes: what the checkpoint fixes, and where the two disagree."""

import json
import os
import pathlib
from typing import TYPE_CHECKING, Any

from tap_jax.errors import UserError
from tap_jax.models.layers import ModelConfig

if TYPE_CHECKING:
    import transformers

# Our field -> where config.json has it.
_SIZES: dict[str, dict[str, tuple[str, ...]]] = {
    "flava": {
        "width": ("image_config.hidden_size", "text_config.hidden_size", "multimodal_config.hidden_size"),
        "heads": tuple(f"{part}_config.num_attention_heads" for part in ("image", "text", "multimodal")),
        "mlp": tuple(f"{part}_config.intermediate_size" for part in ("image", "text", "multimodal")),
        "image_layers": ("image_config.num_hidden_layers",),
        "text_layers": ("text_config.num_hidden_layers",),
        "image_size": ("image_config.image_size",),
        "patch": ("image_config.patch_size",),
        "vocab": ("text_config.vocab_size",),
        "text_positions": ("text_config.max_position_embeddings",),
        "layer_norm_eps": tuple(f"{part}_config.layer_norm_eps" for part in ("image", "text", "multimodal")),
    },
    "vilt": {
        "width": ("hidden_size",),
        "heads": ("num_attention_heads",),
        "mlp": ("intermediate_size",),
        "patch": ("patch_size",),
        "vocab": ("vocab_size",),
        "text_positions": ("max_position_embeddings",),
        "position_grid": ("image_size",),  # in pixels there
        "layer_norm_eps": ("layer_norm_eps",),
    },
}
# What our layers take for granted.
_FIXED = {"hidden_act": "gelu", "qkv_bias": True, "num_channels": 3, "type_vocab_size": 2}
_LAYERS = {
    "flava": {f"{part}_model.encoder.layer": f"{part}_config.num_hidden_layers" for part in ("image", "text")}
    | {"multimodal_model.encoder.layer": "multimodal_config.num_hidden_layers"},
    "vilt": {"encoder.layer": "num_hidden_layers"},
}


def huggingface_config(folder: pathlib.Path) -> "transformers.FlavaConfig | transformers.ViltConfig":
    """The checkpoint's config.json as a transformers config (FlavaConfig or ViltConfig), defaults filled in.

    Raises:
      UserError: none there, a damaged one, or that of another architecture.
    """
    import transformers  # slow to import

    try:
        values = json.loads((folder / "config.json").read_text())
        kind = values["model_type"]
    except FileNotFoundError:
        raise UserError(f"model.weights: no config.json in {folder}; name the folder of a whole checkpoint") from None
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"model.weights: {folder / 'config.json'} is no model's; download it again") from None
    classes = {"flava": transformers.FlavaConfig, "vilt": transformers.ViltConfig}
    if kind not in classes:
        raise UserError(f"model.weights: {folder} is a checkpoint of '{kind}'; use one of {', '.join(classes)}")
    try:
        return classes[kind].from_dict(values)
    except Exception as error:  # the classes check their fields by errors of many types
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"model.weights: {folder / 'config.json'} is not {kind}'s ({reason})") from None


def _get(config: Any, field: str) -> Any:
    for part in field.split("."):
        config = getattr(config, part)
    return config


def _size(config: Any, name: str, field: str) -> Any:
    """The value that our field `name` has in a checkpoint, read at `field` of its config."""
    value = _get(config, field)
    if isinstance(value, (list, tuple)) and len(set(value)) == 1:
        value = value[0]
    if not isinstance(value, (int, float)):
        raise UserError(f"model.weights: config.json has {field} = {value}; only square images and patches are known")
    if value <= 0 and isinstance(value, int):
        raise UserError(f"model.weights: config.json has {field} = {value}; download it again")
    return value // _size(config, "patch", "patch_size") if name == "position_grid" else value


def model_fields(folder: str | os.PathLike) -> dict[str, Any]:
    """The fields of `ModelConfig` that a checkpoint fixes, with its values: {"name": "flava", "width": 768, ...}.

    Raises:
      UserError: no config.json of FLAVA or ViLT, or sizes in it that no model has.
    """
    config = huggingface_config(pathlib.Path(folder))
    sizes = _SIZES[config.model_type]
    return {"name": config.model_type} | {name: _size(config, name, fields[0]) for name, fields in sizes.items()}


def check_sizes(folder: pathlib.Path, config: ModelConfig) -> None:
    """Compares a checkpoint's config.json with the run's sizes.

    Raises:
      UserError: no config.json, or that of the other model; one line with every field that differs and the value to
        set; or what our layers do not have (another activation, projections without bias, ...).
    """
    theirs = huggingface_config(folder)
    if theirs.model_type != config.name:
        raise UserError(
            f"model.name: '{config.name}', but the checkpoint {folder} is of '{theirs.model_type}';"
            f" set model.name={theirs.model_type} or other model.weights"
        )
    wrong = {}
    for name, fields in _SIZES[config.name].items():
        ours = config.text_rows if name == "text_positions" else getattr(config, name)
        for field in fields:
            if (value := _size(theirs, name, field)) != ours:
                wrong.setdefault(name, (ours, value, field))
    layers = _get(theirs, "multimodal_config.num_hidden_layers" if config.name == "flava" else "num_hidden_layers")
    if sum(config.backbone_layers) > layers:
        wrong["backbone_layers"] = (config.backbone_layers, f"{layers} layers in all", "num_hidden_layers")
    if wrong:
        found = ", ".join(f"model.{name}: {a}, but the checkpoint has {b} ({at})" for name, (a, b, at) in wrong.items())
        remedy = ",".join(f"model.{name}={b}" for name, (_, b, _) in wrong.items() if name != "backbone_layers")
        raise UserError(
            f"{found}; set {remedy or 'fewer layers'}, or use other model.weights; random ones: model.weights="
        )
    parts = ("image_config", "text_config", "multimodal_config") if config.name == "flava" else ("",)
    for part in parts:
        for field, needed in _FIXED.items():
            value = getattr(_get(theirs, part) if part else theirs, field, needed)
            if value != needed:
                field = f"{part}.{field}" if part else field
                raise UserError(f"model.weights: config.json has {field} = {value}; only {needed} is supported")


def layer_counts(folder: pathlib.Path) -> dict[str, int]:
    """HF's name of each layer list ("text_model.encoder.layer") -> how many layers the checkpoint has there.

    Raises:
      UserError: as `huggingface_config`.
    """
    config = huggingface_config(folder)
    return {stack: _get(config, field) for stack, field in _LAYERS[config.model_type].items()}


def codebook_blocks(folder: pathlib.Path) -> int:
    """Blocks per group of FLAVA's image codebook; 0 in ViLT.

    Raises:
      UserError: as `huggingface_config`.
    """
    return getattr(getattr(huggingface_config(folder), "image_codebook_config", None), "num_blocks_per_group", 0)
