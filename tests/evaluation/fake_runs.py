"""Run folders with known numbers, as `tap-jax train` leaves them, without training anything."""

import json

import numpy as np

from tap_jax.config import default_config, override
from tap_jax.evaluation.results import write_results
from tap_jax.federation import PAPER_ROWS, Federation, client_table

FLAVA, VILT = {}, {"model.name": "vilt", "federation.table": "vilt"}
METRICS = {
    "image_classification": ("accuracy",),
    "image_generation": ("mse",),
    "text_classification": ("accuracy",),
    "text_generation": ("bertscore", "meteor"),
}


def paper_federation(model: str) -> Federation:
    """The paper's 30 clients."""
    return client_table(PAPER_ROWS[model], groups=3)


def scores(variant, value, model="flava", tasks=None):
    """A row for each client and metric of the paper's federation; `value(client, task, metric)` -> float or None."""
    return [
        {
            "variant": variant,
            "client": number,
            "task": task.name,
            "metric": metric,
            "value": value(number, name, metric),
        }
        for number, client in enumerate(paper_federation(model).clients)
        for name, task in ((task.name, task) for task in paper_federation(model).tasks_of(number))
        if name in (tasks or client.shares)
        for metric in METRICS[task.kind]
    ]


def level(value, step=0.0):
    """Scores around `value` for accuracy and text, around value / 100 for MSE; client k's is k·step away."""
    return lambda client, task, metric: (value + client * step) / (100 if metric == "mse" else 1)


def write_run(folder, rows, fields=None, *, replacements=(), timing=None, lines=(), extra=None):
    """A finished run's folder; `extra` goes into the stored config."""
    config = override(default_config(), {"rounds": 20} | dict(fields or {})).to_dict() | dict(extra or {})
    timing = {"total_seconds": 1.0, "device": "1 x cpu"} | dict(timing or {})
    write_results(folder, config, rows, replacements, timing, versions={"python": "3.11", "jax": "0.10.2"})
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def training_lines(model="flava", rounds=20, seed=0, models=("federated", "personal", "local")):
    """Lines of metrics.jsonl with falling losses of two clients a round."""
    rng, federation = np.random.default_rng(seed), paper_federation(model)
    for number in range(rounds):
        clients = sorted(rng.choice(30, 2, replace=False).tolist())
        losses = {
            name: {
                str(k): {task.name: 3 / (1 + 0.2 * number) + rng.normal(0, 0.05) for task in federation.tasks_of(k)}
                for k in clients
            }
            for name in models
        }
        yield {"round": number, "clients": clients, "losses": losses, "seconds": 1.0}


def replaced(model="flava", rounds=20, variants=("tap",), seed=0):
    """Replacements that thin out, more of them for lower margins."""
    rng, federation = np.random.default_rng(seed), paper_federation(model)
    found = []
    for number in range(rounds):
        for client in rng.choice(30, 2, replace=False).tolist():
            for task in federation.tasks_of(client):
                for place, variant in enumerate(variants):
                    if rng.random() < np.exp(-number / rounds * 2) / (1 + 0.5 * place):
                        found.append({"round": number, "client": client, "task": task.name, "variant": variant})
    return found
