"""The sequential trainer in PyTorch that `tap-jax bench --against=torch` measures, and the operations it does."""

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tap_jax.export import naming, torch_model
from tap_jax.export.folder import describe, random_batch
from tap_jax.models.accounting import shapes
from tap_jax.models.server_model import ServerModel
from tap_jax.planning import step_cost
from tap_jax.planning.minibatches import Batch
from tap_jax.planning.sequential import task_loss
from tests.export.conftest import CONFIGS, TASKS
from tests.models.reference import random_weights


def twin_of(model, tokenizer):
    """A twin with random weights, in memory."""
    with torch.device("meta"):
        twin = torch_model.Model(describe(model, tokenizer))
    weights = naming.to_torch(*random_weights(shapes(model), np.random.default_rng(0)))
    twin.load_state_dict({key: torch.tensor(value) for key, value in weights.items()}, assign=True)
    return twin.eval()


def resizing(samples, channels, *sizes):
    """Of bilinear resizes one after the other, each a product along rows and one along columns."""
    steps = zip(sizes, sizes[1:], strict=False)
    return [2 * samples * channels * (a * a * b + a * b * b) for a, b in steps]


# PyTorch's counter knows no interpolation and no mean, which here are products.
@pytest.mark.parametrize("name", ["flava", "vilt", "flava, standard"])
def test_as_many_as_pytorch_counts_on_the_twin(tokenizer, name):
    model = ServerModel(CONFIGS[name], TASKS)
    config, twin = model.config, twin_of(model, tokenizer)
    for task in model.tasks:
        batch = random_batch(model, task.streams[0], np.random.default_rng(0))
        samples = len(next(iter(batch.values())))
        if task.classes:
            batch["labels"] = np.zeros(samples, np.int32)
        ours = step_cost.task_flops(model, task, batch)

        tensors = {field: torch.from_numpy(value) for field, value in batch.items()}
        tensors |= {field: tensors[field].long() for field in ("labels", "answers") if field in tensors}
        with sdpa_kernel(SDPBackend.MATH):
            with FlopCounterMode(display=False) as forward:
                loss = task_loss(twin, Batch(task.streams[0], tensors, 1.0, 1.0))
            with FlopCounterMode(display=False) as backward:
                loss.backward()

        only_here = [0, 0]
        if "image" in task.modalities:
            first, second = resizing(samples, 3, 64, round(64 * config.upsample), config.image_size)
            grid = config.image_size // config.patch
            paths = 4 if config.backbone == "routed" else 1
            means = 2 * samples * paths * (1 + grid**2) * config.width
            if config.name == "vilt" and config.position == "interpolate":
                means += 2 * config.width * (config.position_grid**2 * grid + config.position_grid * grid**2)
            only_here = [first + second + means, second + means]  # nothing below the first resize is trained
        assert ours.forward == forward.get_total_flops() + only_here[0], task.name
        assert ours.backward == backward.get_total_flops() + only_here[1], task.name
