"""TAP in JAX: two-stage adaptive personalization of multi-task, multi-modal models in federated learning.

    import tap_jax as tap

    config = tap.load_config("demo", {"rounds": 5})
    experiment = tap.build(config)              # .model, .data, .federation, .method, .partition
    state = experiment.init()
    for _ in range(config.rounds):
        state, line = experiment.round(state)   # line: losses per client and task, replacements, bytes
    finished = experiment.finish(state)         # Stage 2
    rows = experiment.evaluate(finished)        # [{"variant", "client", "task", "metric", "value"}, ...]

Public names; `help(tap_jax.build)` and so on say more, each with an example:

  load_config(path, overrides)
    Reads a config file, or the config.json of a run.
  build(config, *, criterion, method, variants, target, federation, tell)
    Builds the Experiment that a config describes; a criterion or a method may be one's own.
  Experiment.init(workdir)
    The state before round 0.
  Experiment.round(state, clients)
    One round: the new state, and a line of losses, replacements and bytes.
  Experiment.finish(state)
    Stage 2, and what else follows the last round: every client's models.
  Experiment.evaluate(models)
    Scores of finished models, or of a state as it stands.
  run(config, workdir, reporter, stop)
    A whole run as of `tap-jax train`, with all its files; resumes by itself.
  Federation(clients, named)
    Who has which task.
  select(params, names)
    A client's blocks. This and the next four take any trees of one's own.
  ownership(task_mask, touches)
    Who owns which block (Sec. 3.1).
  aggregate(server, clients, weights)
    Component-wise FedAvg (Sec. 3.1).
  replacement_indicator(local_loss, personal_loss, margin, seen)
    Which tasks' personal blocks give way to the federated ones (equation 3).
  replace(personal, federated, chosen)
    The replacement (equation 4).
  distillation_loss(kind, teacher, student, batch, *, temperature, power, image_loss)
    Of Stage 2 (equation 5).
  bound(rates, decrease, *, smoothness, local_steps, noise, heterogeneity, owners)
    The convergence bound of Theorem 1 (equation 7).
  export_client(workdir, out, *, client, format, model, variant, tasks, say)
    Writes a client's model of a finished run for PyTorch, PEFT or Hugging Face.

Words, with the paper's symbols:

  block (B_r)        a part of the trainable parameters that is sent, averaged and replaced as a whole
  client (c_i)       has data, tasks (O_i), and the blocks that its tasks use
  cohort (C_t)       the clients of a round, which train together
  domain             of a task's samples; experts in the backbone are for one
  federated (W̃_[i])  a client's model from the server's blocks, trained and sent back
  layout, slot       where each client's block lies in the packed parameters of a cohort
  margin (m_i,o)     how much better the federated loss must be for a replacement
  minibatch          a client's samples of one local step; a row is a part of it, of one stream
  params             parameters of a cohort's clients: a tree for jax.tree.map and optax
  personal (X_[i])   a client's own model, which is never sent
  phase              what a local training is for: "federated", "personal", "post", "distil", ...
  server (W̃)         the averaged blocks; frozen (Ŵ): the pre-trained weights, one copy for all
  shape class        blocks of equal shapes, which the engine keeps in one matrix
  stream             a task's samples of one domain, which take one path through the model
  task group         tasks that one path of the compiled program serves
  teacher, student   W̃_[i] after the last round and X_[i], in Stage 2
  variant            a result of a run: a model, and how long it is trained after the last round

From the shell: `tap-jax --help`.

Names are loaded when first used, so that `import tap_jax` is instant and starts no JAX backend.
"""

import importlib
import typing

if typing.TYPE_CHECKING:
    from tap_jax.blocks import aggregate, ownership, replace, replacement_indicator, select
    from tap_jax.config import load_config
    from tap_jax.experiment import Experiment, build
    from tap_jax.federation import Federation
    from tap_jax.methods.losses import distillation_loss
    from tap_jax.runs.exporting import export_client
    from tap_jax.runs.runner import run
    from tap_jax.theory.bound import bound

__all__ = [
    "Experiment",
    "Federation",
    "aggregate",
    "bound",
    "build",
    "distillation_loss",
    "export_client",
    "load_config",
    "ownership",
    "replace",
    "replacement_indicator",
    "run",
    "select",
]

_HOMES = {
    "Experiment": "experiment",
    "Federation": "federation",
    "aggregate": "blocks",
    "bound": "theory.bound",
    "build": "experiment",
    "distillation_loss": "methods.losses",
    "export_client": "runs.exporting",
    "load_config": "config",
    "ownership": "blocks",
    "replace": "blocks",
    "replacement_indicator": "blocks",
    "run": "runs.runner",
    "select": "blocks",
}


def __getattr__(name: str) -> typing.Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'tap_jax' has no attribute '{name}'; it offers {', '.join(__all__)}")
    value = getattr(importlib.import_module(f"tap_jax.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
