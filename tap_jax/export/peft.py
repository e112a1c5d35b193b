"""A client's encoder LoRA as PEFT adapters for FlavaModel or ViltModel, and its other trained weights beside them.

adapter_config.json, adapter_model.safetensors  for `PeftModel.from_pretrained(model, folder)`
embeddings.safetensors  ViLT's trained CLS token and positions, by HF's names
tap_blocks.safetensors  all other trained weights, by the names of `--format=torch`
tap_export.json         where it comes from, and how far its outputs are from the JAX model's
README.md               how to use it
"""

import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import safetensors.numpy
import safetensors.torch

from tap_jax.blocks import Blocks, Tree
from tap_jax.errors import UserError
from tap_jax.export import hf_model, naming
from tap_jax.export.staging import staged, write_json
from tap_jax.models.layers import ModelConfig
from tap_jax.models.server_model import ServerModel
from tap_jax.models.weight_tables import TABLES, places, to_huggingface


def write_peft(
    model: ServerModel,
    frozen: Tree,
    blocks: Blocks,
    out: str | os.PathLike,
    *,
    source: str | None = None,
    origin: Mapping[str, Any] | None = None,
) -> float:
    """Writes the folder, having loaded it with PEFT and compared the encoders with the JAX model's.

    Args:
      model: of the tasks to export, computing in float32.
      frozen, blocks: by name, float32.
      out: a new or empty folder.
      source: the checkpoint that the run started from (folder or hub id): the adapters' base model. None where Ŵ is
        not known to be one's (random stand-ins, an export's); then BASE may be no published model, as the README says.
      origin: goes into tap_export.json as it is.

    Returns:
      The largest difference of the encoders' outputs, relative to the largest output of the encoder.

    Raises:
      UserError: PEFT is not installed, no LoRA in the encoders, ViLT's position table is sliced, `out` is in use,
        `source` is not where Ŵ comes from, PEFT does not find what was written, or the outputs differ by more than
        `hf_model.TOLERANCE`; then nothing is left behind.
    """
    try:
        import peft
    except ImportError:
        raise UserError("format: 'peft' needs the package of that name; pip install peft") from None
    c = model.config
    hf_model.refuse_bottlenecks(model, "peft")
    frozen, blocks = jax.device_get((dict(frozen), {name: blocks[name] for name in model.block_names}))
    if c.name == "vilt" and c.position == "slice" and "image" in hf_model.encoders(model):
        raise UserError("model.position: 'slice' is not what ViltModel does; export as huggingface or torch")
    tensors, modules = adapters(model, frozen, blocks)
    if not tensors:
        raise UserError("format: 'peft' needs a LoRA in an encoder, and these tasks have none; export as torch")
    if source is not None:
        hf_model.check_source(model, frozen, source)
    with staged(out) as folder, hf_model.quiet():
        kind = hf_model.CLASSES[c.name]
        config = peft.LoraConfig(
            r=c.encoder_rank,
            lora_alpha=alpha(c),
            lora_dropout=c.lora_dropout,
            target_modules=sorted(modules),
            inference_mode=True,
            base_model_name_or_path=source,
        )
        config.auto_mapping = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
        config.save_pretrained(folder)
        safetensors.numpy.save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
        embeddings = {key: np.ascontiguousarray(value) for key, value in to_huggingface(c.name, {}, blocks).items()}
        if embeddings:
            safetensors.numpy.save_file(embeddings, folder / "embeddings.safetensors", {"format": "pt"})
        rest = naming.to_torch({}, {name: _without(blocks[name], name, c.name) for name in blocks})
        safetensors.numpy.save_file(rest, folder / "tap_blocks.safetensors", {"format": "pt"})
        found = check(folder, model, frozen, blocks, source)
        report = {"format": "peft", **(origin or {}), "weights": source}
        report |= {"max_difference": max(found.values()), "differences": found}
        write_json(folder / "tap_export.json", report)
        (folder / "README.md").write_text(_readme(kind.__name__, source, bool(embeddings), report), encoding="utf-8")
    return report["max_difference"]


def alpha(c: ModelConfig) -> float:
    """PEFT's lora_alpha; the adapter's output is multiplied by alpha / rank."""
    return c.lora_alpha_ratio * c.encoder_rank


def adapters(model: ServerModel, frozen: Tree, blocks: Blocks) -> tuple[dict[str, np.ndarray], set[str]]:
    """PEFT's tensors by its names, float32, and the modules of FlavaModel or ViltModel that they belong to.

    A [inputs, R] and B [R, outputs] become lora_A (R, inputs) and lora_B (outputs, R); for a convolution lora_A is one
    of the same kernel to R channels and lora_B one of 1×1.
    """
    tensors, modules = {}, set()
    for key, place in places(model.config.name, {"frozen": frozen, "block": {}}).items():
        adapter = blocks.get(place.path[0], {})
        for name in place.path[1:-1]:
            adapter = adapter.get(name, {})
        if "lora" not in adapter or place.path[-1] != "kernel":
            continue
        a, b = (adapter["lora"][letter][place.index] for letter in "ab")
        module = key.removesuffix(".weight")
        theirs = {"lora_A": place.transform.theirs(a), "lora_B": b.T}
        if theirs["lora_A"].ndim == 4:
            theirs["lora_B"] = b.T[:, :, None, None]
        for name, value in theirs.items():
            tensors[f"base_model.model.{module}.{name}.weight"] = np.ascontiguousarray(value, np.float32)
        modules.add(module)
    return tensors, modules


def _without(block: Tree, name: str, model: str) -> Tree:
    """A block without what the other two files hold."""
    if not name.startswith("encoder/"):
        return block
    held = {where.split(":")[2] for _, where, _ in TABLES[model] if where.startswith(f"block:{name}:")}

    def kept(tree: Tree) -> Tree:
        inner = {
            key: kept(value) if isinstance(value, Mapping) else value for key, value in tree.items() if key != "lora"
        }
        return {key: value for key, value in inner.items() if not isinstance(value, Mapping) or value}

    return {key: value for key, value in kept(block).items() if key not in held}


def check(
    folder: pathlib.Path, model: ServerModel, frozen: Tree, blocks: Blocks, source: str | None
) -> dict[str, float]:
    """`hf_model.differences` of HF's model with the written adapters on it, as PEFT loads them.

    Args:
      source: the base model, see `write_peft`.

    Raises:
      UserError: PEFT does not find all adapters that were written, or what `hf_model.differences` raises.
    """
    import peft

    theirs, _ = hf_model.build(model, frozen, {}, source)
    embeddings = folder / "embeddings.safetensors"
    if embeddings.exists():
        theirs.load_state_dict(safetensors.torch.load_file(embeddings), strict=False)
    adapted = peft.PeftModel.from_pretrained(theirs, folder).eval()
    written = set(safetensors.numpy.load_file(folder / "adapter_model.safetensors"))
    read = {key.replace(".default", "") for key in adapted.state_dict() if ".lora_" in key}
    if read != written:  # PEFT only warns
        raise UserError(f"export: PEFT does not find {sorted(read ^ written)[0]}; nothing was written")
    return hf_model.differences(model, frozen, blocks, adapted.base_model.model)


def _readme(kind: str, source: str | None, embeddings: bool, report: Mapping[str, Any]) -> str:
    base = f'"{source}"' if source else "BASE"
    load = (
        'model.load_state_dict(load_file("embeddings.safetensors"), strict=False)  # trained CLS token and positions\n'
    )
    note = "" if source else (
        "\nThe frozen weights are not known to be a checkpoint's (random stand-ins, or an export's), so BASE may\n"
        "be no published one; the model as a whole is in `--format=torch`, its encoders in `--format=huggingface`.\n"
    )  # fmt: skip
    lines = "".join(f"- {key}: {value}\n" for key, value in report.items())
    return f"""# A client's adapters for PEFT

```python
from peft import PeftModel
{"from safetensors.torch import load_file" + chr(10) if embeddings else ""}from transformers import {kind}

model = {kind}.from_pretrained({base})
{load if embeddings else ""}model = PeftModel.from_pretrained(model, ".")  # this folder
```
{note}
The adapters are the LoRA of the encoders. `tap_blocks.safetensors` holds the client's other trained weights, under the
names they have in `--format=torch` and in PyTorch's layouts: the image adaptor before the encoder
(`blocks.encoder/image.adaptor`), the projection behind each (`.output`), the adapters of the backbone (the routed one's
in `blocks.mote/...` and `blocks.mome/...`, the standard one's in `blocks.backbone`), the routed one's shared projection
and the heads. `torch_model.py` of that format says how they
act together.

Where it comes from:

{lines}"""
