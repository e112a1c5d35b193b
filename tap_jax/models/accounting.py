"""Parameter accounting (Table 7): what is stored, and what the paper counts, both from shapes alone.

The paper counts every stack's and every expert's frozen weights although they are copies of one another, experts
that a client holds but no task of it uses, and pre-trained parts on no path. None of these is stored here; each is
a named line of its own. It counts the routed backbone with LoRA; of any other model what is stored is all there is.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from tap_jax.blocks import count
from tap_jax.models.backbone import SHARED
from tap_jax.models.lora import Tree
from tap_jax.models.server_model import ServerModel
from tap_jax.tasks import Task


@dataclasses.dataclass(frozen=True)
class Account:
    """Parameters of one client.

    Attributes:
      blocks: trainables on the client's paths (stored).
      frozen: frozen weights the client uses, each stored once.
      idle_experts: trainables of experts it holds that lie on none of its paths (not stored).
      copies: what the paper counts besides, name -> parameters (not stored): the frozen weights of each stack and
        expert, less the one copy in `frozen` (so one entry is negative), and pre-trained parts on no path.
    """

    blocks: int
    frozen: int
    idle_experts: int
    copies: Mapping[str, int]

    @property
    def trainable(self) -> int:
        """Trainable parameters as the paper counts them."""
        return self.blocks + self.idle_experts

    @property
    def stored(self) -> int:
        """Parameters that are there: `frozen` and `blocks`."""
        return self.frozen + self.blocks

    @property
    def total(self) -> int:
        """Total parameters as the paper counts them, without TAP's second copy of the trainables."""
        return self.trainable + self.frozen + sum(self.copies.values())


@functools.lru_cache(maxsize=8)
def shapes(model: ServerModel) -> tuple[Tree, dict[str, Tree]]:
    """(frozen, blocks) of `model.init` with `jax.ShapeDtypeStruct`s as leaves; nothing is allocated."""
    return jax.eval_shape(model.init, jax.random.key(0))


def counted_in_paper(model: ServerModel) -> bool:
    """Whether Table 7 is of such models: routed, with LoRA."""
    return model.config.backbone == "routed" and not model.config.bottleneck


def account(model: ServerModel, tasks: Sequence[Task]) -> Account:
    """Counts one client; where the paper counts no such model, only what is stored.

    Args:
      model: of all the federation's tasks, or of more.
      tasks: the client's, some of the model's.
    """
    c = model.config
    frozen, blocks = shapes(model)
    names = {name for task in tasks for stream in task.streams for name in model.blocks_of(stream)}
    modalities = [m for m in ("image", "text") if any(m in task.modalities for task in tasks)]
    used = count(frozen["backbone"]) + sum(count(frozen[f"encoder/{m}"]) for m in modalities)
    trained = sum(count(blocks[name]) for name in names)
    if not counted_in_paper(model):
        return Account(trained, used, 0, {})
    kinds = sorted({task.kind for task in tasks})
    backbone = frozen["backbone"]
    stages = {"mote": [*modalities, SHARED], "mome": [*kinds, SHARED]}
    depths = dict(zip(stages, c.backbone_layers, strict=True))
    layer = {part: count(backbone[part]) // sum(c.backbone_layers) for part in backbone}
    ffn = layer["fc1"] + layer["fc2"]

    copies = {}
    experts = idle = feed_forwards = 0
    for stage, stacks in stages.items():
        others = stages["mome" if stage == "mote" else "mote"]
        held = {f"{stage}/{stack}/expert/{other}" for stack in stacks for other in others}
        expert = next(count(blocks[name]) for name in sorted(names) if name in held)
        idle += expert * len(held - names)
        experts += len(held) * depths[stage]
        domains = [name for name in names if name.startswith(f"{stage}/") and "/domain/" in name]
        feed_forwards += 2 * len(domains) * depths[stage]
        copies[f"{stage}: attention and norms of each stack"] = (
            len(stacks) * depths[stage] * (sum(layer.values()) - ffn)
        )
    copies["FFN of each expert"] = experts * ffn
    copies["FFN of each query and value expert"] = feed_forwards * ffn
    copies["backbone, stored once (subtracted)"] = -count(backbone)
    copies |= _unused(model, modalities)
    return Account(trained, used, idle, copies)


def _unused(model: ServerModel, modalities: Sequence[str]) -> dict[str, int]:
    """Pre-trained parameters of the checkpoint on no path, per modality."""
    d = model.config.width
    if model.config.name == "flava":
        out = {f"{m} pooler": d * d + d for m in modalities}
        return out | ({"image mask token": d} if "image" in modalities else {})
    if "text" not in modalities:
        return {}
    # ViLT's embedding module is one: the text side counts its image parts as well.
    patch = 3 * model.config.patch**2 * d + d
    positions = (1 + model.config.position_grid**2) * d
    return {"text side: patch projection": patch, "text side: CLS, positions, modality types": d + positions + 2 * d}


def table7(model: ServerModel, clients: Sequence[Sequence[Task]]) -> dict[str, float]:
    """Table 7 for a federation: means over clients, percentages as means of per-client ratios.

    TAP adds one more copy of the trainables: total + trainable, of which 2 · trainable are trained.

    Args:
      model: of all the federation's tasks.
      clients: the tasks of each client, of one at least.

    Returns:
      "total" and "trainable": parameters of a client without TAP, "percent": how many of them are trained, in %;
      "tap_total" and "tap_percent": the same with TAP.
    """
    accounts = [account(model, tasks) for tasks in clients]
    total = np.array([a.total for a in accounts], np.float64)
    trainable = np.array([a.trainable for a in accounts], np.float64)
    return {
        "total": total.mean(),
        "trainable": trainable.mean(),
        "percent": (100 * trainable / total).mean(),
        "tap_total": (total + trainable).mean(),
        "tap_percent": (100 * 2 * trainable / (total + trainable)).mean(),
    }
