"""Ties everything together: config -> federation -> model and data -> engine -> state -> results.

    experiment = tap_jax.build(tap_jax.load_config("demo"))
    state = experiment.init()
    state, line = experiment.round(state)
    rows = experiment.evaluate(experiment.finish(state))

Nothing here writes a file; `runs` does.
"""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import numpy as np

from tap_jax import assembly, device_sizes
from tap_jax.assembly import Sections
from tap_jax.blocks import PRIVATE, Blocks, Partition
from tap_jax.config import ConfigDict, validate
from tap_jax.data import federated
from tap_jax.data.federated import FederatedData
from tap_jax.data.samples import Tell, silent
from tap_jax.data.sampling import ClientData, hold_out
from tap_jax.data.settings import DataSettings
from tap_jax.engine import parallel, rounds
from tap_jax.engine.cohort import Cohort, client_batches
from tap_jax.engine.engine import Engine
from tap_jax.engine.preparation import prepare
from tap_jax.errors import UserError
from tap_jax.evaluation.evaluate import Evaluator
from tap_jax.evaluation.held_out import held_out_losses
from tap_jax.evaluation.metrics import MetricSettings, TextScorer, text_scorer
from tap_jax.evaluation.scores import Row
from tap_jax.federation import Federation
from tap_jax.methods.base import ClientModels, Method, SplitRound, State
from tap_jax.methods.criteria import Criterion
from tap_jax.models import checkpoints
from tap_jax.models.server_model import Pretrained, ServerModel, to_compute_dtype
from tap_jax.platforms import platform_of
from tap_jax.registry import METHODS
from tap_jax.tasks import Task


@dataclasses.dataclass(frozen=True)
class Finished:
    """Models after the last phase.

    Attributes:
      state: after the last round.
      models: variant -> every client's blocks, on the host; None where the variant is the server's blocks.
    """

    state: State
    models: Mapping[str, ClientModels | None]


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A configured run; all methods are functions of the state given.

    Attributes:
      config: complete, see `assembly.with_found`. sections: what it was cut into.
      federation, model, data, method: what `build` made of these.
      partition: blocks and who owns them.
      engine: the compiled side.
      variants: which results `finish` makes.
      initial_blocks: W̃ before round 0, by name, on the host.
      notes: what the user should know about how it was built, one line each.

    Example:
      `build`, `init`, `round`, `finish` and `evaluate` each have a part of one example, to be read in this order.
    """

    config: ConfigDict
    sections: Sections
    federation: Federation
    model: ServerModel
    data: FederatedData
    method: Method
    partition: Partition
    engine: Engine
    variants: tuple[str, ...]
    initial_blocks: Blocks
    notes: tuple[str, ...] = ()

    def init(self, workdir: str | os.PathLike | None = None) -> State:
        """The state before round 0.

        Args:
          workdir: the run's folder, where personal blocks go that would take more memory than `engine.host_gigabytes`;
            without one they stay in memory. Where it has a checkpoint, the state is one that this can be read into.

        Raises:
          UserError: what it holds cannot be used.

        Example:
          h^(p) is +inf as long as a client has not taken part, a row for each client and a column for each task.

          >>> state = experiment.init()
          >>> state.round, list(state.client_models), state.personal_loss["personal"].tolist()
          (0, ['personal'], [[inf], [inf]])
        """
        return rounds.initial_state(
            self.engine,
            self.initial_blocks,
            self.method,
            workdir=None if workdir is None else pathlib.Path(workdir),
            host_bytes=self.sections.engine.host_bytes,
        )

    def round(self, state: State, clients: Sequence[int] | None = None) -> tuple[State, dict]:
        """One round -> (new state, a line of losses, replacements and bytes).

        The state given stays as it is. The line is JSON-ready: "round" (from 0), "clients", "learning_rate", "losses"
        (model -> client -> task -> mean training loss; None where it is no number), and where the method has them
        "replacements", "bytes_sent" (by client), "bytes_received" (of all clients), "dropped" updates, "update_norms"
        (by client; with `screening.max_norm` or privacy) and "epsilon".

        Args:
          state: of `init` or of the round before; it says which round this is.
          clients: who takes part, `cohort_size` of them at most; None: drawn from the seed and the round.

        Raises:
          UserError: `clients` are none, too many or not all different, or a broken update was dropped, and
            `screening.on_broken` is "stop".
          ValueError: `clients` are named in a run with differential privacy.

        Example:
          >>> state, line = experiment.round(state, clients=[1])
          >>> state.round, line["replacements"]
          (1, [{'round': 0, 'client': 1, 'task': 'ag_news', 'variant': 'tap'}])
          >>> [list(line["losses"][model]["1"]) for model in ("federated", "personal")]
          [['ag_news'], ['ag_news']]
        """
        return rounds.play_round(self.engine, self.method, state, clients)

    def window(self, state: State) -> tuple[State, list[dict]]:
        """The rounds up to the end of a window (`engine.window`) or of the run -> (new state, a line of each).

        The lines are those of `round`, which plays one round by itself whatever the window.
        """
        found = rounds.play_window(self.engine, self.method, state, self.engine.settings.rounds)
        assert found is not None, "nothing asked it to stop"
        return found

    def finish(self, state: State) -> Finished:
        """Stage 2 and the other variants' last phases, over all clients in batches.

        Example:
          >>> finished = experiment.finish(state)
          >>> models = finished.models["tap"]
          >>> len(models), set(models[0]) == set(experiment.partition.blocks_of(0))
          (2, True)
        """
        found: dict[str, dict[int, Blocks]] = {}
        for _, variant, mine in self.finish_in_batches(state):
            found.setdefault(variant, {}).update(mine)
        clients = range(len(self.federation.clients))
        return Finished(state, {v: tuple(found[v][k] for k in clients) if v in found else None for v in self.variants})

    def finish_in_batches(
        self, state: State, tell: Callable[[str], None] = lambda text: None
    ) -> Iterator[tuple[Cohort, str, dict[int, Blocks]]]:
        """`finish` for `clients_at_once` clients at a time, so that not all models need be held at once.

        Args:
          tell: gets a few words before each training.

        Yields:
          (the cohort, variant, client number -> blocks on the host); variants of the server's blocks are left out.
        """
        cohorts = client_batches(self.engine, int(state.round))
        for number, cohort in enumerate(cohorts, 1):
            name = f"last phase, client batch {number}/{len(cohorts)}: training"
            tell(name)
            for variant, models in self.method.finish(cohort, state, self.variants):
                yield cohort, variant, models
                del models
                tell(name)

    def prepare(self) -> None:
        """Starts compiling all that a whole run needs, in the background; optional."""
        cohort = Cohort.of(self.engine, range(self.engine.settings.cohort_size), 0)
        everyone = client_batches(self.engine, 0)[0]
        most = range(self.engine.settings.window_clients(len(self.federation.clients)))
        # A teacher comes after the last round, to as many clients as then train at once.
        prepare(cohort, takes_teacher=cohort.positions == everyone.positions or not self.engine.rule.teacher_optional)
        if len(most) > self.engine.settings.cohort_size:
            prepare(Cohort.of(self.engine, most, [0] * len(most)), takes_teacher=False)
        prepare(everyone)
        self.evaluator.prepare(everyone)

    @functools.cached_property
    def scorer(self) -> TextScorer | None:
        """Scores generated text; None where no task generates any."""
        return scorer_of(self.sections.metrics, self.model.tasks)

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

        A state is evaluated as it stands, clients' models under their own names, the server's blocks under the method's
        for them ("fedavg" in a run of TAP). Accuracy and text metrics are in %, MSE in standardised units; a value is
        None where it diverged: see `Evaluator.evaluate` and, of the server's blocks, `evaluate_server`.

        Raises:
          UserError: a state of FedDAT, whose clients have models after `finish` only.

        Example:
          >>> rows = experiment.evaluate(finished)
          >>> [(row["variant"], row["client"], row["task"], row["metric"]) for row in rows]
          [('tap', 0, 'ag_news', 'accuracy'), ('tap', 1, 'ag_news', 'accuracy')]
          >>> all(0 <= row["value"] <= 100 for row in rows)
          True
        """
        if isinstance(models, State):
            if self.model.adapter_blocks:
                raise UserError("method: clients of 'feddat' have models after `finish` only; evaluate what that gives")
            server = next((variant.name for variant in self.sections.method.variants if variant.of_server), "server")
            models = Finished(models, {**models.client_models, server: None})
        cohorts, rows = client_batches(self.engine, int(models.state.round)), []
        for variant, found in models.models.items():
            if found is None:
                rows += self.evaluate_server(variant, models.state)
            else:
                for cohort in cohorts:
                    mine = {int(k): found[k] for k in cohort.clients if k >= 0}
                    rows += self.evaluate_cohort(variant, cohort, mine)
        return self.in_order(rows)

    def held_out_loss(self, models: Finished) -> list[Row]:
        """Losses of finished models on samples held out of training (`data.held_out`): what to choose settings by.

        No test set is read. Rows are like `evaluate`'s, with the metric "held_out_loss"; see `held_out_losses`.

        Raises:
          UserError: nothing is held out.
        """
        loss = assembly.sample_loss(self.engine.finished.model)
        return self.in_order(held_out_losses(self.engine, loss, models.models, models.state))

    def evaluate_cohort(self, variant: str, cohort: Cohort, models: Mapping[int, Blocks]) -> list[Row]:
        """Result rows of the models of a cohort's clients, client number -> blocks."""
        return self.evaluator.evaluate(variant, cohort, models)

    def evaluate_server(self, variant: str, state: State) -> list[Row]:
        """Result rows of the server's blocks, for every client."""
        return self.evaluator.evaluate_server(variant, state)

    def in_order(self, rows: Sequence[Row]) -> list[Row]:
        """Rows by variant, client and task, in the order in which the configuration and the federation name them."""
        variants = [*self.variants, *{row["variant"]: None for row in rows}]
        tasks = [task.name for task in self.model.tasks]
        number = {label: number for number, label in enumerate(self.federation.labels)}
        return sorted(
            rows, key=lambda row: (variants.index(row["variant"]), number[row["client"]], tasks.index(row["task"]))
        )


def build(
    config: ConfigDict,
    *,
    criterion: Criterion | None = None,
    method: Method | None = None,
    variants: Sequence[str] = (),
    target: Sequence[jax.Device] = (),
    federation: Federation | None = None,
    tell: Tell = silent,
) -> Experiment:
    """Builds everything that a configuration describes: federation, data, model, method, and the engine to train it.

    Nothing is trained, and programs are compiled when they are first needed.

    Args:
      config: of `load_config`.
      criterion: one's own for TAP's Stage 1, in the place of `replacement.criterion`; see `methods.criteria`.
      method: one's own, in the place of `config.method`; see `methods.base`.
      variants: of a method of one's own: the names that its `finish` yields, and of results that are the server's
        blocks. Not read without one: those are the configuration's.
      target: devices of a topology (`jax.experimental.topologies`), to compile for and not to run: weights are not
        read, and what would lie on a device, or start there, is a `jax.ShapeDtypeStruct`.
      federation: what `assembly.federation_of` made of the configuration, where that is known already.
      tell: gets what is being read ("task/split"), how many of its rows are converted, and of how many.

    Raises:
      UserError: whatever is wrong with it, in one line.

    Example:
      Two clients with one task.

      >>> import tap_jax as tap
      >>> fields = {"rounds": 1, "cohort_size": 1, "local_steps": 2, "post_steps": 2, "variants": ("tap",)}
      >>> fields |= {"federation.table": "custom", "federation.rows": ({"ag_news": 0.5},) * 2, "federation.groups": 1}
      >>> fields |= {"data.train_size": 64, "data.test_size": 8}
      >>> experiment = tap.build(tap.load_config("demo", fields))
      >>> [client.name for client in experiment.federation.clients], experiment.variants
      (['client0', 'client1'], ('tap',))
    """
    validate(config)
    config = assembly.with_found(config)
    if jax.dtypes.canonicalize_dtype(float) != np.float32:
        raise UserError("jax_enable_x64: is on, and everything here is float32 or bfloat16; set it to False")
    if criterion and (method or not METHODS[config.method].reads_field("replacement")):
        raise UserError("criterion: replacement is TAP's; use it with method='tap' and no method of your own")
    if method and not variants:
        raise UserError("variants: missing; name what the method's finish yields, and what is the server's blocks")
    sections = assembly.cut(config, platform_of(target[0]) if target else None, federation)
    sections = device_sizes.sized(sections, len(target or jax.devices()))
    federation, tasks, settings = sections.federation, sections.tasks, sections.engine
    devices = parallel.devices(*settings.mesh, cohort=settings.cohort_size, absent=target)
    # What cannot be had or does not fit is said before the data are read.
    if sections.metrics.bertscore_model != "auto" or sections.metrics.device != "auto":
        scorer_of(sections.metrics, tasks)
    notes = (*assembly.privacy_notes(sections), *sections.notes)
    pretrained = None if target else pretrained_weights(sections)
    data = federated.build(federation, tasks, sections.data, tell)
    notes = (*notes, *data.notes, *assembly.test_notes(federation, data.personal_tests))
    vocab = sections.model.vocab
    if data.tokenizer and sections.data.tokenizer == "train":  # it may have fewer word pieces than it could
        vocab = data.tokenizer.size
    model = ServerModel(dataclasses.replace(sections.model, vocab=vocab), tasks)
    # What a client never sends, it has beside what it does: FedDAT's own adapters.
    partition = model.partition(federation.task_mask).with_private(model.adapter_blocks)
    made = jax.eval_shape if target else lambda function, *args: function(*args)
    frozen, initial = made(model.init, jax.random.key(settings.seed), pretrained)
    if sections.start_from and not target:
        from tap_jax.export.start import read_torch  # and with it PyTorch

        start = read_torch(sections.start_from, model, tokenizer=data.tokenizer)
        frozen, initial, notes = {**frozen, **start.frozen}, {**initial, **start.blocks}, (*notes, *start.notes)
    if model.adapter_blocks:
        own = made(model.init_adapters, jax.random.fold_in(jax.random.key(settings.seed), 1))
        initial = {**initial, **{PRIVATE + name: tree for name, tree in own.items()}}
    like = blocks_like(model)
    clients, held_out = training_data(data, sections.data)
    finished = assembly.finished_model(model)
    variants = tuple(variants) if method else sections.variants
    method = method or assembly.method_of(sections, model, criterion)
    if settings.window > 1 and not isinstance(method.round, SplitRound):
        raise UserError("engine.window: the method's round is not a SplitRound, so no part of it can wait; use 0")
    engine = Engine(
        model,
        partition,
        like={**like, **{PRIVATE + name: like[name] for name in model.adapter_blocks}},
        finished=(finished, blocks_like(finished)),
        frozen=made(lambda tree: to_compute_dtype(tree, model.config.dtype), frozen),
        arrays=data.train,
        data=clients,
        held_out=held_out,
        sample_loss=assembly.sample_loss(model),
        rule=method.rule,
        settings=settings,
        devices=devices,
        labels=federation.labels,
    )
    return Experiment(
        config,
        sections,
        federation,
        model,
        data,
        method,
        partition,
        engine,
        variants,
        dict(initial) if target else jax.device_get(dict(initial)),
        notes,
    )


def training_data(data: FederatedData, settings: DataSettings) -> tuple[tuple[ClientData, ...], tuple[ClientData, ...]]:
    """(What each client trains on, what is held out of it); nothing is where `held_out` is 0."""
    if not settings.held_out:
        return data.clients, ()
    cut = [hold_out(mine, settings.held_out, settings.seed, k) for k, mine in enumerate(data.clients)]
    return tuple(kept for kept, _ in cut), tuple(out for _, out in cut)


def blocks_like(model: ServerModel) -> Blocks:
    """Shapes of every block by name, without allocating any."""
    return jax.eval_shape(model.init, jax.random.key(0))[1]


def pretrained_weights(sections: Sections) -> Pretrained | None:
    """The weights that `model.weights` names, or None for random stand-ins.

    Raises:
      UserError: a checkpoint that cannot be read or does not fit, or word pieces that are not its own.
    """
    if not sections.weights:
        return None
    if sections.data.tokenizer == "train" and any("text" in task.modalities for task in sections.tasks):
        raise UserError(
            "data.tokenizer: 'train' makes word pieces that model.weights do not know; name the checkpoint's tokenizer"
        )
    folder = sections.data.cache_dir and os.path.join(sections.data.cache_dir, "weights")
    return checkpoints.load(sections.weights, ServerModel(sections.model, sections.tasks), cache_dir=folder)


_text_scorer = functools.cache(text_scorer)  # one BERT per process


def scorer_of(settings: MetricSettings, tasks: Sequence[Task]) -> TextScorer | None:
    """The scorer of generated text; None where no task generates any."""
    if all(task.kind != "text_generation" for task in tasks):
        return None
    return _text_scorer(**settings._asdict())
