"""Exported PyTorch folders: written, and compared with the JAX model before they take their place.

config.json        sizes, tasks, routes, names of blocks: all that `torch_model.load` needs
model.safetensors  every weight once, LoRA unmerged
torch_model.py     the model's code; needs torch and safetensors only
tokenizer/         word pieces, where a task reads or writes text
tap_export.json    where the model comes from, and how far PyTorch's outputs are from JAX's
README.md          how to use it
"""

import dataclasses
import os
import pathlib
import shutil
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import safetensors
import safetensors.numpy
import torch

from tap_jax.blocks import Blocks, Tree
from tap_jax.data.text import WordPiece
from tap_jax.errors import UserError
from tap_jax.export import naming, torch_model
from tap_jax.export.staging import staged, write_json
from tap_jax.models import backbone
from tap_jax.models.server_model import ServerModel
from tap_jax.platforms import compiler_options
from tap_jax.tasks import Stream, Task

TOLERANCE = 1e-4  # of the largest output; what is further off is not written


def write_torch(
    model: ServerModel,
    frozen: Tree,
    blocks: Blocks,
    out: str | os.PathLike,
    *,
    tokenizer: WordPiece | None = None,
    origin: Mapping[str, Any] | None = None,
) -> float:
    """Writes a client's model as a folder, having compared its outputs with the JAX model's.

    Args:
      model: of the tasks to export, computing in float32.
      frozen, blocks: at least what those tasks need, float32; nothing else is written.
      out: a new or empty folder.
      tokenizer: needed where a task has text.
      origin: where the model comes from; goes into tap_export.json as it is.

    Returns:
      The largest difference of any output, relative to the largest output of its stream.

    Raises:
      UserError: `out` is in use, a block's name has a dot, outputs are no numbers or differ by more than `TOLERANCE`;
        then nothing is left behind.
      ValueError: a task has text and there is no tokenizer.
    """
    if not any(task.kind == "text_generation" or "text" in task.modalities for task in model.tasks):
        tokenizer = None
    elif tokenizer is None:
        raise ValueError("tokenizer: missing, but there are tasks with text")
    frozen, blocks = needed(model, frozen, blocks)
    for name in model.block_names:
        if "." in name:
            raise UserError(
                f"federation: the name of block '{name}' has a dot, which PyTorch's names cannot; rename the task's"
                " head or domain"
            )
    with staged(out) as folder:
        config = describe(model, tokenizer)
        write_json(folder / "config.json", config)
        safetensors.numpy.save_file(naming.to_torch(frozen, blocks), folder / "model.safetensors", {"format": "pt"})
        shutil.copyfile(torch_model.__file__, folder / "torch_model.py")
        if tokenizer is not None:
            tokenizer.save(folder / "tokenizer")
        differences = check(folder, model, frozen, blocks)
        largest = max(differences.values())
        report = {"format": "torch", **(origin or {}), "max_difference": largest, "differences": differences}
        write_json(folder / "tap_export.json", report)
        (folder / "README.md").write_text(_readme(config, report), encoding="utf-8")
    return largest


def needed(model: ServerModel, frozen: Tree, blocks: Blocks) -> tuple[dict, dict]:
    """The frozen weights and blocks that the model's tasks use, by name, on the host."""
    encoders = {f"encoder/{modality}" for task in model.tasks for modality in task.modalities}
    kept = {name: frozen[name] for name in ("backbone", *sorted(encoders))}
    return jax.device_get(kept), jax.device_get({name: blocks[name] for name in model.block_names})


def describe(model: ServerModel, tokenizer: WordPiece | None) -> dict:
    """The contents of config.json, see `torch_model.Model`; without a tokenizer "tokens" is empty."""
    routes: dict[str, dict] = {}
    for task in model.tasks if model.config.backbone == "routed" else ():
        for modality in task.modalities:
            routes.setdefault(task.kind, {})[modality] = [
                {
                    "source": path.source,
                    "mote_stack": path.mote_stack,
                    "mote_expert": path.mote_expert,
                    "mome_stack": path.mome_stack,
                    "mome_expert": path.mome_expert,
                }
                for path in backbone.paths(modality, task.kind)
            ]
    sizes = dataclasses.asdict(model.config)
    for how in ("attention", "remat", "dtype"):  # of the JAX model's computation
        del sizes[how]
    return {
        "format": torch_model.FORMAT,
        "model": sizes | {"text_positions": model.config.text_rows},
        "tasks": {task.name: _described(task) for task in model.tasks},
        "routes": routes,
        "blocks": list(model.block_names),
        "tokens": {"start": tokenizer.cls_id, "stop": tokenizer.sep_id} if tokenizer else {},
    }


def _described(task: Task) -> dict:
    """What a user needs of a task beside the model: the names of its classes, and its templates."""
    found = dataclasses.asdict(task)
    source = found.pop("source")
    found["class_names"] = task.class_names[: task.classes]  # fewer with data.image_classes
    return found | {field: source[field] for field in ("text", "answer") if source.get(field)}


def check(folder: pathlib.Path, model: ServerModel, frozen: Tree, blocks: Blocks) -> dict[str, float]:
    """Loads a written folder and compares it with the JAX model, on a random batch of each stream.

    Args:
      frozen, blocks: of the JAX model, as `needed` returns them.

    Returns:
      Stream name -> the largest difference, relative to the largest output. For text generation that includes the
      generated ids: where they part, both choices must be about equally likely.

    Raises:
      UserError: the folder cannot be loaded, an output is no number, or a difference is above `TOLERANCE`.
    """
    try:
        twin = torch_model.load(folder)
    except (OSError, ValueError, RuntimeError, safetensors.SafetensorError) as error:
        raise UserError(f"export: what was written cannot be loaded: {' '.join(str(error).split())[:300]}") from error
    tokens, rng, differences = twin.config["tokens"], np.random.default_rng(0), {}
    runs = {task.name: jax_outputs(model, task, tokens) for task in model.tasks}
    for stream in model.streams:
        batch = random_batch(model, stream, rng)
        ours, our_ids = runs[stream.task.name](frozen, model.collect(blocks, stream), batch)
        if not np.isfinite(ours).all():
            raise UserError(
                f"export: the outputs for {stream.name} are no numbers, its training diverged; export another variant,"
                " or train with a lower optimizer.learning_rate"
            )
        inputs = {name: torch.from_numpy(value) for name, value in batch.items()}
        with torch.no_grad():
            theirs = twin(stream.task.name, domain=stream.domain, **inputs).numpy()
        scale = max(float(np.abs(ours).max()), 1e-30)
        difference = float(np.abs(ours - theirs).max()) / scale
        if our_ids is not None:
            del inputs["answers"]
            length = our_ids.shape[1]
            ids = twin.generate(stream.task.name, domain=stream.domain, length=length, **inputs).numpy()
            gap = _gap(twin, stream, inputs, np.asarray(our_ids), ids, tokens["start"]) / scale
            difference = max(difference, gap)
        if not difference <= TOLERANCE:
            raise UserError(
                f"export: {stream.name} differs from the JAX model by {difference:.2g} of its largest output, more"
                f" than {TOLERANCE:g}; nothing was written"
            )
        differences[stream.name] = difference
    return differences


def random_batch(model: ServerModel, stream: Stream, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Three samples that look like the stream's: normal images; random tokens, one text padded; random answers.

    Returns:
      "images" float32 [3, 64, 64, 3], "tokens" int32 [3, T], "answers" int32 [3, A]: those that the task reads.
    """
    config, batch = model.config, {}
    if "image" in stream.task.modalities:
        batch["images"] = rng.standard_normal((3, 64, 64, 3)).astype(np.float32)
    if "text" in stream.task.modalities:
        batch["tokens"] = rng.integers(1, config.vocab, (3, min(config.max_text, 24))).astype(np.int32)
        batch["tokens"][1, batch["tokens"].shape[1] // 2 :] = 0
    if stream.task.kind == "text_generation":
        batch["answers"] = rng.integers(1, config.vocab, (3, min(config.max_answer, 12))).astype(np.int32)
    return batch


def jax_outputs(
    model: ServerModel, task: Task, tokens: Mapping[str, int]
) -> Callable[[Tree, Tree, Mapping], tuple[np.ndarray, np.ndarray | None]]:
    """(frozen, parts, batch) -> outputs, generated ids or None; on the host, products in full float32.

    Args:
      tokens: ids of "start" and "stop", for text generation.
    """

    def run(frozen, parts, batch):
        vectors = model.represent(frozen, parts, task, batch)
        outputs = model.decode(parts["head"], task, vectors, batch)
        if task.kind != "text_generation":
            return outputs, None
        return outputs, model.generate(parts["head"], task, vectors, length=batch["answers"].shape[1], **tokens)

    compiled = jax.jit(run, compiler_options=compiler_options(once=True))

    def precise(*args):
        with jax.default_matmul_precision("highest"):
            return jax.device_get(compiled(*args))

    return precise


def _gap(twin, stream: Stream, inputs: dict, ours: np.ndarray, theirs: np.ndarray, start: int) -> float:
    """0 where the generated ids are equal, else how far apart PyTorch's scores of the first differing ids are."""
    gap = 0.0
    for n in np.flatnonzero((ours != theirs).any(1)):
        t = int(np.flatnonzero(ours[n] != theirs[n])[0])
        prefix = torch.tensor([[start, *ours[n, :t].tolist(), 0]])
        one = {name: value[n : n + 1] for name, value in inputs.items()}
        with torch.no_grad():
            scores = twin(stream.task.name, domain=stream.domain, answers=prefix, **one)[0, t]
        gap = max(gap, float((scores[theirs[n, t]] - scores[ours[n, t]]).abs()))
    return gap


def _readme(config: Mapping, report: Mapping) -> str:
    inputs = {"image": "images=images", "text": "tokens=tokens"}
    calls = []
    for name, task in config["tasks"].items():
        arguments = [f'"{name}"', *(inputs[m] for m in task["modalities"])]
        if len(task["domains"]) > 1:
            arguments.insert(1, f'domain="{task["domains"][0]}"')
        text = task["kind"] == "text_generation"
        names = ", ".join(map(str, task.get("class_names", ())))
        of = f" of {names}" if 0 < len(names) <= 60 else ""
        calls.append(f"model{'.generate' if text else ''}({', '.join(arguments)})  # {task['kind']}{of}")
    origin = "".join(f"- {key}: {value}\n" for key, value in report.items() if key != "differences")
    lines = "\n".join(calls)
    return f"""# A client's model for PyTorch

Needs `torch` and `safetensors` only; `torch_model.py` is the whole code and may be copied anywhere.

```python
from torch_model import load, standardise

model = load(".")  # this folder
{lines}
```

`images`: float [B, 64, 64, 3], `standardise(uint8 pixels)`. `tokens`: int [B, T], `[CLS] text [SEP]`, padded with 0;
`tokenizer/` has the word pieces (`transformers.AutoTokenizer.from_pretrained("tokenizer")`). With `answers=` a text
generation task returns scores under teacher forcing. Pictures of another size are resized to 64x64 (bilinear, neither
cropped nor padded), turned as their EXIF says. In `config.json`, `tasks` has the names of classes and the
templates that texts are made by.
`model.trainable_parameters()` are the trained blocks, adapters unmerged; everything in `model.frozen` is fixed.
The folder can be the start of a new run of tap-jax: `--config.model.start_from=FOLDER`.

{origin}"""
