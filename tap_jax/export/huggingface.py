"""A client's encoders as a Hugging Face folder: FlavaModel or ViltModel with LoRA merged into the weights.

config.json, model.safetensors  for `FlavaModel.from_pretrained(folder)`
tap_export.json                 where it comes from, and how far its outputs are from the JAX model's
README.md                       what is in it, and what is not
"""

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import safetensors.torch

from tap_jax.blocks import Blocks, Tree
from tap_jax.export import hf_model
from tap_jax.export.staging import staged, write_json
from tap_jax.models.server_model import ServerModel


def write_huggingface(
    model: ServerModel,
    frozen: Tree,
    blocks: Blocks,
    out: str | os.PathLike,
    *,
    source: str | None = None,
    origin: Mapping[str, Any] | None = None,
) -> float:
    """Writes the folder, having loaded what was written and compared its encoders with the JAX model's.

    Args:
      model: of the tasks to export, computing in float32.
      frozen, blocks: by name, float32; of the blocks the encoders' are used.
      out: a new or empty folder.
      source: the checkpoint that the run started from (folder or hub id), for weights that our model does not store:
        poolers, further layers, projections. None: they are as HF initialises them, which the README says.
      origin: goes into tap_export.json as it is.

    Returns:
      The largest difference of the encoders' outputs, relative to the largest output of the encoder.

    Raises:
      UserError: the encoders have bottleneck adapters, `out` is in use, `source` is not where Ŵ comes from, or the
        outputs differ by more than `hf_model.TOLERANCE`; then nothing is left behind.
    """
    hf_model.refuse_bottlenecks(model, "huggingface")
    frozen, blocks = jax.device_get(
        (dict(frozen), {n: blocks[n] for n in map("encoder/{}".format, hf_model.encoders(model))})
    )
    if source is not None:
        hf_model.check_source(model, frozen, source)
    with staged(out) as folder, hf_model.quiet():
        theirs, fresh = hf_model.build(model, hf_model.merge(model.config, frozen, blocks), blocks, source)
        kind = type(theirs).__name__
        theirs.config.architectures = [kind]
        theirs.config.save_pretrained(folder)
        tensors = {key: tensor.contiguous() for key, tensor in theirs.state_dict().items()}
        safetensors.torch.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        del theirs, tensors
        found = check(folder, model, frozen, blocks)
        report = {"format": "huggingface", **(origin or {}), "weights": source}
        report |= {"max_difference": max(found.values()), "differences": found, "initialised": fresh}
        write_json(folder / "tap_export.json", report)
        (folder / "README.md").write_text(_readme(kind, source, fresh, report), encoding="utf-8")
    return report["max_difference"]


def check(folder: pathlib.Path, model: ServerModel, frozen: Tree, blocks: Blocks) -> dict[str, float]:
    """`hf_model.differences` of a written folder, which raises what that does; frozen, blocks: LoRA unmerged."""
    theirs = hf_model.CLASSES[model.config.name].from_pretrained(folder, local_files_only=True).eval()
    return hf_model.differences(model, frozen, blocks, theirs)


def _readme(kind: str, source: str | None, fresh: Sequence[str], report: Mapping[str, Any]) -> str:
    rest = f"comes from {source}" if source else "was not at hand and is as Hugging Face initialises it"
    names = "".join(f"- `{name}`\n" for name in fresh) or "- none\n"
    lines = "".join(f"- {key}: {value}\n" for key, value in report.items() if key != "initialised")
    return f"""# A client's encoders for Hugging Face

```python
from transformers import {kind}

model = {kind}.from_pretrained(".")  # this folder
```

The encoders' LoRA is merged into the weights. What our model does not store {rest}.
Not in this folder: the image adaptor before the encoder, the projection behind it, the backbone's adapters and the
heads (`--format=peft` and `--format=torch` have them). The backbone's layers are the frozen ones.

Weights at their initial values:

{names}
Where it comes from:

{lines}"""
