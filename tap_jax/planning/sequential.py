"""The usual way to simulate a federation, to be measured against: PyTorch, one client after the other.

Every client has its own twin (`torch_model.Model`) of its own blocks; all share one copy of the frozen weights. Models
and tensors are made once, outside what is timed, and a minibatch goes through the model once per task and domain, as
many samples as there are. What a step computes is what the engine's plain step does: Σ_o λ_o ℓ_o, one backward pass, a
clipped AdamW update of all the client's blocks.
"""

import dataclasses
import os
import time
from collections.abc import Mapping, Sequence

import jax
import numpy as np
import torch
import torch.nn.functional as F

from tap_jax.blocks import Blocks, Tree
from tap_jax.data.text import WordPiece
from tap_jax.export import folder, naming, torch_model
from tap_jax.models.server_model import ServerModel
from tap_jax.planning.minibatches import Batch


class SequentialTrainer:
    """Clients that train one after the other, on the GPU where PyTorch has one, else on all cores.

    Args:
      model: of all the federation's tasks.
      frozen, blocks: Ŵ, and W̃ by name; every client starts from its blocks of it.
      steps: per client, per step the batches of its minibatch.
      tasks: per client, the names of its tasks.
      tokenizer: None where no task has text.
      bfloat16: compute under autocast, with the frozen weights (but those of LayerNorms) kept in bfloat16.
      rate, weight_decay, clip_norm: of AdamW and the gradient; no clipping where the norm is 0.
      fused: AdamW as one kernel; else PyTorch's default.

    Attributes:
      device: where it trains.
    """

    def __init__(
        self,
        model: ServerModel,
        frozen: Tree,
        blocks: Blocks,
        steps: Sequence[Sequence[Sequence[Batch]]],
        tasks: Sequence[Sequence[str]],
        *,
        tokenizer: WordPiece | None,
        bfloat16: bool,
        rate: float,
        weight_decay: float,
        clip_norm: float,
        fused: bool = False,
    ):
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if self.device.type == "cpu":
            torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
        else:
            torch.set_float32_matmul_precision("high")  # as JAX multiplies float32 on a GPU by default
        self.bfloat16, self.clip_norm = bfloat16, clip_norm
        self.optimizer = {"lr": rate, "weight_decay": weight_decay, "fused": fused or None}
        shared = self._tensors(naming.to_torch(jax.device_get(frozen), {}))
        if bfloat16:  # so that autocast need not cast them at every use
            shared = {key: value if "norm" in key else value.bfloat16() for key, value in shared.items()}
        self.start = self._tensors(naming.to_torch({}, jax.device_get(dict(blocks))))
        self.twins = [self._twin(model, mine, shared, tokenizer) for mine in tasks]
        self.steps = [[[self._on_device(batch) for batch in step] for step in mine] for mine in steps]

    def _tensors(self, arrays: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
        return {key: torch.tensor(value, device=self.device) for key, value in arrays.items()}

    def _twin(self, model: ServerModel, tasks: Sequence[str], shared: Mapping, tokenizer) -> torch_model.Model:
        own = ServerModel(model.config, [task for task in model.tasks if task.name in tasks])
        with torch.device("meta"):
            twin = torch_model.Model(folder.describe(own, tokenizer))
        wanted = twin.state_dict()
        state = {key: shared[key] if key in shared else self.start[key].clone() for key in wanted}
        twin.load_state_dict(state, assign=True)
        return twin.train()

    def _on_device(self, batch: Batch) -> Batch:
        fields = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in batch.fields.items()}
        fields = {name: value.to(self.device) for name, value in fields.items()}
        if "images" in fields:
            fields["images"] = torch_model.standardise(fields["images"])
        fields |= {name: fields[name].long() for name in ("labels", "answers") if name in fields}
        return dataclasses.replace(batch, fields=fields)

    def run(self) -> tuple[float, list[dict[str, float]]]:
        """Trains every client from the start.

        Returns:
          Seconds of wall-clock, the resetting left out; and per client, task -> its mean loss over the steps that had
          it.
        """
        for twin in self.twins:
            with torch.no_grad():
                for key, value in twin.named_parameters():
                    if value.requires_grad:
                        value.copy_(self.start[key])
        self._finished()
        started = time.perf_counter()
        found = [self._train(twin, steps) for twin, steps in zip(self.twins, self.steps, strict=True)]
        self._finished()
        seconds = time.perf_counter() - started
        return seconds, [{task: float(torch.stack(each).mean()) for task, each in mine.items()} for mine in found]

    def _train(self, twin: torch_model.Model, steps: Sequence[Sequence[Batch]]) -> dict[str, list[torch.Tensor]]:
        """τ steps of one client -> task -> its loss in every step that had it."""
        parameters = twin.trainable_parameters()
        optimizer = torch.optim.AdamW(parameters, **self.optimizer)
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)  # blocks that no sample reaches decay as well
        losses: dict[str, list[torch.Tensor]] = {}
        for step in steps:
            optimizer.zero_grad(set_to_none=False)
            objective, seen = 0.0, {}
            for batch in step:
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16):
                    loss = batch.weight * task_loss(twin, batch)
                objective = objective + batch.share * loss
                name = batch.stream.task.name
                seen[name] = seen.get(name, 0.0) + loss.detach()
            objective.backward()
            if self.clip_norm:
                torch.nn.utils.clip_grad_norm_(parameters, self.clip_norm)
            optimizer.step()
            for name, loss in seen.items():
                losses.setdefault(name, []).append(loss)
        for parameter in parameters:
            parameter.grad = None  # or every client would keep its gradients
        return losses

    def _finished(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def task_loss(twin: torch_model.Model, batch: Batch) -> torch.Tensor:
    """The mean loss of a batch, a scalar in float32: over samples, over the answers' tokens, or over all pixels.

    Cross-entropy in nats; of images the squared error in standardised units.

    Args:
      batch: fields as tensors on the twin's device, images standardised.
    """
    task, fields = batch.stream.task, batch.fields
    inputs = {name: value for name, value in fields.items() if name != "labels"}
    outputs = twin(task.name, domain=batch.stream.domain, **inputs).float()
    if task.kind.endswith("classification"):
        return F.cross_entropy(outputs, fields["labels"])
    if task.kind == "image_generation":
        return F.mse_loss(outputs, fields["images"])
    return F.cross_entropy(outputs.flatten(0, 1), fields["answers"][:, 1:].flatten(), ignore_index=0)
