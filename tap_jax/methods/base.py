"""What a method is: pure functions of the state and of a cohort that can train.

The engine knows no method by name. It hands a method two things to compose. A `Cohort`: the clients of a round (or of a
pass over all clients) with the compiled operations on their stacks; see `methods/tap.py`. And, inside the compiled
local training, the `Tools` of one step: gradient, update, collect; see `plain_step` here and `methods/per_fedavg.py`.

Letters: K clients of the federation, P positions of a cohort (some may be empty), O tasks, R blocks, s samples of a
row; D shards of a cohort, G slots of a group of blocks, n parameters of one of them, B blocks of the group.

A stack of a cohort is group -> float32 [D, G, n]; the server's, with a slot for each block, [B, n]. Inside a step,
which sees one shard, P is of that shard and a stack is [G, n].
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from flax import struct
from jax import Array

from tap_jax.blocks import Blocks, Stack, Tree
from tap_jax.federation import Task


class StoredChain(Protocol):
    """Blocks of all clients that are not in memory; see `engine.store`."""

    def __len__(self) -> int: ...

    def __getitem__(self, client: int) -> Blocks:
        """The client's blocks, copied into memory."""

    def put(self, update: Mapping[int, Blocks]) -> "StoredChain":
        """The chain with the updated clients' blocks exchanged; this one stays as it is."""


# One mapping of owned blocks per client, on the host.
Chain = tuple[Blocks, ...] | StoredChain


class State(struct.PyTreeNode):
    """All that a run carries from round to round; nothing else is needed to resume it.

    Attributes:
      round: rounds done.
      server: W̃, stack with one slot per block.
      chains: name -> one mapping of owned blocks per client, in memory or on disk. "personal" is X, "local" the chain
        of a client that never communicates.
      local_loss: h^(l), float32 [K, O]; +inf before the first participation.
      personal_loss: name of a personal chain -> h^(p), likewise.
      replacements: name of a personal chain -> int32 [K, O], how often R_i[o] was 1.
      seen: bool [K, O], tasks that have ever been in a minibatch of the rounds.
      finite: name of a trained chain ("federated" or one of `chains`) -> bool [K, O]: the task's loss has always
        been a number.
      moments: where optimizer states persist, name of a trained chain -> per client, block -> float32 [1 + 2n]: steps
        taken, first and second moments; else empty. Cohorts are given them and the loop takes them back: methods
        need not know.
    """

    round: int
    server: Stack
    chains: Mapping[str, Chain]
    local_loss: np.ndarray
    personal_loss: Mapping[str, np.ndarray]
    replacements: Mapping[str, np.ndarray]
    seen: np.ndarray
    finite: Mapping[str, np.ndarray]
    moments: Mapping[str, Chain] = struct.field(default_factory=dict)


class Losses(Protocol):
    """Losses of a phase: `mean(history)` float32 [P, O] over the steps that saw the task, `seen` bool [P, O].

    A client whose blocks are not all numbers at the end has NaN for every task it saw.
    """

    seen: Array

    def mean(self, history: str = ...) -> Array:
        """Mean loss of every client and task."""


class Row(NamedTuple):
    """What a further term of the loss sees of one row: samples of one client, one stream, one minibatch.

    Attributes:
      frozen: Ŵ.
      task: one of the row's family: of the row's own kind, modalities and shapes.
      batch: the samples' fields, [s, ...].
      weights: float32 [s]; over a client's minibatch and task they add up to 1, and padding has 0.
      client: int32, position in the cohort shard.
      take: a stack -> the parts of this row's forward pass, of the row's client.
      key: dropout key of the row.
    """

    frozen: Tree
    task: Task
    batch: Mapping[str, Array]
    weights: Array
    client: Array
    take: Callable[[Stack], Tree]
    key: Array


class StepLosses(NamedTuple):
    """Of one step: ℓ_o, λ_o ℓ_o and λ_o of every client and task, float32 [P, O]; 0 where the task is not seen."""

    plain: Array
    weighted: Array
    share: Array


class Tools(Protocol):
    """What one step of local training is made of; every stack is the whole cohort's.

    Attributes:
      rate: η of every slot, group -> float32 [G, 1]: clients that train side by side may be of different rounds.
      no_losses: zeros, to start a loop over gradients with.
    """

    rate: Mapping[str, Array]
    no_losses: StepLosses

    def gradient(self, stack: Stack, aid: Any = None, *, draw: Any = 0) -> tuple[Stack, StepLosses]:
        """Gradient of Σ_o λ_o ℓ_o, plus the rule's `extra_loss` given `aid`, on minibatch number `draw` of the step.

        Args:
          stack: group -> [G, n], where the gradient is taken.
          aid: what the extra loss is given.
          draw: 0 to `LocalRule.draws` - 1; a number or an int32 scalar.

        Returns:
          The gradient, group -> float32 [G, n] as the stack, 0 in idle slots; and the losses, [P, O].
        """

    def collect(self, stack: Stack, *, draw: Any = 0) -> Mapping[str, Any]:
        """Sums of the rule's `measure` over a client's minibatch: name -> leaves [P, ...]; same dropout as `gradient`.

        Only for clients that the rule says are `coupled`; others may have sums of 0, or of part of the minibatch.
        """

    def update(self, stack: Stack, state: Mapping, gradient: Stack) -> tuple[Stack, Mapping]:
        """One clipped AdamW update of the clients that take this step; the blocks of others stay as they are.

        Args:
          stack: group -> [G, n].
          state: the optimizer's, a mapping by group; a step is given it, and hands on what this returns.
          gradient: group -> [G, n].

        Returns:
          The new stack and state, of the same groups and shapes.
        """


# (tools, stack, optimizer state, aid) -> (stack, optimizer state, the step's losses)
LocalStep = Callable[[Tools, Stack, Mapping, Any], tuple[Stack, Mapping, StepLosses]]


def plain_step(tools: Tools, stack: Stack, state: Mapping, aid: Any) -> tuple[Stack, Mapping, StepLosses]:
    """One gradient, one AdamW update: Local, FedAvg, TAP."""
    gradient, losses = tools.gradient(stack, aid)
    return *tools.update(stack, state, gradient), losses


@dataclasses.dataclass(frozen=True)
class LocalRule:
    """How a cohort trains locally: pure functions that the engine compiles into one program.

    Attributes:
      step: see `LocalStep`.
      draws: minibatches that one step reads, drawn independently of each other.
      guided: whether training may be given a second stack (`Cohort.train`'s `teacher`). A step's `aid` is then
        (whether it was, bool; that stack, or zeros), else None.
      also_alone: it does without, too: in trainings that are given none, `aid` may be None, which saves the memory of
        the zeros where blocks are large.
      extra_loss: (row, outputs, latents, aid) -> a further term of the objective on this row, a scalar; `outputs` and
        `latents` are those of the model's `forward`. It is added to λ_o ℓ_o as it is.
      measure: (row, latents) -> name -> tree of sums over the row's samples, for `Tools.collect`.
      coupled: tasks of a client -> whether it is worth collecting for.
    """

    step: LocalStep = plain_step
    draws: int = 1
    guided: bool = False
    also_alone: bool = False
    extra_loss: Callable[[Row, Array, Array, Any], Array] | None = None
    measure: Callable[[Row, Array], Mapping[str, Any]] | None = None
    coupled: Callable[[Sequence[Task]], bool] = lambda tasks: False


PLAIN = LocalRule()


class Cohort(Protocol):
    """Clients that train together.

    Attributes:
      clients: int [P], client numbers, -1 at an empty position.
    """

    clients: np.ndarray

    def broadcast(self, server: Stack) -> Stack:
        """W̃[i] for every client: the server's stack [B, n] -> [D, G, n]."""

    def load(self, chain: Sequence[Blocks] | Mapping[int, Blocks], rest: Stack | None = None) -> Stack:
        """The clients' blocks from a chain of the state; where that is of private blocks, with those of `rest`.

        Args:
          chain: client number -> its blocks, for the cohort's clients at least.
          rest: a stack of the groups that the chain does not have; taken as it is.

        Returns:
          Group -> float32 [D, G, n], on the devices; 0 in idle slots.
        """

    def put(self, chain: Chain, stack: Stack) -> Chain:
        """The chain with the clients' blocks exchanged for those of the stack; the given one is as it was.

        Args:
          stack: [D, G, n]; groups that the chain does not have are left out.
        """

    def unload(self, stack: Stack) -> dict[int, Blocks]:
        """Client number -> its blocks by name, on the host, from a stack [D, G, n]; no entry for empty positions."""

    def train(
        self,
        stack: Stack,
        purpose: str,
        *,
        chain: str | None = None,
        post: bool = False,
        teacher: Stack | None = None,
        steps: tuple[int, int] | None = None,
        idle: np.ndarray | None = None,
    ) -> tuple[Stack, "Losses"]:
        """Local training -> (stack, Losses): τ steps of the round, or P steps after the last one.

        `purpose` names the draw of minibatches and dropout. `chain` is what is trained, where optimizer states persist
        (default: what the purpose says). The stack given is consumed, the teacher is not; for a TAP-like rule the loss
        is equation 6 where there is one. `steps`: only those from the first to before the second; where the first is
        not 0, the optimizer goes on from the call before. `idle`, bool [P]: positions that take none of them.
        """

    def aggregate(self, server: Stack, stack: Stack, losses: "Losses") -> Stack:
        """Component-wise FedAvg, or its private form; an update that screening drops has no say.

        Args:
          server: what was broadcast in this round, [B, n].
          stack: what the clients send, [D, G, n].
          losses: of the training that made it; screening reads them.

        Returns:
          The server's new stack, [B, n].
        """

    def replace(self, personal: Stack, federated: Stack, indicator: Array) -> Stack:
        """Equation 4 with R = `indicator` bool [P, O]."""

    def held_out_loss(self, stack: Stack) -> Array:
        """Mean loss of every client and task on its held-out samples, without dropout, float32 [P, O].

        0 where a client has none of the task.
        """

    def task_gradient(self, stack: Stack, task: Task) -> Stack:
        """Gradient of ℓ_o alone, without dropout, on a minibatch of the client's samples; 0 for clients without any."""

    def similarity(self, stack: Stack, other: Stack) -> Array:
        """Mean cosine between two models' mean path vectors of the same held-out samples, float32 [P, O]."""

    def inner(self, stack: Stack, other: Stack) -> Array:
        """Inner products of two stacks per client and block, float32 [P, R]."""


class Trained(NamedTuple):
    """What a round's federated part hands to its personal part.

    Attributes:
      federated: W̃[i] of every client after its local training, [D, G, n].
      losses: of that training, [P, O].
    """

    federated: Stack
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
      personal: (cohort, state, `Trained`) -> (state, metrics). The cohort's clients may be of different rounds. It
        writes clients' chains and rows of the state's tables; it neither reads nor writes the server's blocks or the
        round. Metrics are those of `Method.round`. Who calls it keeps no reference to its `Trained`.
    """

    federated: Callable[[Cohort, State], tuple[State, Trained]]
    personal: Callable[[Cohort, State, Trained], tuple[State, dict[str, Any]]]

    def __call__(self, cohort: Cohort, state: State) -> tuple[State, dict[str, Any]]:
        """The whole round."""
        state, *trained = self.federated(cohort, state)
        return self.personal(cohort, state, trained.pop())


@dataclasses.dataclass(frozen=True)
class Method:
    """A federated algorithm.

    Attributes:
      chains: names of the per-client chains that the state must carry.
      round: (cohort, state) -> (state, metrics). Metrics are tables [P, O]: "seen", and of "federated_loss",
        "personal_loss" and "local_loss" those that the method has; "replaced" maps variants to such tables. A
        `SplitRound` where a part of it may be deferred.
      finish: (cohort, state, variants) yields (variant, client -> blocks), for one pass over some clients after the
        last round. It leaves out variants whose models are the server's blocks.
      rule: how clients train locally.
      margins: name of a personal chain -> variant, for each chain with its own margins.
    """

    chains: tuple[str, ...]
    round: Callable[[Cohort, State], tuple[State, dict[str, Any]]]
    finish: Callable[[Cohort, State, Sequence[str]], Iterator[tuple[str, dict[int, Blocks]]]]
    rule: LocalRule = PLAIN
    margins: Mapping[str, str] = dataclasses.field(default_factory=dict)


def put_rows(table: np.ndarray, clients: np.ndarray, rows: np.ndarray, where: np.ndarray | None = None) -> np.ndarray:
    """`table` [K, O] with the cohort's rows [P, O] written over its clients' (only `where` true, bool [P, O])."""
    out, real = np.array(table), clients >= 0
    rows = np.asarray(rows)[real]
    kept = out[clients[real]]
    out[clients[real]] = rows if where is None else np.where(np.asarray(where)[real], rows, kept)
    return out


def take_rows(table: np.ndarray, clients: np.ndarray) -> np.ndarray:
    """The cohort's rows [P, O] of `table` [K, O]; some row at empty positions."""
    return table[np.maximum(clients, 0)]


def put_chain(chain: Chain, update: Mapping[int, Blocks]) -> Chain:
    """The chain with the updated clients' blocks exchanged; the others, and the given chain, are as they were."""
    if not isinstance(chain, tuple):  # on disk
        return chain.put(update)
    return tuple(update.get(client, blocks) for client, blocks in enumerate(chain))
