"""Losses of finished models on held-out training samples: what settings are chosen by, so that no test set is read."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from tap_jax.engine.cohort import client_batches
from tap_jax.engine.engine import Engine
from tap_jax.engine.objective import SampleLoss
from tap_jax.engine.probes import Probes
from tap_jax.evaluation.scores import Row
from tap_jax.methods.base import ClientModels, State


def held_out_losses(
    engine: Engine, sample_loss: SampleLoss, models: Mapping[str, ClientModels | None], state: State
) -> list[Row]:
    """The mean of ℓ_o over each client's held-out samples of the task, without dropout, as rows "held_out_loss".

    Args:
      sample_loss: of the model that finished blocks are of.
      models: variant -> every client's finished blocks; None where they are the server's.

    Returns:
      A row for each variant, client and task of which the client has held-out samples; its value is None where the
      loss is no number.

    Raises:
      UserError: nothing is held out.
    """
    finished, rows = engine.finished, []
    objective = dataclasses.replace(engine.objective, sample_loss=sample_loss, tables=finished.tables)
    probes = Probes(objective, finished.model, engine.devices, len(engine.partition.names))
    for cohort in client_batches(engine, int(state.round)):
        for variant, found in models.items():
            if found is None:
                params = cohort.broadcast(state.server)
            else:
                params = cohort.load({int(k): found[k] for k in cohort.clients if k >= 0}, like=finished.like)
            losses = probes.mean_loss(engine.frozen, engine.arrays, (params,), cohort.layout, cohort.held_out_plan)
            for client, by_task in zip(cohort.clients, np.asarray(losses), strict=True):
                streams = engine.held_out[client].streams if client >= 0 else ()
                for task, loss in zip(engine.tasks, by_task.tolist(), strict=True):
                    if any(stream.name in streams for stream in task.streams):
                        value = loss if np.isfinite(loss) else None
                        rows.append(
                            Row(
                                variant=variant,
                                client=engine.labels[client],
                                task=task.name,
                                metric="held_out_loss",
                                value=value,
                            )
                        )
    return rows
