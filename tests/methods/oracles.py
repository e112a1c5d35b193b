"""The other methods as a reader of section 5 of the specification ("Baselines") would write them down.

What they share with TAP's oracle (one sample after the other, PyTorch's losses and AdamW) is in tests/oracle.py.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import torch

from tests.oracle import FAULTS, Oracle


class FedAvg(Oracle):
    """Rounds of the federated models alone; post-training from the server's blocks, once and twice.

    Attributes:
      name: of the variant that is the server's blocks.
    """

    name = "fedavg"

    def __init__(self, experiment, fault: str = ""):
        super().__init__(experiment, fault)
        self.initial = experiment.initial_blocks

    def blocks_of(self, task) -> list[str]:
        """B_o; with the standard backbone there is one stack for everybody (App. C.4)."""
        if self.config.model.backbone == "standard":
            return sorted(["backbone", f"head/{task.head}", *(f"encoder/{m}" for m in task.modalities)])
        return super().blocks_of(task)

    def start_of(self, i: int) -> dict:
        """Client i's blocks before any training."""
        return self.initial

    def received(self, i: int) -> dict:
        """What the server sends to client i."""
        return {b: self.server[b] for b in self.owned[i]}

    def round(self, t: int, cohort) -> dict:
        sent, losses = {}, {}
        for i in cohort:
            sent[i], losses[i], _ = self.train(self.received(i), i, t, "federated")
        self.aggregate(sent)
        return {"federated": losses}

    def finish(self, i: int, t: int) -> dict[str, dict]:
        once, *_ = self.train(self.received(i), i, t, "post", post=True)
        twice, *_ = self.train(self.received(i), i, t, "post", post=2)
        return {f"{self.name}+post": once, f"{self.name}+2p": twice}


class PerFedAvg(FedAvg):
    """A plain step w' = w - a ∇f(w; D), then AdamW on the gradient at w', on a minibatch D' of its own."""

    name, minibatches_per_step = "per-fedavg", 2
    faults = (*FAULTS, "one minibatch")

    def step(self, adam, drawn, teacher):
        inner, outer = drawn
        section = self.config.per_fedavg
        a = np.float32(adam.rate * section.inner_scale)
        _, g = self.gradient(adam.blocks, outer if self.fault == "one minibatch" else inner)
        adapted = jax.tree.map(lambda w, g: w - a * g, adam.blocks, g)
        losses, gradient = self.gradient(adapted, outer)
        return losses, gradient if section.hessian == "none" else self.exact(adam.blocks, a, inner, outer)

    def exact(self, blocks: dict, a, inner: dict, outer: dict) -> dict:
        """The gradient of w -> f(w - a ∇f(w; D); D'), differentiated as it stands."""
        everything = {**self.server, **blocks}  # one program for all clients: what a client lacks has no part in f
        found = _meta(self.model)(everything, self.frozen, a, self.padded(inner), self.padded(outer))
        return {b: jax.device_get(found[b]) for b in blocks}

    def padded(self, minibatch: dict) -> dict:
        """Task -> (a batch of full size, which of its samples are real); all tasks of the federation."""
        size, out = self.config.batch_size, {}
        for o, task in self.tasks.items():
            samples = minibatch.get(o, [])
            batches = [self.batch(task, index) for _, index in [*samples, *[(None, 0)] * (size - len(samples))]]
            whole = {field: np.concatenate([b[field] for b in batches]) for field in batches[0]}
            out[o] = whole, (np.arange(size) < len(samples)).astype(np.float32)
        return out


def objective(model, frozen, blocks: dict, minibatch: dict):
    """Σ λ_o ℓ_o of classification tasks: the mean over all real samples of the minibatch."""
    total, samples = 0.0, 0.0
    for task in model.tasks:
        batch, real = minibatch[task.name]
        logits, _ = model.forward(frozen, model.collect(blocks, task.streams[0]), task, batch)
        each = -jnp.take_along_axis(jax.nn.log_softmax(logits), batch["labels"][:, None].astype(int), 1)[:, 0]
        total, samples = total + (real * each).sum(), samples + real.sum()
    return total / samples


@functools.cache
def _meta(model):
    def after_a_step(w, frozen, a, inner, outer):
        g = jax.grad(lambda w: objective(model, frozen, w, inner))(w)
        return objective(model, frozen, jax.tree.map(lambda w, g: w - a * g, w, g), outer)

    return jax.jit(jax.grad(after_a_step))


class DisentAFL(FedAvg):
    """The auxiliary loss over pairs of samples of pairs of (modality, kind) groups."""

    name = "disentafl"
    faults = (*FAULTS, "tasks", "sum")

    def auxiliary(self, latents):
        groups: dict[tuple[str, str], list[torch.Tensor]] = {}
        for o, of_task in latents.items():
            task = self.tasks[o]
            for modality, samples in zip(task.modalities, of_task, strict=True):
                key = (modality, o if self.fault == "tasks" else task.kind)
                groups.setdefault(key, []).extend(samples)
        terms = []
        for first, second in itertools.combinations(groups.values(), 2):
            cosines = [a @ b / (a.norm() * b.norm()) for a in first for b in second]
            terms.append(sum(cosine**2 for cosine in cosines) / len(cosines))
        if not terms:
            return torch.zeros(())
        mean = sum(terms) if self.fault == "sum" else sum(terms) / len(terms)
        return self.config.disentafl.weight * mean


class FedDAT(FedAvg):
    """Three sets of adapters: A1 travels, A2 is the A1 received, A0 stays with its client.

    Attributes:
      private: A0 of every client.
    """

    name = "feddat"
    faults = (*FAULTS, "never refreshed", "forgetful", "late", "heads once")

    def __init__(self, experiment, fault: str = ""):
        super().__init__(experiment, fault)
        self.private = [{b: self.initial[f"private/{b}"] for b in owned if is_adapter(b)} for owned in self.owned]
        self.server = {b: tree for b, tree in self.server.items() if not b.startswith("private/")}
        self.first = [self.adapters(i) for i in range(len(self.mine))]

    def blocks_of(self, task) -> list[str]:
        """Adapters stand behind feed-forward networks: the attentions have none, the encoders have some."""
        mine = [b for b in super().blocks_of(task) if not b.endswith("/attention")]
        return sorted([*mine, *(f"encoder/{m}/adapters" for m in task.modalities)])

    def start_of(self, i: int) -> dict:
        """The teacher before any training."""
        adapters = {b: self.initial[b] for b in self.private[i]}
        return self.initial | halves({b: self.initial[f"private/{b}"] for b in adapters}, adapters)

    def adapters(self, i: int) -> dict:
        """A1 as client i receives it."""
        return {b: tree for b, tree in self.received(i).items() if is_adapter(b)}

    def train(self, blocks: dict, i: int, t: int, phase: str, *, post: bool = False, teacher=None):
        a1 = self.adam({b: tree for b, tree in blocks.items() if is_adapter(b)}, self.rate(t, post))
        heads = self.adam({b: tree for b, tree in blocks.items() if not is_adapter(b)}, self.rate(t, post))
        a0, a2 = self.adam(self.private[i], self.rate(t, post)), a1.blocks
        if self.fault == "never refreshed":
            a2 = self.first[i]
        elif self.fault == "forgetful":
            a0 = self.adam({b: self.initial[f"private/{b}"] for b in self.private[i]}, self.rate(t, post))
        if self.config.optimizer.state == "persist" and i in self.optimizers:
            for adam, before in zip((a1, a0, heads), self.optimizers[i], strict=True):
                adam.resume(before)
        weight = dict.fromkeys(self.config.distillation.weights, self.config.feddat.weight)
        seen: dict[str, list[float]] = {}
        for (minibatch,) in self.steps(i, t, phase, post):
            z_t = self.outputs(halves(a0.blocks, a2) | heads.blocks, minibatch)
            z_1 = self.outputs(a1.blocks | heads.blocks, minibatch)
            losses, gradient = self.gradient(a1.blocks | heads.blocks, minibatch, z_t, weight)
            step_together((a1, heads), gradient)
            if self.fault == "late":
                z_1 = self.outputs(a1.blocks | heads.blocks, minibatch)
            _, gradient = self.gradient(a0.blocks | heads.blocks, minibatch, z_1, weight)
            step_together((a0,) if self.fault == "heads once" else (a0, heads), gradient)
            for o, loss in losses.items():
                seen.setdefault(o, []).append(loss)
        if not post:
            self.private[i] = a0.blocks
            self.optimizers[i] = [adam.state() for adam in (a1, a0, heads)]
        self.teacher = halves(a0.blocks, a2) | heads.blocks
        means = {o: float(np.mean(found)) for o, found in seen.items()}
        return a1.blocks | heads.blocks, means, means

    def finish(self, i: int, t: int) -> dict[str, dict]:
        """The teacher, with A2 the A1 last received."""
        received = self.received(i)
        heads = {b: tree for b, tree in received.items() if not is_adapter(b)}
        plain = halves(self.private[i], self.adapters(i)) | heads
        self.train(received, i, t, "post", post=True)
        return {self.name: plain, f"{self.name}+post": self.teacher}


def is_adapter(block: str) -> bool:
    return block.startswith(("mote/", "mome/")) or block.endswith("/adapters")


def halves(first: dict, second: dict) -> dict:
    """½A0(h) + ½A2(h) as one adapter: their hidden units side by side, what they put out halved."""

    def joined(a, b):
        side_by_side = {name: np.concatenate([a[name], b[name]], -1) for name in ("down", "down_bias")}
        up = np.concatenate([a["up"], b["up"]], -2) / 2
        return side_by_side | {"up": up, "up_bias": (a["up_bias"] + b["up_bias"]) / 2}

    return {block: joined(first[block], second[block]) for block in first}


def step_together(optimizers: tuple, gradient: dict) -> None:
    """One AdamW step of several optimisers, clipped by the norm of all their gradients."""
    names = [b for adam in optimizers for b in adam.blocks]
    squares = sum(float((np.asarray(g, np.float64) ** 2).sum()) for b in names for g in jax.tree.leaves(gradient[b]))
    factor = np.float32(min(1.0, (optimizers[0].clip or np.inf) / np.sqrt(squares)))
    for adam in optimizers:
        adam.clip, limit = None, adam.clip
        adam.step({b: jax.tree.map(lambda g: factor * g, gradient[b]) for b in adam.blocks})
        adam.clip = limit
