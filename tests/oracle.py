"""TAP as a reader of the paper would write it down: the reference for the fast engine.

One client after the other, one sample after the other, blocks in dicts. Losses, clipping and AdamW are PyTorch's; JAX
gives a sample's outputs and pulls their gradient back. Shared with the engine are the model's forward pass
(tests/models holds it against its own oracle), and which samples a minibatch has (tests/test_sampling).

Faults can be put in on phase, to see that a comparison with the oracle would notice them.

The other methods' oracles are subclasses, in tests/methods.
"""

import copy
import dataclasses
import functools

import jax
import numpy as np
import torch
import torch.nn.functional as F

from tap_jax.data import sampling
from tap_jax.data.federated import ClientData
from tap_jax.token_logits import whole

torch.set_num_threads(1)  # tiny tensors
MEAN, STD = np.array([0.5071, 0.4865, 0.4409]), np.array([0.2673, 0.2564, 0.2762])  # spec 6
FAULTS = ("lambda", "clip", "experts", "uniform", "mean of means", "all blocks")
SKEWED_FAULT = "domains"  # shows where clients lack domains of their tasks


def blocks_of_task(task) -> list[str]:
    """B_o: what the four paths of the routing table, the encoders and the head touch."""
    o, found = task.kind, ["shared_proj", f"head/{task.head}"]
    for m in task.modalities:
        found.append(f"encoder/{m}")
        for mote, mote_expert, mome, mome_expert in routing_table(m, o):
            found += [f"mote/{mote}/attention", f"mome/{mome}/attention"]
            found += [f"mote/{mote}/domain/{domain}" for domain in task.domains]
            found += [f"mome/{mome}/domain/{domain}" for domain in task.domains]
            found += [f"mote/{'/expert/'.join(mote_expert)}", f"mome/{'/expert/'.join(mome_expert)}"]
    return sorted(set(found))


def routing_table(m: str, o: str):
    """Section 2 of the specification: MoTE stack, its expert, MoME stack, its expert, for each path."""
    return (
        ("shared", ("shared", "shared"), "shared", ("shared", "shared")),
        (m, ("shared", o), o, (o, "shared")),
        (m, (m, o), o, (o, m)),
        (m, (m, "shared"), "shared", ("shared", m)),
    )


class Oracle:
    """Algorithm 1 for an `Experiment`; `round` and `finish` advance it.

    Attributes:
      server: W̃, block name -> tree.
      personal, local: X[i] and the model that never communicates, per client a dict of blocks.
      h_l, h_p: per client a dict task -> history value.
      replaced: per round (client, task) pairs with R_i[o] = 1.
    """

    faults = FAULTS

    def __init__(self, experiment, fault: str = ""):
        assert not fault or fault in (*self.faults, SKEWED_FAULT)
        self.fault, self.config, self.model = fault, experiment.config, experiment.model
        self.frozen, self.data = jax.device_get(experiment.engine.frozen), experiment.data
        self.clients, self.variants = experiment.engine.data, experiment.variants  # without what is held out
        self.tasks = {task.name: task for task in experiment.model.tasks}
        self.mine = [[t for t in self.tasks.values() if t.name in c.shares] for c in experiment.federation.clients]
        self.owned = [sorted({b for task in tasks for b in self.blocks_of(task)}) for tasks in self.mine]
        self.server = {name: experiment.initial_blocks[name] for name in experiment.initial_blocks}
        self.personal = [{b: self.server[b] for b in owned} for owned in self.owned]
        self.local = [dict(blocks) for blocks in self.personal]
        self.h_l = [{} for _ in self.mine]
        self.h_p = [{task.name: np.inf for task in tasks} for tasks in self.mine]
        self.replaced: list[list[tuple[int, str]]] = []
        self.optimizers: dict[tuple[int, str], dict] = {}  # with optimizer.state = "persist"

    def round(self, t: int, cohort) -> dict:
        """Round t; returns the losses by model, client and task."""
        losses = {"federated": {}, "personal": {}, "local": {}}
        sent = {}
        self.replaced.append([])
        for i in cohort:
            federated = {b: self.server[b] for b in self.owned[i]}
            federated, losses["federated"][i], mean = self.train(federated, i, t, "federated")
            sent[i] = federated
            self.h_l[i] |= mean
            for o in mean:
                if self.config.replacement.first == "keep" and self.h_p[i][o] == np.inf:
                    continue
                if self.h_l[i][o] + self.margin(o) < self.h_p[i][o]:
                    self.replaced[-1].append((i, o))
                    for b in self.taken(i, o):
                        self.personal[i][b] = federated[b]
            self.personal[i], losses["personal"][i], mean = self.train(self.personal[i], i, t, "personal")
            self.h_p[i] |= mean
            self.local[i], losses["local"][i], _ = self.train(self.local[i], i, t, "local")
        self.aggregate(sent)
        return losses

    def taken(self, i: int, o: str) -> list[str]:
        """The blocks that a replacement for task o takes."""
        if self.fault == "all blocks":
            return self.owned[i]
        if self.config.replacement.scope == "task":
            return self.blocks_of(self.tasks[o])
        others = {b for task in self.mine[i] if task.name != o for b in self.blocks_of(task)}
        return [b for b in self.blocks_of(self.tasks[o]) if b not in others]

    def blocks_of(self, task) -> list[str]:
        """B_o."""
        return blocks_of_task(task)

    def aggregate(self, sent: dict[int, dict]) -> None:
        """Every block is averaged over the clients with samples on its paths, weighted by |D_i|."""
        for b in self.server:
            owners = [i for i in sent if b in sent[i] and b in self.trained(i)]
            if not owners:
                continue
            uniform = (self.config.aggregation == "uniform") != (self.fault == "uniform")
            size = {i: 1 if uniform else self.clients[i].samples for i in owners}
            total = sum(size.values())
            self.server[b] = jax.tree.map(
                lambda *leaves, size=size, total=total: sum(
                    np.float32(n / total) * leaf for n, leaf in zip(size.values(), leaves, strict=True)
                ),
                *(sent[i][b] for i in owners),
            )

    def trained(self, i: int) -> set[str]:
        """The blocks on the paths of the domains that client i has samples of, task by task."""
        found = set()
        for task in self.mine[i]:
            of = self.data.train[task.name].domains
            names = [task.name if len(task.domains) == 1 else f"{task.name}/{domain}" for domain in task.domains]
            ids = np.concatenate([self.clients[i].streams.get(name, []) for name in names]).astype(int)
            there = range(len(task.domains)) if self.fault == SKEWED_FAULT else set(of[ids])
            domains = tuple(task.domains[number] for number in there)
            found |= set(self.blocks_of(dataclasses.replace(task, domains=domains)))
        return found

    def finish(self, i: int, t: int) -> dict[str, dict]:
        """Stage 2 of client i: variant -> its blocks."""
        teacher, *_ = self.train({b: self.server[b] for b in self.owned[i]}, i, t, "post", post=True)
        distil = functools.partial(self.train, i=i, t=t, phase="distil", post=True)
        made = {
            "tap": lambda: distil(self.personal[i], teacher=teacher)[0],
            "tap-no-kd": lambda: distil(self.personal[i])[0],
            "tap-stage1": lambda: self.personal[i],
            "tap-stage2": lambda: distil(self.local[i], teacher=teacher)[0],
            "local": lambda: self.local[i],
            "fedavg+post": lambda: teacher,
            "fedavg+2p": lambda: self.train({b: self.server[b] for b in self.owned[i]}, i, t, "post", post=2)[0],
        }
        return {variant: make() for variant, make in made.items() if variant in self.variants}

    def train(self, blocks: dict, i: int, t: int, phase: str, *, post: int = False, teacher: dict | None = None):
        """Local training on D_i -> (blocks, mean loss of each task seen, the same for the history).

        Args:
          post: 1 for P steps after the rounds, 2 for 2P.
        """
        adam = self.adam(blocks, self.rate(t, post))
        continued = {"post": "federated", "distil": "personal"}.get(phase, phase)
        if self.config.optimizer.state == "persist" and (i, continued) in self.optimizers:
            adam.resume(self.optimizers[i, continued])
        seen: dict[str, list[tuple[float, float]]] = {}
        for drawn in self.steps(i, t, phase, post):
            losses, gradient = self.step(adam, drawn, teacher)
            minibatch = drawn[-1]
            for o, loss in losses.items():
                share = len(minibatch[o]) / sum(map(len, minibatch.values()))
                seen.setdefault(o, []).append((loss, share))
            adam.step(gradient)
        self.optimizers[i, phase] = adam.state()
        plain = {o: float(np.mean([loss for loss, _ in pairs])) for o, pairs in seen.items()}
        weighted = {o: float(np.mean([loss * share for loss, share in pairs])) for o, pairs in seen.items()}
        return adam.blocks, plain, weighted if self.config.replacement.history == "weighted" else plain

    minibatches_per_step = 1

    def steps(self, i: int, t: int, phase: str, post: int) -> list[tuple[dict[str, list], ...]]:
        """The minibatches of each step; a minibatch: task -> (domain, id) of its samples, in no particular order."""
        steps = post * self.config.post_steps if post else self.config.local_steps
        rest = self.config, i, t, phase, steps, None if post else 1
        drawn = (
            minibatches(self.clients[i], self.model.streams, *rest, minibatch=d)
            for d in range(self.minibatches_per_step)
        )
        return list(zip(*drawn, strict=True))

    def adam(self, blocks: dict, rate: float) -> "Adam":
        """A fresh optimiser for the blocks."""
        section = self.config.optimizer
        return Adam(blocks, rate, section.weight_decay, None if self.fault == "clip" else section.clip_norm)

    def step(self, adam: "Adam", drawn: tuple, teacher: dict | None):
        """(ℓ_o of each task, the gradient that AdamW is to follow) of one step."""
        if teacher is None:
            return self.gradient(adam.blocks, drawn[0])
        return self.gradient(adam.blocks, drawn[0], self.outputs(teacher, drawn[0]), self.config.distillation.weights)

    def gradient(self, blocks: dict, minibatch: dict[str, list], guide: dict | None = None, weight=None):
        """ℓ_o for each task in the minibatch, and the gradient in all of `blocks` of Σ λ_o ℓ_o (+ Σ β_o KL(guide ‖ z)).

        Args:
          guide: task -> z_T, as `outputs` returns them. weight: task kind -> β_o.
        """
        gradient = jax.tree.map(lambda leaf: np.zeros_like(leaf), blocks)
        z, latents, pullbacks, batches = {}, {}, {}, {}
        for o, samples in minibatch.items():
            task = self.tasks[o]
            batches[o] = [self.batch(task, index) for _, index in samples]
            parts = [self.collect(blocks, task, domain) for domain, _ in samples]
            found, pullbacks[o] = zip(*map(functools.partial(self.forward, task), parts, batches[o]), strict=True)
            one, two = zip(*found, strict=True)
            z[o] = torch.tensor(np.concatenate(one), requires_grad=True)
            latents[o] = torch.tensor(np.concatenate(two, axis=1), requires_grad=True)  # [|modalities|, B, D]
        samples_in_all = sum(map(len, minibatch.values()))
        losses = {o: self.loss(self.tasks[o], z[o], batches[o]) for o in minibatch}
        objective = self.auxiliary(latents)
        for o, samples in minibatch.items():
            share = 1 / len(minibatch) if self.fault == "lambda" else len(samples) / samples_in_all
            objective = objective + share * losses[o]
            if guide is not None:
                divergence = self.divergence(self.tasks[o], torch.tensor(guide[o]), z[o], batches[o])
                objective = objective + weight[self.tasks[o].kind] * divergence
        objective.backward()
        for o, samples in minibatch.items():
            for n, (domain, _) in enumerate(samples):
                upstream = latents[o].grad
                upstream = torch.zeros_like(latents[o]) if upstream is None else upstream
                (back,) = _pull_back(pullbacks[o][n], (z[o].grad[n : n + 1].numpy(), upstream[:, n : n + 1].numpy()))
                self.add(gradient, jax.device_get(back), self.tasks[o], domain)
        return {o: float(loss.detach()) for o, loss in losses.items()}, gradient

    def outputs(self, blocks: dict, minibatch: dict[str, list]) -> dict[str, np.ndarray]:
        """z of every sample: task -> outputs, in the minibatch's order."""
        z = {}
        for o, samples in minibatch.items():
            task = self.tasks[o]
            rows = [(self.collect(blocks, task, domain), self.batch(task, index)) for domain, index in samples]
            z[o] = np.concatenate([self.forward(task, *row)[0][0] for row in rows])
        return z

    def auxiliary(self, latents: dict[str, torch.Tensor]) -> torch.Tensor:
        """A further term, of the whole minibatch's latents: task -> [|modalities|, B, D]."""
        return torch.zeros(())

    def forward(self, task, parts: dict, batch: dict):
        """One sample's (outputs, latents), and the function from their gradients to that of the parts."""
        return _forward(self.model, task)(self.frozen, parts, batch)

    def loss(self, task, z: torch.Tensor, batches: list[dict]) -> torch.Tensor:
        """ℓ_o of a minibatch's samples, from their outputs."""
        if task.kind.endswith("classification"):
            return F.cross_entropy(z, torch.tensor(np.concatenate([b["labels"] for b in batches])).long())
        if task.kind == "image_generation":
            return F.mse_loss(z, torch.tensor(np.concatenate([b["images"] for b in batches])))
        targets = torch.tensor(np.concatenate([b["answers"] for b in batches]))[:, 1:].long()
        if self.fault == "mean of means":
            each = [F.cross_entropy(a, b, ignore_index=0) for a, b in zip(z, targets, strict=True)]
            return sum(each) / len(each)
        return F.cross_entropy(z.flatten(0, 1), targets.flatten(), ignore_index=0)

    def divergence(self, task, z_t: torch.Tensor, z_s: torch.Tensor, batches: list[dict]) -> torch.Tensor:
        """Equation 5 with the paper's power of the temperature."""
        temperature = self.config.distillation.temperature
        if task.kind == "image_generation":  # over the pixels along the width, of each row of each channel
            z_t, z_s = (z.permute(0, 1, 3, 2).flatten(0, 2) for z in (z_t, z_s))
        if task.kind == "text_generation":  # over V, at each answer token
            real = torch.tensor(np.concatenate([b["answers"] for b in batches]))[:, 1:] != 0
            z_t, z_s = z_t[real], z_s[real]
        log_t, log_s = (torch.log_softmax(z / temperature, -1) for z in (z_t, z_s))
        return F.kl_div(log_s, log_t, log_target=True, reduction="batchmean") / temperature**2

    def batch(self, task, index: int) -> dict[str, np.ndarray]:
        """One sample."""
        split = self.data.train[task.name]
        batch = {
            name: getattr(split, name)[index : index + 1]
            for name in ("images", "tokens", "labels", "answers")
            if getattr(split, name) is not None
        }
        if "images" in batch:
            batch["images"] = ((batch["images"] / 255 - MEAN) / STD).astype(np.float32)
        return batch

    def roles(self, task, domain: str) -> dict:
        """Part of the forward pass -> its block or blocks."""
        stream = next(stream for stream in task.streams if stream.domain == domain)
        roles = dict(self.model.roles(stream))
        if self.fault == "experts":  # shared-task and modality-shared exchange their experts in the MoTE stage
            for part, names in roles.items():
                if part.endswith("mote/expert"):
                    roles[part] = (names[0], names[3], names[2], names[1])
        return roles

    def collect(self, blocks: dict, task, domain: str) -> dict:
        """The parts of a forward pass."""
        return {
            part: blocks[names]
            if isinstance(names, str)
            else jax.tree.map(lambda *leaves: np.stack(leaves), *(blocks[name] for name in names))
            for part, names in self.roles(task, domain).items()
        }

    def add(self, gradient: dict, back: dict, task, domain: str) -> None:
        """Adds the gradient of parts to that of blocks."""
        for part, names in self.roles(task, domain).items():
            for path, name in enumerate([names] if isinstance(names, str) else names):
                one = back[part] if isinstance(names, str) else jax.tree.map(lambda g, p=path: g[p], back[part])
                gradient[name] = jax.tree.map(np.add, gradient[name], one)

    def margin(self, o: str) -> float:
        """m of the task's kind (Table 22)."""
        return self.config.margins[self.tasks[o].kind]

    def rate(self, t: int, post: bool) -> float:
        """η_t: a linear rise, then constant (Table 21)."""
        optimizer = self.config.optimizer
        if post:
            return optimizer.post_learning_rate
        if t >= optimizer.warmup_rounds:
            return optimizer.learning_rate
        first, last = optimizer.learning_rate_initial, optimizer.learning_rate
        return first + (last - first) * t / optimizer.warmup_rounds


class Adam:
    """PyTorch's AdamW, with clipping, on blocks.

    Attributes:
      blocks: as they stand.
    """

    def __init__(self, blocks: dict, rate: float, decay: float, clip: float | None):
        leaves, self.structure = jax.tree.flatten(blocks)
        self.params = [torch.nn.Parameter(torch.tensor(np.array(leaf))) for leaf in leaves]
        self.optimizer = torch.optim.AdamW(self.params, lr=rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=decay)
        self.rate, self.clip = rate, clip

    @property
    def blocks(self) -> dict:
        return self.structure.unflatten([p.detach().numpy().copy() for p in self.params])

    def step(self, gradient: dict) -> None:
        for p, g in zip(self.params, jax.tree.leaves(gradient), strict=True):
            p.grad = torch.tensor(np.array(g))
        if self.clip is not None:
            torch.nn.utils.clip_grad_norm_(self.params, self.clip)
        self.optimizer.step()

    def state(self) -> dict:
        return copy.deepcopy(self.optimizer.state_dict())

    def resume(self, state: dict) -> None:
        """Goes on with the moments of another, at this one's rate."""
        self.optimizer.load_state_dict(copy.deepcopy(state))
        self.optimizer.param_groups[0]["lr"] = self.rate


def minibatches(
    data: ClientData, streams, config, i: int, t: int, phase: str, steps: int, epochs: int | None, minibatch: int = 0
):
    """The minibatches of a client: per step a dict task -> list of (domain, id)."""
    by_name = {stream.name: stream for stream in streams}
    union = [(by_name[name], int(index)) for name, ids in data.streams.items() for index in ids]
    rng = sampling.generator(config.seed, t, i, phase, minibatch)
    drawn = sampling.minibatches(rng, len(union), batch=config.batch_size, steps=steps, epochs=epochs)
    out = []
    for positions in drawn:
        out.append({})
        for stream, index in (union[p] for p in positions):
            out[-1].setdefault(stream.task.name, []).append((stream.domain, index))
    return out


@functools.lru_cache
def _forward(model, task):
    def outputs(frozen, parts, batch):
        z, latents = model.forward(frozen, parts, task, batch)
        return whole(z), latents

    def forward(frozen, parts, batch):
        return jax.vjp(lambda parts: outputs(frozen, parts, batch), parts)

    return jax.jit(forward)


_pull_back = jax.jit(lambda pullback, upstream: pullback(upstream))
