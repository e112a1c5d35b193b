"""TAP in JAX: two-stage adaptive personalization of multi-task, multi-modal models in federated learning.

    import tap_jax as tap

    config = tap.load_config("configs/demo.py", {"rounds": 5})
    experiment = tap.build(config)              # .model, .data, .federation, .method, .partition
    state = experiment.init()
    for _ in range(config.rounds):
        state, line = experiment.round(state)   # line: losses per client and task, replacements, bytes
    finished = experiment.finish(state)         # Stage 2
    rows = experiment.evaluate(finished)        # [{"variant", "client", "task", "metric", "value"}, ...]

The paper's pieces by themselves: `Federation` (who has which task), `aggregate` (component-wise FedAvg),
`replacement_indicator` and `replace` (equations 3 and 4), `distillation_loss` (equation 5), `bound` (Theorem 1).
`export_client` writes a client's model of a finished run for PyTorch. From the shell: `tap-jax --help`.

Names are loaded when first used, so that `import tap_jax` is instant and starts no JAX backend.
"""

import importlib
import typing

if typing.TYPE_CHECKING:
    from tap_jax.blocks import aggregate, replace, replacement_indicator
    from tap_jax.config import load_config
    from tap_jax.experiment import build
    from tap_jax.exporting import export_client
    from tap_jax.federation import Federation
    from tap_jax.methods.losses import distillation_loss
    from tap_jax.theory.bound import bound

__all__ = [
    "Federation",
    "aggregate",
    "bound",
    "build",
    "distillation_loss",
    "export_client",
    "load_config",
    "replace",
    "replacement_indicator",
]

_HOMES = {
    "Federation": "federation",
    "aggregate": "blocks",
    "bound": "theory.bound",
    "build": "experiment",
    "distillation_loss": "methods.losses",
    "export_client": "exporting",
    "load_config": "config",
    "replace": "blocks",
    "replacement_indicator": "blocks",
}


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'tap_jax' has no attribute '{name}'; it offers {', '.join(__all__)}")
    value = getattr(importlib.import_module(f"tap_jax.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
