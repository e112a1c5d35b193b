"""TAP as a reader of the paper would write it down: the reference for the fast engine.

One client after the other, one sample after the other, blocks in dicts. Losses, clipping and AdamW are PyTorch's; JAX
gives a sample's outputs and pulls their gradient back. Shared with the engine are the model's forward pass
(tests/models holds it against its own oracle), and which samples a minibatch has (tests/test_sampling).

Faults can be put in on purpose, to see that a comparison with the oracle would notice them.
"""

import copy
import functools

import jax
import numpy as np
import torch
import torch.nn.functional as F

from tap_jax.data import sampling
from tap_jax.data.federated import ClientData

torch.set_num_threads(1)  # tiny tensors
MEAN, STD = np.array([0.5071, 0.4865, 0.4409]), np.array([0.2673, 0.2564, 0.2762])  # spec 6
FAULTS = ("lambda", "clip", "experts", "uniform", "mean of means", "all blocks")


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
      personal, local: X[i] and the chain that never communicates, per client a dict of blocks.
      h_l, h_p: per client a dict task -> history value.
      replaced: per round (client, task) pairs with R_i[o] = 1.
    """

    def __init__(self, experiment, fault: str = ""):
        assert not fault or fault in FAULTS
        self.fault, self.config, self.model = fault, experiment.config, experiment.model
        self.frozen, self.data = jax.device_get(experiment.engine.frozen), experiment.data
        self.tasks = {task.name: task for task in experiment.model.tasks}
        self.mine = [[t for t in self.tasks.values() if t.name in c.shares] for c in experiment.federation.clients]
        self.owned = [sorted({b for task in tasks for b in blocks_of_task(task)}) for tasks in self.mine]
        self.server = {name: experiment.initial_blocks[name] for name in experiment.initial_blocks}
        self.personal = [{b: self.server[b] for b in owned} for owned in self.owned]
        self.local = [dict(blocks) for blocks in self.personal]
        self.h_l = [{} for _ in self.mine]
        self.h_p = [{task.name: np.inf for task in tasks} for tasks in self.mine]
        self.replaced: list[list[tuple[int, str]]] = []
        self.optimizers: dict[tuple[int, str], dict] = {}  # with optimizer.state = "persist"

    def round(self, t: int, cohort) -> dict:
        """Round t; returns the losses by chain, client and task."""
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
            return blocks_of_task(self.tasks[o])
        others = {b for task in self.mine[i] if task.name != o for b in blocks_of_task(task)}
        return [b for b in blocks_of_task(self.tasks[o]) if b not in others]

    def aggregate(self, sent: dict[int, dict]) -> None:
        """Every block is averaged over the clients that sent it, weighted by |D_i|."""
        for b in self.server:
            owners = [i for i in sent if b in sent[i]]
            if not owners:
                continue
            uniform = (self.config.aggregation == "uniform") != (self.fault == "uniform")
            size = {i: 1 if uniform else self.data.clients[i].samples for i in owners}
            total = sum(size.values())
            self.server[b] = jax.tree.map(
                lambda *leaves, size=size, total=total: sum(
                    np.float32(n / total) * leaf for n, leaf in zip(size.values(), leaves, strict=True)
                ),
                *(sent[i][b] for i in owners),
            )

    def finish(self, i: int, t: int) -> dict[str, dict]:
        """Stage 2 of client i: variant -> its blocks."""
        teacher, *_ = self.train({b: self.server[b] for b in self.owned[i]}, i, t, "post", post=True)
        student, *_ = self.train(self.personal[i], i, t, "distil", post=True, teacher=teacher)
        alone, *_ = self.train(self.personal[i], i, t, "distil", post=True)
        return {"fedavg+post": teacher, "tap": student, "tap-no-kd": alone, "local": self.local[i]}

    def train(self, blocks: dict, i: int, t: int, purpose: str, *, post: bool = False, teacher: dict | None = None):
        """Local training on D_i -> (blocks, mean loss of each task seen, the same for the history)."""
        leaves, structure = jax.tree.flatten(blocks)
        params = [torch.nn.Parameter(torch.tensor(np.array(leaf))) for leaf in leaves]
        optimizer = torch.optim.AdamW(
            params, lr=self.rate(t, post), betas=(0.9, 0.999), eps=1e-8, weight_decay=self.config.optimizer.weight_decay
        )
        continued = {"post": "federated", "distil": "personal"}.get(purpose, purpose)
        if self.config.optimizer.state == "persist" and (i, continued) in self.optimizers:
            optimizer.load_state_dict(copy.deepcopy(self.optimizers[i, continued]))
            optimizer.param_groups[0]["lr"] = self.rate(t, post)
        seen: dict[str, list[float]] = {}
        for minibatch in self.minibatches(i, t, purpose, post):
            blocks = structure.unflatten([p.detach().numpy().copy() for p in params])
            losses, gradient = self.gradient(blocks, minibatch, teacher)
            for o, loss in losses.items():
                share = len(minibatch[o]) / sum(map(len, minibatch.values()))
                seen.setdefault(o, []).append((loss, share))
            for p, g in zip(params, jax.tree.leaves(gradient), strict=True):
                p.grad = torch.tensor(g)
            if self.fault != "clip":
                torch.nn.utils.clip_grad_norm_(params, self.config.optimizer.clip_norm)
            optimizer.step()
        self.optimizers[i, purpose] = copy.deepcopy(optimizer.state_dict())
        blocks = structure.unflatten([p.detach().numpy().copy() for p in params])
        plain = {o: float(np.mean([loss for loss, _ in pairs])) for o, pairs in seen.items()}
        weighted = {o: float(np.mean([loss * share for loss, share in pairs])) for o, pairs in seen.items()}
        return blocks, plain, weighted if self.config.replacement.history == "weighted" else plain

    def minibatches(self, i: int, t: int, purpose: str, post: bool) -> list[dict[str, list]]:
        """Each minibatch: task -> (domain, id) of its samples, in no particular order."""
        steps = self.config.post_steps if post else self.config.local_steps
        return minibatches(
            self.data.clients[i], self.model.streams, self.config, i, t, purpose, steps, None if post else 1
        )

    def gradient(self, blocks: dict, minibatch: dict[str, list], teacher: dict | None):
        """ℓ_o for each task in the minibatch, and the gradient of Σ λ_o ℓ_o (+ Σ β_o KL) in all of `blocks`."""
        gradient = jax.tree.map(lambda leaf: np.zeros_like(leaf), blocks)
        samples_in_all, losses = sum(map(len, minibatch.values())), {}
        for o, samples in minibatch.items():
            task = self.tasks[o]
            batches = [self.batch(task, index) for _, index in samples]
            parts = [self.collect(blocks, task, domain) for domain, _ in samples]
            z, pullbacks = zip(*map(functools.partial(self.forward, task), parts, batches), strict=True)
            z = torch.tensor(np.concatenate(z), requires_grad=True)
            loss = self.loss(task, z, batches)
            share = 1 / len(minibatch) if self.fault == "lambda" else len(samples) / samples_in_all
            objective = share * loss
            if teacher is not None:
                taught = [self.collect(teacher, task, domain) for domain, _ in samples]
                z_t = [self.forward(task, *one)[0] for one in zip(taught, batches, strict=True)]
                beta = self.config.distillation.weights[task.kind]
                objective = objective + beta * self.divergence(task, torch.tensor(np.concatenate(z_t)), z, batches)
            objective.backward()
            losses[o] = float(loss.detach())
            for n, (domain, _) in enumerate(samples):
                (back,) = _pull_back(pullbacks[n], z.grad[n : n + 1].numpy())
                self.add(gradient, jax.device_get(back), task, domain)
        return losses, gradient

    def forward(self, task, parts: dict, batch: dict):
        """One sample's outputs, and the function from their gradient to that of the parts."""
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


def minibatches(data: ClientData, streams, config, i: int, t: int, purpose: str, steps: int, passes: int | None):
    """The minibatches of a client: per step a dict task -> list of (domain, id)."""
    by_name = {stream.name: stream for stream in streams}
    union = [(by_name[name], int(index)) for name, ids in data.streams.items() for index in ids]
    rng = sampling.generator(config.seed, t, i, purpose)
    drawn = sampling.minibatches(rng, len(union), batch=config.batch_size, steps=steps, passes=passes)
    out = []
    for positions in drawn:
        out.append({})
        for stream, index in (union[p] for p in positions):
            out[-1].setdefault(stream.task.name, []).append((stream.domain, index))
    return out


@functools.lru_cache
def _forward(model, task):
    def forward(frozen, parts, batch):
        return jax.vjp(lambda parts: model.apply(frozen, parts, task, batch), parts)

    return jax.jit(forward)


_pull_back = jax.jit(lambda pullback, upstream: pullback(upstream))
