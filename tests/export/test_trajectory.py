"""Ten AdamW steps of one client, in the engine and in plain PyTorch on the exported twin, on the same minibatches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tap_jax import experiment as experiments
from tap_jax.data.sampling import share_out
from tap_jax.engine.cohort import Cohort
from tap_jax.engine.engine import PhaseInputs
from tap_jax.export import folder as folders
from tap_jax.export import torch_model
from tap_jax.export.naming import to_torch
from tests.models.reference import random_weights

STEPS = 10
FLAVA = ("cifar100", "fashion_mnist", "ag_news", "mmlu"), {}
VILT = ("fashion_mnist", "vqa"), {"model.name": "vilt", "model.backbone_layers": (2, 1), "model.position_grid": 3}


@pytest.mark.parametrize(("tasks", "model"), [FLAVA, VILT], ids=["flava", "vilt"])
def test_ten_steps_take_the_same_path(tiny, tmp_path, monkeypatch, tasks, model):
    fields = {"method": "local", "cohort_size": 1, "local_steps": STEPS, "batch_size": 9, "engine.microbatch": 5}
    experiment = experiments.build(tiny([dict.fromkeys(tasks, 1.0)], fields | model))
    engine, model = experiment.engine, experiment.model
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    frozen, blocks = random_weights(shapes, np.random.default_rng(1))
    for layer in ("deconv_0", "deconv_1", "deconv_2"):  # whose kernels sum over more than one axis
        blocks["head/image_generation"][layer]["kernel"] /= 4
    engine.frozen = jax.device_put(frozen, engine.shared)
    monkeypatch.setattr(folders, "check", lambda *_: {"": 0.0})  # the first step compares as much
    folders.write_torch(model, frozen, blocks, tmp_path / "out", tokenizer=experiment.data.tokenizer)
    twin = torch_model.load(tmp_path / "out").train()  # all dropout rates are 0

    cohort = Cohort.of(engine, [0], 0)
    plan, rate = cohort.plan("local", post=False), engine.settings.rate(0)
    ours, trained = _engine_losses(engine, cohort, plan, rate, blocks)
    theirs = _torch_losses(experiment, twin, jax.tree.map(lambda leaf: leaf[0], plan), rate)
    assert (ours > 0).sum(0).min() >= STEPS // 2
    np.testing.assert_allclose(theirs, ours, rtol=1e-4, atol=1e-6)
    final = twin.state_dict()
    start = to_torch({}, blocks)
    for key, value in to_torch({}, trained).items():
        # AdamW turns the sign of a gradient near 0 into a whole step, so single weights may differ by some.
        moved = np.abs(value - start[key])
        assert np.abs(final[key].numpy() - value).mean() < 1e-2 * max(moved.mean(), rate), key


def _engine_losses(engine, cohort, plan, rate, blocks):
    """ℓ of every step and task [STEPS, O], 0 where it was not in the minibatch; and the blocks at the end."""
    sums = [np.zeros(len(engine.tasks))]
    rates = np.full(cohort.table.shape, rate, np.float32)
    keys = jnp.broadcast_to(jax.random.key(0), cohort.table.shape)
    for steps in range(1, STEPS + 1):
        cut = share_out(plan.replace(steps=np.full_like(plan.steps, steps)), engine.devices.per_shard)
        inputs = PhaseInputs(cut, rates, keys)
        params, _, losses = engine.train(cohort.load([blocks]), None, None, cohort.layout, inputs)
        sums.append(np.asarray(losses.plain, np.float64)[0])
    return np.diff(sums, axis=0), cohort.unload(params)[0]


def _torch_losses(experiment, twin, plan, rate):
    """The same by torch.optim.AdamW."""
    engine, optimizer_ = experiment.engine, experiment.config.optimizer
    parameters = twin.trainable_parameters()
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=optimizer_.weight_decay)
    found = np.zeros((STEPS, len(engine.tasks)))
    for step in range(STEPS):
        optimizer.zero_grad(set_to_none=False)
        for parameter in parameters:  # blocks that no sample reached decay too
            parameter.grad = torch.zeros_like(parameter)
        objective = 0
        for group in engine.task_groups:
            (rows,), arrays = plan.rows[group.name], jax.device_get(engine.arrays[group.name])
            for n in range(rows.count[0, step]):
                row = jax.tree.map(lambda leaf, at=(0, step, n): leaf[at], rows.table)
                stream = group.streams[row.stream]
                batch = {field: torch.from_numpy(values[row.ids]) for field, values in arrays.items()}
                loss = (torch.from_numpy(row.weights) * _loss(twin, stream, batch)).sum()
                objective = objective + float(row.share) * loss
                found[step, engine.tasks.index(stream.task)] += float(loss.detach())
        objective.backward()
        torch.nn.utils.clip_grad_norm_(parameters, optimizer_.clip_norm)
        optimizer.step()
    return found


def _loss(twin, stream, batch) -> torch.Tensor:
    """ℓ of every sample."""
    if "images" in batch:
        batch["images"] = torch_model.standardise(batch["images"])
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    outputs = twin(stream.task.name, domain=stream.domain, **inputs)
    if "labels" in batch:
        return F.cross_entropy(outputs, batch["labels"].long(), reduction="none")
    if stream.task.kind == "image_generation":
        return (outputs - batch["images"]).square().mean((1, 2, 3))
    targets = batch["answers"][:, 1:].long()
    each = F.cross_entropy(outputs.transpose(1, 2), targets, reduction="none", ignore_index=0)
    return each.sum(1) / (targets != 0).sum(1).clamp(min=1)
