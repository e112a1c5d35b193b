"""What a method is: functions of the state and of a cohort that can train, with no memory of their own.

The engine knows no method by name. It hands a method two things to compose. A `Cohort`: the clients of a round, or a
batch of them after the last one, with the compiled operations on their parameters; see `methods/tap.py`. And, inside
the compiled local training, the `Tools` of one step: gradient, update, statistics; see `plain_step` and
`methods/per_fedavg.py`.

Letters: K clients of the federation, P positions of a cohort (some may be empty), O tasks, R blocks, s samples of a
row; D shards of a cohort, G slots of a shape class, n parameters of one of its blocks, B blocks of the class.

The parameters of a cohort are a tree of float32 arrays for `jax.tree.map` and optax. How the engine packs them: shape
class -> [D, G, n]; the server's, with a slot for each block, [B, n]. Inside a step, which sees one shard, P is of that
shard and they are [G, n].
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array
from jax.typing import ArrayLike

from tap_jax.blocks import Blocks, Params, Tree
from tap_jax.tasks import Task
from tap_jax.token_logits import TokenLogits

if TYPE_CHECKING:
    from tap_jax.methods.criteria import Criterion

Outputs = Array | TokenLogits  # of a forward pass: logits, images, or the factors of a text's logits
OptState = Mapping[str, Tree]  # of an optimizer, by shape class


class StoredModels(Protocol):
    """Blocks of all clients that are not in memory; see `engine.store`."""

    def __len__(self) -> int: ...

    def __getitem__(self, client: int) -> Blocks:
        """The client's blocks, copied into memory."""

    def put(self, update: Mapping[int, Blocks]) -> "StoredModels":
        """The models with the updated clients' blocks exchanged; these stay as they are."""


# One mapping of owned blocks per client, on the host.
ClientModels = tuple[Blocks, ...] | StoredModels
# Client number -> its blocks, on the host: of a batch of clients after the last round.
FinishedBlocks = dict[int, Blocks]


class State(struct.PyTreeNode):
    """All that a run carries from round to round; nothing else is needed to resume it.

    Attributes:
      round: rounds done.
      server: W̃, parameters with one slot per block.
      client_models: name -> one mapping of owned blocks per client, in memory or on disk. "personal" is X, "local" the
        model of a client that never communicates.
      local_loss: h^(l), float32 [K, O]; +inf before the first participation.
      personal_loss: name of a personal model -> h^(p), likewise.
      replacements: name of a personal model -> int32 [K, O], how often R_i[o] was 1.
      seen: bool [K, O], tasks that have ever been in a minibatch of the rounds.
      heard: bool [K, O], those of them whose federated loss was a number at least once.
      moments: where optimizer states persist, name of a trained model -> per client, block -> float32 [1 + 2n]: steps
        taken, first and second moments; else empty. `Cohort.train` goes on with them and gives the state with what it
        leaves, which may be on the devices until the round is over (`engine.moments`).
      verdicts: what screening found in the aggregations of a round (`engine.screening.Verdicts`); the loop over rounds
        takes it out, so between rounds there is none.
    """

    round: int
    server: Params
    client_models: Mapping[str, ClientModels]
    local_loss: np.ndarray
    personal_loss: Mapping[str, np.ndarray]
    replacements: Mapping[str, np.ndarray]
    seen: np.ndarray
    heard: np.ndarray
    moments: Mapping[str, ClientModels] = struct.field(default_factory=dict)
    verdicts: tuple[Any, ...] = ()


class Losses(Protocol):
    """Losses of a phase: `mean(history)` is float32 [P, O], over the steps that saw the task.

    A client whose blocks are not all numbers at the end has NaN for every task it saw.
    """

    @property
    def seen(self) -> Array:
        """bool [P, O], tasks that were in a minibatch."""

    def mean(self, history: str = ...) -> Array:
        """Mean loss of every client and task."""


class Row(NamedTuple):
    """What a further term of the loss sees of one row: samples of one client, one stream, one minibatch.

    Attributes:
      frozen: Ŵ.
      task: one of the row's task group: of the row's own kind, modalities and shapes.
      batch: the samples' fields, [s, ...].
      weights: float32 [s]; over a client's minibatch and task they add up to 1, and padding has 0.
      client: int32, position in the cohort shard.
      take: parameters -> the parts of this row's forward pass, of the row's client.
      key: dropout key of the row.
    """

    frozen: Tree
    task: Task
    batch: Mapping[str, Array]
    weights: Array
    client: Array
    take: Callable[[Params], Tree]
    key: Array

    def total(self, losses: Array) -> Array:
        """Σ_n w_n ℓ_n over the row's real samples: losses float32 [s] -> a scalar."""
        return jnp.where(self.weights > 0, self.weights * losses, 0).sum()


class StepLosses(NamedTuple):
    """Of one step: ℓ_o, λ_o ℓ_o and λ_o of every client and task, float32 [P, O]; 0 where the task is not seen."""

    plain: Array
    weighted: Array
    share: Array


class Tools(Protocol):
    """What one step of local training is made of; all parameters are the whole cohort's.

    Attributes:
      rate: η of every slot, shape class -> float32 [G, 1]: clients that train side by side may be of different rounds.
      no_losses: zeros, to start a loop over gradients with.
    """

    rate: Mapping[str, Array]
    no_losses: StepLosses

    def gradient(
        self, params: Params, auxiliary: Any = None, *, minibatch: int | Array = 0
    ) -> tuple[Params, StepLosses]:
        """Gradient of Σ_o λ_o ℓ_o plus the rule's `extra_loss`, on minibatch number `minibatch` of the step.

        Args:
          params: shape class -> [G, n], where the gradient is taken.
          auxiliary: what the extra loss is given.
          minibatch: 0 to `LocalRule.minibatches_per_step` - 1; a number or an int32 scalar.

        Returns:
          The gradient, shape class -> float32 [G, n] as the parameters, 0 in free slots; and the losses, [P, O].
        """

    def statistics(self, params: Params, *, minibatch: int | Array = 0) -> Mapping[str, Tree]:
        """The rule's `statistics`, summed over a client's minibatch: name -> leaves [P, ...]; dropout as of `gradient`.

        Only for clients of which the rule says `needs_statistics`; others may have sums of 0, or of a part of the
        minibatch.
        """

    def update(self, params: Params, opt_state: OptState, gradient: Params) -> tuple[Params, OptState]:
        """One clipped AdamW update of the clients that take this step; the blocks of others stay as they are.

        Args:
          params: shape class -> [G, n].
          opt_state: a mapping by shape class; a step is given it, and hands on what this returns.
          gradient: shape class -> [G, n].

        Returns:
          The new parameters and optimizer state, of the same shape classes and shapes.
        """


class Forward(Protocol):
    """A model's forward pass."""

    def __call__(
        self, frozen: Tree, parts: Tree, task: Task, batch: Mapping[str, Array], *, key: Array | None = None
    ) -> tuple[Outputs, Array]:
        """(outputs, latents) of a batch of the task, see `ServerModel.forward`."""


Stepped = tuple[Params, OptState, StepLosses]  # what a local step leaves
LocalStep = Callable[[Tools, Params, OptState, Any], Stepped]  # of (tools, params, optimizer state, teacher)


def plain_step(tools: Tools, params: Params, opt_state: OptState, teacher: Any) -> Stepped:
    """One gradient, one AdamW update: Local, FedAvg, TAP."""
    gradient, losses = tools.gradient(params, teacher)
    return *tools.update(params, opt_state, gradient), losses


@dataclasses.dataclass(frozen=True)
class LocalRule:
    """How a cohort trains locally: pure functions that the engine compiles into one program.

    Attributes:
      step: see `LocalStep`.
      minibatches_per_step: minibatches that one step reads, drawn independently of each other.
      takes_teacher: whether training may be given a teacher's parameters (`Cohort.train`'s `teacher`). A step's
        `teacher` is then (whether there is one, bool; its parameters, or zeros), else None.
      teacher_optional: it does without, too: in trainings that are given none, `teacher` may be None, which saves the
        memory of the zeros where blocks are large.
      extra_loss: (row, outputs, latents, auxiliary) -> a further term of the objective on this row, a scalar; outputs
        and latents are those of the model's `forward`. It is added to λ_o ℓ_o as it is.
      statistics: (row, latents) -> name -> tree of sums over the row's samples, for `Tools.statistics`.
      needs_statistics: tasks of a client -> whether its step reads them.
    """

    step: LocalStep = plain_step
    minibatches_per_step: int = 1
    takes_teacher: bool = False
    teacher_optional: bool = False
    extra_loss: Callable[[Row, Outputs, Array, Any], Array] | None = None
    statistics: Callable[[Row, Array], Mapping[str, Tree]] | None = None
    needs_statistics: Callable[[Sequence[Task]], bool] = lambda tasks: False


PLAIN = LocalRule()


class Cohort(Protocol):
    """Clients that train together. It is data: what a training or an aggregation changes is in what it returns."""

    @property
    def clients(self) -> np.ndarray:
        """int [P], client numbers, -1 at an empty position."""

    def broadcast(self, server: Params) -> Params:
        """W̃[i] for every client: the server's parameters [B, n] -> [D, G, n]."""

    def load(self, models: ClientModels | Mapping[int, Blocks], rest: Params | None = None) -> Params:
        """The clients' blocks from models of the state; where those are of private blocks, with those of `rest`.

        Args:
          models: client number -> its blocks, for the cohort's clients at least.
          rest: parameters of the shape classes that the models do not have; taken as they are.

        Returns:
          Shape class -> float32 [D, G, n], on the devices; 0 in free slots.
        """

    def put(self, models: ClientModels, params: Params) -> ClientModels:
        """The models with the clients' blocks exchanged for those of `params`; the given ones are as they were.

        Args:
          params: [D, G, n]; shape classes that the models do not have are left out.
        """

    def unload(self, params: Params) -> FinishedBlocks:
        """Client number -> its blocks by name, on the host, from parameters [D, G, n]; no entry for empty positions."""

    def train(
        self,
        state: State,
        params: Params,
        phase: str,
        *,
        model: str | None = None,
        post: bool = False,
        twice: bool = False,
        teacher: Params | None = None,
    ) -> tuple[State, Params, "Losses"]:
        """Local training -> (state, params, losses): τ steps of the round, or P steps after the last one.

        With `twice` 2P steps after the last round, of which the first P are those without it (App. C.1).

        Args:
          state: of it, the optimizer states that persist.
          params: what is trained, [D, G, n]. They are consumed: who needs them again broadcasts or loads them again.
          phase: one of `data.sampling.PHASES`; names the random stream of minibatches and dropout.
          model: what is trained, where optimizer states persist; default: what the phase says.
          teacher: not consumed; for TAP's rule the loss is equation 6 where there is one.

        Returns:
          The state with the optimizer states that a training of the rounds leaves, where they persist; else, and after
          the last round, as it was. The trained parameters and the losses, [P, O].
        """

    def train_steps(
        self,
        params: Params,
        opt_state: OptState | None,
        phase: str,
        steps: tuple[int, int],
        *,
        post: bool = False,
        teacher: Params | None = None,
        idle: np.ndarray | None = None,
    ) -> tuple[Params, OptState | None, "Losses"]:
        """A part of what `train` does -> (params, optimizer states, losses).

        Args:
          params: consumed.
          opt_state: with which it begins, of `opt_state` or of the part before; not consumed. None: it starts afresh
            and gives none back.
          steps: from the first to before the second.
          idle: bool [P], positions that take none.
        """

    def opt_state(self, state: State, phase: str, *, model: str | None = None) -> OptState:
        """The optimizer states with which `train` begins where they persist, and zeros where they do not."""

    def aggregate(self, state: State, params: Params, losses: "Losses") -> State:
        """Component-wise FedAvg, or its private form; an update that screening drops has no say.

        Args:
          state: its server's blocks are those broadcast in this round.
          params: what the clients send, [D, G, n].
          losses: of the training that made it; screening reads them.

        Returns:
          The state with the server's new parameters; its `verdicts` say whose updates were dropped.
        """

    def replace(self, personal: Params, federated: Params, indicator: Array) -> Params:
        """Equation 4 with R = `indicator` bool [P, O]."""

    def held_out_loss(self, params: Params) -> Array:
        """Mean loss of every client and task on its held-out samples, without dropout, float32 [P, O].

        0 where a client has none of the task.
        """

    def task_gradient(self, params: Params, task: Task) -> Params:
        """Gradient of ℓ_o alone, without dropout, on a minibatch of the client's samples; 0 for clients without any."""

    def similarity(self, params: Params, other: Params) -> Array:
        """Mean cosine between two models' mean path vectors of the same held-out samples, float32 [P, O]."""

    def inner(self, params: Params, other: Params) -> Array:
        """Inner products of two models per client and block, float32 [P, R]."""


class RoundMetrics(NamedTuple):
    """What a method tells of a round of a cohort, on the devices or the host.

    Attributes:
      seen: bool [P, O], tasks that were in a minibatch.
      federated_loss, personal_loss, local_loss: float32 [P, O], mean training losses of the method's models; None of
        those that it does not have.
      replaced: variant -> bool [P, O], where personal blocks gave way to federated ones; None where none ever do.
    """

    seen: Array
    federated_loss: Array | None = None
    personal_loss: Array | None = None
    local_loss: Array | None = None
    replaced: Mapping[str, Array] | None = None


class Trained(NamedTuple):
    """What a round's federated part hands to its personal part.

    Attributes:
      federated: W̃[i] of every client after its local training, [D, G, n].
      losses: of that training, [P, O].
    """

    federated: Params
    losses: "Losses"


@dataclasses.dataclass(frozen=True)
class SplitRound:
    """A round in two parts, of which the second gives nothing to the server; a `Method.round`.

    Where `engine.window` is more than 1, the engine plays the federated parts of several rounds first, and then their
    personal parts with the clients of all these rounds together. A client that is drawn more than once takes part in
    several personal parts, one after the other in the order of its rounds.

    Attributes:
      federated: (cohort, state) -> (state, `Trained`). The state's round and server's blocks are new; of all else, the
        method may read only what the personal part does not write.
      personal: (cohort, state, `Trained`) -> (state, `RoundMetrics`). The cohort's clients may be of different rounds.
        It writes clients' models and rows of the state's tables; it neither reads nor writes the server's blocks or the
        round. Who calls it keeps no reference to its `Trained`.
    """

    federated: Callable[[Cohort, State], tuple[State, Trained]]
    personal: Callable[[Cohort, State, Trained], tuple[State, RoundMetrics]]

    def __call__(self, cohort: Cohort, state: State) -> tuple[State, RoundMetrics]:
        """The whole round."""
        state, *trained = self.federated(cohort, state)
        return self.personal(cohort, state, trained.pop())  # popped: no name here keeps W̃[i] while X trains


class Model(Protocol):
    """What a method is given of the `ServerModel`: its tasks, and pure functions of it."""

    @property
    def tasks(self) -> Sequence[Task]:
        """O of them."""

    @property
    def forward(self) -> Forward:
        """(outputs, latents) of a batch of a task."""

    @property
    def dual(self) -> Callable[[Blocks, Blocks], Blocks]:
        """(parts or blocks with the first adapters, with the second) -> with both, ½ each."""


class MethodContext(NamedTuple):
    """What a method is made for, beside its own settings (`registry.MethodEntry.make`).

    Attributes:
      model: the `ServerModel`.
      variants: what the run is to yield.
      post_steps: P.
      criterion: of replacement, in the place of the settings'; None: theirs.
    """

    model: Model
    variants: Sequence[str]
    post_steps: int
    criterion: "Criterion | None" = None


@dataclasses.dataclass(frozen=True)
class Method:
    """A federated algorithm.

    Attributes:
      client_models: names of the models of each client that the state must carry.
      round: (cohort, state) -> (state, `RoundMetrics`); a `SplitRound` where a part of it may be deferred.
      finish: (cohort, state, variants) yields (variant, client -> blocks), for a batch of clients after the
        last round. It leaves out variants whose models are the server's blocks.
      rule: how clients train locally.
      personal_variants: name of a personal model -> its variant, for each with margins of its own.
      first_phase: of the first training of a round, whose minibatches are drawn while the round before it runs. Another
        one costs time, and changes nothing else.
    """

    client_models: tuple[str, ...]
    round: Callable[[Cohort, State], tuple[State, RoundMetrics]]
    finish: Callable[[Cohort, State, Sequence[str]], Iterator[tuple[str, FinishedBlocks]]]
    rule: LocalRule = PLAIN
    personal_variants: Mapping[str, str] = dataclasses.field(default_factory=dict)
    first_phase: str = "federated"


def put_rows(table: np.ndarray, clients: np.ndarray, rows: ArrayLike, where: ArrayLike | None = None) -> np.ndarray:
    """`table` [K, O] with the cohort's rows [P, O] written over its clients' (only `where` true, bool [P, O])."""
    out, real = np.array(table), clients >= 0
    rows = np.asarray(rows)[real]
    kept = out[clients[real]]
    out[clients[real]] = rows if where is None else np.where(np.asarray(where)[real], rows, kept)
    return out


def take_rows(table: np.ndarray, clients: np.ndarray) -> np.ndarray:
    """The cohort's rows [P, O] of `table` [K, O]; some row at empty positions."""
    return table[np.maximum(clients, 0)]


def put_models(models: ClientModels, update: Mapping[int, Blocks]) -> ClientModels:
    """The models with the updated clients' blocks exchanged; the others, and the given ones, are as they were."""
    if not isinstance(models, tuple):  # on disk
        return models.put(update)
    return tuple(update.get(client, blocks) for client, blocks in enumerate(models))
