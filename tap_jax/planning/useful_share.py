"""How much of a run's arithmetic is for samples and tokens that are there, from its plans alone.

Plans of some rounds and of the last phases are drawn as training draws them. No weights and no device are needed. The
share is that of floating-point operations (`flops`): what the real samples would take, each by itself and at its own
length, over what the rows take that hold them. What rematerialisation does again is in neither.

Letters: S samples of a row, T tokens of a text, A tokens that an answer predicts.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tap_jax.data.device_data import cut
from tap_jax.data.federated import FederatedData
from tap_jax.data.packing import RowShape, pack
from tap_jax.data.sampling import ClientData, Plan, Rows, capacities, draw_plan, row_shapes, sample_cohort
from tap_jax.data.task_groups import TaskGroup, fields, offsets, task_groups
from tap_jax.data.text import PAD, TaskArrays
from tap_jax.engine.settings import EngineSettings
from tap_jax.evaluation.evaluate import test_shapes
from tap_jax.federation import Federation
from tap_jax.models.server_model import ServerModel
from tap_jax.planning.columns import columns
from tap_jax.planning.flops import Flops
from tap_jax.planning.step_cost import padded_batch, task_flops
from tap_jax.tasks import Task

LOSSES = ("rows", "texts", "answers")


@dataclasses.dataclass(frozen=True)
class Share:
    """Floating-point operations of some rows.

    Attributes:
      useful: of the real samples and tokens in them.
      computed: of the rows.
      lost: where the difference goes: "rows" with room for more samples, "texts" and "answers" shorter than their room.
    """

    useful: float = 0.0
    computed: float = 0.0
    lost: Mapping[str, float] = dataclasses.field(default_factory=lambda: dict.fromkeys(LOSSES, 0.0))

    @property
    def share(self) -> float:
        """Useful over computed; 1 where nothing is computed."""
        return self.useful / self.computed if self.computed else 1.0

    def __add__(self, other: "Share") -> "Share":
        lost = {name: self.lost[name] + other.lost[name] for name in LOSSES}
        return Share(self.useful + other.useful, self.computed + other.computed, lost)

    def __mul__(self, times: float) -> "Share":
        return Share(self.useful * times, self.computed * times, {name: v * times for name, v in self.lost.items()})


@dataclasses.dataclass(frozen=True)
class TaskCost:
    """Operations of one sample of a task: what it takes whatever its length, of a text of T, of an answer of A tokens.

    Attributes:
      sample: of what does not depend on lengths.
      text, answer: coefficients of T and T², of A and A².
    """

    sample: float
    text: tuple[float, float] = (0.0, 0.0)
    answer: tuple[float, float] = (0.0, 0.0)

    def texts(self, lengths: np.ndarray) -> np.ndarray:
        """Of each text."""
        return self.text[0] * lengths + self.text[1] * np.square(lengths, dtype=np.float64)

    def answers(self, lengths: np.ndarray) -> np.ndarray:
        """Of each answer."""
        return self.answer[0] * lengths + self.answer[1] * np.square(lengths, dtype=np.float64)


class Costs:
    """What samples and rows of a model cost, counted from shapes when first asked for.

    Args:
      model: of the run.
      work: "gradient" of the task's loss, its "forward" pass, or "prediction": answers are then generated, token by
        token, and not read.
      beside: the costs of other work of the same model: what they have counted is not counted again.
    """

    def __init__(self, model: ServerModel, work: str, beside: "Costs | None" = None):
        self.model, self.work = model, work
        self._flops = beside._flops if beside else functools.cache(self._flops_of)
        self.task = functools.cache(self._task)
        self.row = functools.cache(self._row)

    def _count(self, task: Task, batch: Mapping[str, jax.ShapeDtypeStruct], *, read: bool = True) -> int:
        """`read`: answers are, even where the work is to generate them."""
        fields = tuple((name, leaf.shape, leaf.dtype) for name, leaf in batch.items())
        found = self._flops(task, fields, read or not self.generates(task))
        return found.total if self.work == "gradient" else found.forward

    def _flops_of(self, task: Task, fields: Sequence[tuple[str, tuple[int, ...], Any]], decoded: bool) -> Flops:
        """Of the loss on a batch of these shapes and dtypes, or of its path vectors alone."""
        batch = {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape, dtype in fields}
        return task_flops(self.model, task, batch, decoded=decoded)

    def batch(self, task: Task, fields: Mapping[str, np.ndarray]) -> float:
        """Of the samples of a task, each by itself and at its own length; their fields are padded."""
        cost, samples = self.task(task), len(next(iter(fields.values())))
        total = samples * cost.sample
        if "tokens" in fields:
            total += float(cost.texts((fields["tokens"] != PAD).sum(1)).sum())
        if "answers" in fields:
            total += float(cost.answers((fields["answers"] != PAD).sum(1) - 1).sum())
        return total

    def generates(self, task: Task) -> bool:
        """Whether the task's answers are generated."""
        return self.work == "prediction" and task.kind == "text_generation"

    def _task(self, task: Task) -> TaskCost:
        """By three lengths of each kind: attention makes both quadratic."""
        c = self.model.config

        def one(text: int = 1, answer: int = 1) -> int:
            return self._count(task, padded_batch(task, 1, text=text, answer=answer))

        base = one()

        def quadratic(longest: int, cost: Callable[[int], int]) -> tuple[float, float]:
            middle = max(2, longest // 2)
            low, high = ((cost(n) - base) / (n - 1) for n in (middle, longest))  # a + b(n + 1)
            square = (high - low) / (longest - middle)
            return low - square * (middle + 1), square

        text = answer = (0.0, 0.0)
        if "text" in task.modalities:
            text = quadratic(c.max_text, lambda n: one(text=n))
        if task.kind == "text_generation":
            answer = quadratic(c.max_answer - 1, lambda n: one(answer=n))
        return TaskCost(base - sum(text) - sum(answer), text, answer)

    def _row(self, task: Task, shape: RowShape, widths: tuple[int, int]) -> float:
        """One row; padded texts and answers are as wide as `widths` says."""
        batch = padded_batch(task, shape.samples, text=widths[0], answer=widths[1])
        if shape.texts or shape.answers:
            where = jax.ShapeDtypeStruct((shape.samples,), jnp.int32)
            stored = {name: leaf for name, leaf in batch.items() if name != "images"}
            laid = jax.eval_shape(lambda b, at: cut(b, at, shape, at, at), stored, where)
            batch = {name: leaf for name, leaf in batch.items() if name == "images"} | laid
        return self._count(task, batch, read=False)


class Measure:
    """Adds up `Share`s of rows of one split.

    Args:
      model: of the run.
      task_groups: of its tasks. shapes: task group -> shapes of the rows.
      arrays: task -> the split.
    """

    def __init__(self, costs: Costs, task_groups: Sequence[TaskGroup], shapes: Mapping, arrays: Mapping):
        self.costs, self.task_groups, self.shapes = costs, task_groups, shapes
        self.starts = {name: at for group in task_groups for name, at in offsets(group, arrays).items()}
        self.text_lengths = {
            f.name: np.concatenate([arrays[t.name].text_lengths for t in f.tasks]) for f in task_groups
        }
        self.answer_lengths = {
            f.name: np.concatenate([_answer_lengths(arrays[task.name]) for task in f.tasks]) for f in task_groups
        }
        self.domains = {name: split.domains for name, split in arrays.items()}
        self.widths = {f.name: _widths(arrays[f.tasks[0].name]) for f in task_groups}

    def plan(self, plan: Plan) -> dict[str, Share]:
        """Task name -> share, of all steps of a plan of one shard and minibatch."""
        found: dict[str, Share] = {}
        for group in self.task_groups:
            for rows, shape in zip(plan.rows[group.name], self.shapes[group.name], strict=True):
                for name, share in self._rows(group, shape, rows):
                    found[name] = found.get(name, Share()) + share
        return found

    def _rows(self, group: TaskGroup, shape: RowShape, rows: Rows) -> Iterable[tuple[str, Share]]:
        real = np.arange(rows.table.client.shape[1]) < rows.count[:, None]
        task_of = np.array([group.tasks.index(stream.task) for stream in group.streams])
        for number, task in enumerate(group.tasks):
            mine = real & (task_of[rows.table.stream] == number)
            if mine.any():
                ids = rows.table.ids[mine][rows.table.weights[mine] > 0]
                yield task.name, self.rows(group, task, shape, int(mine.sum()), ids)

    def samples(self, group: TaskGroup, task: Task, ids: np.ndarray) -> Share:
        """Of samples `ids` of a task, dealt out to rows as evaluation does."""
        total, shapes = Share(), self.shapes[group.name]
        domains, ids = self.domains[task.name][ids], self.starts[task.name] + ids
        for domain in range(len(task.domains)):
            mine = ids[domains == domain]
            for row in pack(shapes, len(mine), self.text_lengths[group.name][mine], np.zeros(len(mine), int)):
                total += self.rows(group, task, shapes[row.size], 1, mine[row.samples])
        return total

    def rows(self, group: TaskGroup, task: Task, shape: RowShape, rows: int, ids: np.ndarray) -> Share:
        """Of so many rows of one shape that hold the samples `ids` of the group's arrays, all of one task."""
        cost, widths = self.costs.task(task), self.widths[group.name]
        texts, answers = self.text_lengths[group.name][ids], self.answer_lengths[group.name][ids]
        computed = rows * float(self.costs.row(task, shape, widths))
        text, answer = float(cost.texts(texts).sum()), float(cost.answers(answers).sum())
        room = rows * shape.samples
        empty = room - len(ids)
        lost_rows, lost_answers = empty * cost.sample, -answer
        full_text, full_answer = cost.texts(np.array(widths[0])), cost.answers(np.array(widths[1]))
        if shape.texts is None:  # every place in a padded row has room of its own
            lost_rows += empty * float(full_text)
        if shape.answers is None:
            lost_rows += empty * float(full_answer)
            lost_answers += len(ids) * float(full_answer)
        else:
            lost_answers += rows * shape.answers.number * float(cost.answers(np.array(shape.answers.tokens)))
        if self.costs.generates(task):  # all places take a step as long as one answer goes on
            steps = float(cost.answers(answers.max(initial=0)))
            computed += rows * shape.samples * steps
            lost_rows, lost_answers = empty * (cost.sample + steps), len(ids) * steps - answer
        useful = len(ids) * cost.sample + text + answer
        lost = {"rows": lost_rows, "texts": computed - useful - lost_rows - lost_answers, "answers": lost_answers}
        return Share(useful, computed, lost)


def _answer_lengths(split: TaskArrays) -> np.ndarray:
    return np.zeros(len(split), int) if split.answer_lengths is None else split.answer_lengths


def _widths(split: TaskArrays) -> tuple[int, int]:
    """Of a padded text, and of the tokens that a padded answer predicts."""
    found = fields(split)
    return tuple(found[name].shape[1] - less if name in found else 0 for name, less in (("tokens", 0), ("answers", 1)))


@dataclasses.dataclass(frozen=True)
class Shares:
    """Task name -> share, by phase."""

    rounds: Mapping[str, Share]
    stage2: Mapping[str, Share]
    evaluation: Mapping[str, Share]


def measure(
    model: ServerModel,
    federation: Federation,
    data: FederatedData,
    clients: Sequence[ClientData],
    settings: EngineSettings,
    *,
    personal: bool,
    plans: int,
) -> Shares:
    """The shares of a run.

    Args:
      model: of the run; of tasks of its federation.
      data: its data. clients: what each client trains on.
      settings: sizes of minibatches and rows.
      personal: clients train a personal model beside the federated one, and a teacher's forward pass goes with it in
        Stage 2.
      plans: rounds whose plans are drawn, from round 0 on.
    """
    found = task_groups(model.tasks, data.train)
    sizes = {"packed": settings.packed, "image_tokens": model.config.image_tokens}
    shapes = row_shapes(found, data.train, microbatch=settings.microbatch, batch=settings.batch, **sizes)
    training = Costs(model, "gradient")
    forward, prediction = (Costs(model, work, beside=training) for work in ("forward", "prediction"))
    measured = Measure(training, found, shapes, data.train)
    with_teacher = Measure(forward, found, shapes, data.train)

    def draw(numbers: Sequence[int], round_: int, phase: str, steps: int, epochs: int | None) -> Plan:
        rows = capacities(clients, found, shapes, positions=len(numbers), batch=settings.batch)
        return draw_plan(
            clients,
            np.asarray(numbers),
            found,
            seed=settings.seed,
            round_=round_,
            phase=phase,
            batch=settings.batch,
            shapes=shapes,
            steps=steps,
            capacities=rows,
            starts=measured.starts,
            epochs=epochs,
        )

    rounds: dict[str, Share] = {}
    for round_ in range(plans):
        cohort = sample_cohort(settings.seed, round_, len(clients), settings.cohort_size)
        for phase in ("federated", "personal") if personal else ("federated",):
            _add(rounds, measured.plan(draw(cohort, round_, phase, settings.local_steps, 1)))
    stage2: dict[str, Share] = {}
    for client in range(len(clients)):
        for phase in ("post", "distil") if personal else ("post",):
            plan = draw([client], plans, phase, settings.post_steps, None)
            _add(stage2, measured.plan(plan))
            if phase == "distil":
                _add(stage2, with_teacher.plan(plan))
    return Shares(rounds, stage2, _evaluation(prediction, federation, data, settings, found))


def _evaluation(
    costs: Costs, federation: Federation, data: FederatedData, settings: EngineSettings, found: Sequence[TaskGroup]
) -> dict[str, Share]:
    """Of one variant's models on their test sets; answers of the references' lengths, as if all were read at once."""
    shapes = test_shapes(
        found, data.test, settings, image_tokens=costs.model.config.image_tokens, personal=data.personal_tests
    )
    measured, total = Measure(costs, found, shapes, data.test), {}
    for group in found:
        for task in group.tasks:
            owners = [k for k, client in enumerate(federation.clients) if task.name in client.shares]
            for client in owners:
                ids = np.arange(len(data.test[task.name]))
                ids = ids if data.personal_tests is None else data.personal_tests[client][task.name]
                share = measured.samples(group, task, ids)
                if data.personal_tests is None:  # all have the same
                    _add(total, {task.name: share * len(owners)})
                    break
                _add(total, {task.name: share})
    return total


def _add(total: dict[str, Share], more: Mapping[str, Share]) -> None:
    for name, share in more.items():
        total[name] = total.get(name, Share()) + share


def report(shares: Shares, *, rounds: float) -> list[str]:
    """Lines that say the shares: of the phases, by task, and where the rest goes; and what all of it costs.

    Args:
      rounds: how many times the rounds that were drawn the run has.
    """
    lines, tflop, rows = [], [], [("phase", "task", "share", *(f"lost to {name}" for name in LOSSES))]
    for phase, by_task in (("rounds", shares.rounds), ("stage 2", shares.stage2), ("evaluation", shares.evaluation)):
        total = sum(by_task.values(), Share())
        lines.append(f"useful share, {phase}: {total.share:.2f}")
        tflop.append(f"{total.computed * (rounds if phase == 'rounds' else 1) / 1e12:,.3g}")
        for name, share in (*by_task.items(), ("all", total)):
            lost = (share.lost[kind] / max(share.computed, 1) for kind in LOSSES)
            rows.append((phase, name, f"{share.share:.3f}", *(f"{abs(part):.3f}" for part in lost)))
    return [
        *lines,
        "TFLOP computed: {} in all rounds, {} in stage 2, {} in the evaluation of one variant".format(*tflop),
        "Floating-point operations of real samples and tokens over those computed; recomputation is in neither:",
        *(f"  {line}" for line in columns(rows, left=range(len(rows[0])))),
    ]
