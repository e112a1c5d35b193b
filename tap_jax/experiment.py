"""Ties everything together: config -> federation -> model and data -> engine -> state -> results.

    experiment = tap_jax.build(tap_jax.load_config("configs/demo.py"))
    state = experiment.init()
    state, line = experiment.round(state)
    rows = experiment.evaluate(experiment.finish(state))

Nothing here writes a file; `runs` does.
"""

import dataclasses
import functools
import os
from collections.abc import Iterator, Mapping, Sequence

import jax
import numpy as np

from tap_jax import config as configuration
from tap_jax.blocks import Blocks, Partition
from tap_jax.config import ConfigDict
from tap_jax.data import federated
from tap_jax.data.federated import FederatedData
from tap_jax.engine import parallel, rounds
from tap_jax.engine.cohort import Cohort, Engine, EngineSettings
from tap_jax.engine.local_training import TrainingSettings
from tap_jax.errors import UserError
from tap_jax.evaluation.evaluate import Evaluator
from tap_jax.evaluation.metrics import TextScorer, text_scorer
from tap_jax.evaluation.results import Row
from tap_jax.federation import Federation, Task
from tap_jax.methods.base import Method, State
from tap_jax.methods.fedavg import fedavg
from tap_jax.methods.local import local
from tap_jax.methods.losses import distillation_loss, task_loss
from tap_jax.methods.tap import tap
from tap_jax.models import checkpoints
from tap_jax.models.layers import ModelConfig
from tap_jax.models.server_model import Pretrained, ServerModel, to_compute_dtype

# variant -> the trained chain whose divergence it inherits
_CHAIN = {"tap": "personal", "tap-no-kd": "personal", "local": "local"}


@dataclasses.dataclass(frozen=True)
class Finished:
    """Models after the last phase.

    Attributes:
      state: after the last round.
      models: variant -> every client's blocks, on the host; None where the variant is the server's blocks.
    """

    state: State
    models: Mapping[str, tuple[Blocks, ...] | None]


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A configured run; all methods are functions of the state given.

    Attributes:
      config, federation, model, data, method: what `build` made of the configuration.
      partition: blocks and who owns them.
      engine: the compiled side.
      variants: which results `finish` makes.
      initial_blocks: W̃ before round 0, by name, on the host.
      notes: what the user should know about how it was built, one line each.
    """

    config: ConfigDict
    federation: Federation
    model: ServerModel
    data: FederatedData
    method: Method
    partition: Partition
    engine: Engine
    variants: tuple[str, ...]
    initial_blocks: Blocks
    notes: tuple[str, ...] = ()

    def init(self) -> State:
        """The state before round 0."""
        return rounds.initial_state(self.engine, self.initial_blocks, self.method.chains)

    def round(self, state: State) -> tuple[State, dict]:
        """One round -> (new state, a line of losses, replacements and bytes)."""
        return rounds.play_round(self.engine, self.method, state)

    def finish(self, state: State) -> Finished:
        """Stage 2 and the other variants' last phases, over all clients in passes."""
        found: dict[str, dict[int, Blocks]] = {}
        for _, models in self.finish_in_passes(state):
            for variant, mine in models.items():
                found.setdefault(variant, {}).update(mine)
        clients = range(len(self.federation.clients))
        return Finished(state, {v: tuple(found[v][k] for k in clients) if v in found else None for v in self.variants})

    def finish_in_passes(self, state: State) -> Iterator[tuple[Cohort, dict[str, dict[int, Blocks]]]]:
        """`finish` for `clients_per_pass` clients at a time, so that nobody need hold all models at once.

        Yields:
          (the cohort, variant -> client number -> blocks on the host); variants of the server's blocks are left out.
        """
        for cohort in self.engine.passes(int(state.round), state.moments):
            yield cohort, self.method.finish(cohort, state, self.variants)

    def prepare(self) -> None:
        """Starts compiling all that a whole run needs, in the background; optional."""
        cohort = self.engine.cohort(range(self.engine.settings.cohort_size), 0)
        everyone = self.engine.passes(0)[0]
        cohort.prepare()
        everyone.prepare()
        self.evaluator.prepare(everyone)

    @functools.cached_property
    def scorer(self) -> TextScorer | None:
        """Scores generated text; None where no task generates any."""
        return scorer_of(self.config, self.model.tasks)

    @functools.cached_property
    def evaluator(self) -> Evaluator:
        """Scores models on the test sets."""
        return Evaluator(
            self.engine,
            self.data.test,
            tokenizer=self.data.tokenizer,
            scorer=self.scorer,
            personal=self.data.personal_tests,
        )

    def evaluate(self, models: Finished | State) -> list[Row]:
        """Result rows {"variant", "client", "task", "metric", "value"} of finished models.

        A state is evaluated as it stands, its chains under their own names, the server's blocks as "fedavg".
        """
        if isinstance(models, State):
            models = Finished(models, {**models.chains, configuration.SERVER_VARIANT: None})
        cohorts, rows = self.engine.passes(int(models.state.round)), []
        for variant, found in models.models.items():
            if found is None:
                rows += self.evaluate_server(variant, models.state)
            else:
                for cohort in cohorts:
                    mine = {int(k): found[k] for k in cohort.clients if k >= 0}
                    rows += self.evaluate_cohort(variant, cohort, mine, models.state)
        return self.in_order(rows)

    def evaluate_cohort(self, variant: str, cohort: Cohort, models: Mapping[int, Blocks], state: State) -> list[Row]:
        """Result rows of the models of one pass's clients, client number -> blocks."""
        chain = variant if variant in state.finite else _CHAIN.get(variant, "federated")
        return self.evaluator.evaluate(variant, cohort, models, state.finite.get(chain))

    def evaluate_server(self, variant: str, state: State) -> list[Row]:
        """Result rows of the server's blocks, for every client."""
        return self.evaluator.evaluate_server(variant, state.server, state.finite.get("federated"))

    def in_order(self, rows: Sequence[Row]) -> list[Row]:
        """Rows by variant, client and task, in the order in which the configuration and the federation name them."""
        variants = [*self.variants, *{row["variant"]: None for row in rows}]
        tasks = [task.name for task in self.model.tasks]
        return sorted(rows, key=lambda row: (variants.index(row["variant"]), row["client"], tasks.index(row["task"])))


def tasks_of(config: ConfigDict, federation: Federation) -> tuple[Task, ...]:
    """The federation's tasks with the number of classes in use (`data.image_classes`)."""
    most = config.data.image_classes
    return tuple(
        dataclasses.replace(task, classes=min(task.classes, most))
        if most and task.kind == "image_classification"
        else task
        for task in federation.tasks
    )


def compute_dtype(config: ConfigDict) -> str:
    """bfloat16 on accelerators, float32 on CPU, unless the configuration says otherwise."""
    if config.compute_dtype != "auto":
        return config.compute_dtype
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def model_config(config: ConfigDict, *, vocab: int | None = None) -> ModelConfig:
    """The model section as `ModelConfig`."""
    names = {field.name for field in dataclasses.fields(ModelConfig)}
    fields = {name: value for name, value in config.model.items() if name in names}
    fields |= {"attention": config.engine.attention, "remat": config.engine.remat, "dtype": compute_dtype(config)}
    return ModelConfig(**fields | ({} if vocab is None else {"vocab": vocab}))


def build(config: ConfigDict) -> Experiment:
    """Builds everything that a configuration describes.

    Raises:
      UserError: whatever is wrong with it, in one line.
    """
    configuration.validate(config)
    federation = configuration.federation_of(config)
    tasks = tasks_of(config, federation)
    variants = configuration.variants_of(config)
    mesh = parallel.client_mesh(config.mesh.clients)
    # What cannot be had or does not fit is said before the data are read.
    if config.metrics.bertscore_model != "auto":
        scorer_of(config, tasks)
    pretrained = pretrained_weights(config, tasks)
    data = federated.build(
        federation,
        tasks,
        root=config.data.root,
        seed=config.seed,
        vocab=config.model.vocab,
        max_text=config.model.max_text,
        max_answer=config.model.max_answer,
        tokenizer=config.data.tokenizer,
        sizes={"train": config.data.train_size, "test": config.data.test_size},
        image_classes=config.data.image_classes,
        folders=dict(config.data.folders),
        cache_dir=configuration.data_cache(config),
        split=config.federation.split,
        alpha=config.federation.alpha,
        personal_test=config.data.test_split == "personal",
    )
    vocab = data.tokenizer.size if data.tokenizer and config.data.tokenizer == "train" else None
    model = ServerModel(model_config(config, vocab=vocab), tasks)
    partition = model.partition(federation.task_mask)
    frozen, initial = model.init(jax.random.key(config.seed), pretrained)
    notes: tuple[str, ...] = ()
    if config.model.start_from:
        from tap_jax.export.start import read_torch  # and with it PyTorch

        start = read_torch(config.model.start_from, model, tokenizer=data.tokenizer)
        frozen, initial, notes = {**frozen, **start.frozen}, {**initial, **start.blocks}, start.notes
    engine = Engine(
        model,
        partition,
        frozen=to_compute_dtype(frozen, model.config.dtype),
        arrays=data.train,
        data=data.clients,
        sample_loss=sample_loss(model),
        distillation_loss=teaching_loss(config, model) if "tap" in variants else None,
        settings=engine_settings(config, len(federation.clients)),
        mesh=mesh,
    )
    method = method_of(config, tasks, variants)
    return Experiment(
        config, federation, model, data, method, partition, engine, variants, jax.device_get(dict(initial)), notes
    )


def pretrained_weights(config: ConfigDict, tasks: Sequence[Task]) -> Pretrained | None:
    """The weights that `model.weights` names, or None for random stand-ins.

    Raises:
      UserError: a checkpoint that cannot be read or does not fit, or word pieces that are not its own.
    """
    if not config.model.weights:
        return None
    if config.data.tokenizer == "train" and any("text" in task.modalities for task in tasks):
        raise UserError(
            "data.tokenizer: 'train' makes word pieces that model.weights do not know; name the checkpoint's tokenizer"
        )
    folder = os.path.join(configuration.data_cache(config), "weights")
    return checkpoints.load(config.model.weights, ServerModel(model_config(config), tasks), cache_dir=folder)


_text_scorer = functools.cache(text_scorer)  # one BERT per process


def scorer_of(config: ConfigDict, tasks: Sequence[Task]) -> TextScorer | None:
    """The scorer of generated text; None where no task generates any."""
    if all(task.kind != "text_generation" for task in tasks):
        return None
    return _text_scorer(config.metrics.bertscore_model, config.metrics.bertscore_layer)


def method_of(config: ConfigDict, tasks: Sequence[Task], variants: Sequence[str]) -> Method:
    """The method that the configuration names."""
    if config.method == "fedavg":
        return fedavg()
    if config.method == "local":
        return local()
    by_kind = configuration.margins_of(config)
    margins = np.array([by_kind[task.kind] for task in tasks], np.float32)
    return tap(margins, history=config.replacement.history, first=config.replacement.first, variants=variants)


def sample_loss(model: ServerModel):
    """(frozen, parts, task, batch, key) -> (outputs, ℓ [B]): the task losses of equation 2."""

    def loss(frozen, parts, task, batch, key):
        outputs = model.apply(frozen, parts, task, batch, key=key)
        return outputs, task_loss(task.kind, outputs, batch)

    return loss


def teaching_loss(config: ConfigDict, model: ServerModel):
    """(frozen, teacher's parts, outputs, task, batch) -> β·KL [B]: the second term of equation 6."""
    distillation = config.distillation

    def loss(frozen, teacher, outputs, task, batch):
        divergence = distillation_loss(
            task.kind,
            jax.lax.stop_gradient(model.apply(frozen, teacher, task, batch)),
            outputs,
            batch,
            temperature=distillation.temperature,
            power=distillation.temperature_power,
            image_loss=distillation.image_loss,
        )
        return distillation.weights[task.kind] * divergence

    return loss


def engine_settings(config: ConfigDict, clients: int) -> EngineSettings:
    """The configuration's numbers, with the platform's defaults where it leaves them open.

    On CPU: one row at a time (wide rows lose to caches), phases in passes of the cohort's size so that one program
    serves everything. On accelerators: 8 rows of 32 side by side, all clients in one pass.
    """
    cpu = jax.default_backend() == "cpu"
    optimizer = config.optimizer
    settings = TrainingSettings(
        rows_per_chunk=config.engine.rows_per_chunk or (1 if cpu else 8),
        clip_norm=optimizer.clip_norm,
        weight_decay=optimizer.weight_decay,
        persist=optimizer.state == "persist",
    )

    def rate(round_: int) -> float:
        """Linear from learning_rate_initial over warmup_rounds, then constant (Table 21)."""
        done = min(1.0, round_ / optimizer.warmup_rounds) if optimizer.warmup_rounds else 1.0
        first = optimizer.learning_rate_initial
        return first + done * (optimizer.learning_rate - first)

    return EngineSettings(
        cohort_size=config.cohort_size,
        clients_per_pass=min(clients, config.engine.clients_per_pass or (config.cohort_size if cpu else clients)),
        batch=config.batch_size,
        local_steps=config.local_steps,
        post_steps=config.post_steps,
        microbatch=config.engine.microbatch or min(32, config.batch_size),
        training=settings,
        rate=rate,
        post_rate=optimizer.post_learning_rate,
        aggregation=config.aggregation,
        scope=config.replacement.scope,
        seed=config.seed,
    )
