"""Which client trains on which samples: the paper's shares, an even deal, skewed ones, or as the data say.

All are pure functions, most of them of the seed, and know samples by number only. They use every sample at most once,
unless groups of clients are to share their part of the data.
"""

import zlib
from collections.abc import Mapping, Sequence

import numpy as np

from tap_jax.errors import UserError
from tap_jax.federation import Federation

SPLITS = ("share", "iid", "dirichlet", "pathological")


def assign(
    federation: Federation,
    sizes: Mapping[str, int],
    *,
    seed: int,
    labels: Mapping[str, np.ndarray] | None = None,
    split: str = "share",
    alpha: float = 0.5,
    parts: int = 0,
    classes_per_client: int = 2,
    classes: Mapping[str, np.ndarray] | None = None,
) -> list[dict[str, np.ndarray]]:
    """Deals every task's training set out to the clients who have the task.

    - "share" (Sec. 5.1 of the paper): the set is shuffled once and cut into `federation.groups` equal parts; the
      clients of a group take consecutive slices of its part, as long as their shares say.
    - "iid": all owners get equally many samples, whatever their shares and groups.
    - "dirichlet": each class is dealt to the owners in proportions drawn from Dirichlet(alpha), so that small alphas
      give few classes per client (Hsu et al. 2019, arXiv:1909.06335); no client is left without a sample.
    - "pathological": each owner gets so many different classes, drawn such that all are used equally often up to one,
      and the owners of a class equal parts of it (as of McMahan et al. 2017, arXiv:1602.05629, whose clients have two
      classes at most). Classes beyond owners x classes_per_client stay unused.

    Args:
      federation: the clients and their shares.
      sizes: task name -> number of training samples, for every task of the federation.
      seed: each task is shuffled by its own stream of this seed, so adding a task leaves the others as they were.
      labels: of the two skewed splits; task name -> int [N], what to skew by: class labels, or domains. A task without
        an entry, or with one value throughout, gets skewed amounts instead, and with "pathological" equal ones.
      split: one of `SPLITS`.
      alpha: "dirichlet" only; > 0.
      parts: "share" only; into how many parts a set is cut, of which group g takes part number g modulo parts. 0: one
        for each group; fewer: large federations on little data, where groups that share a part have the same samples;
        more count as one for each group, so that a centralised run's one group has all data.
      classes_per_client: "pathological" only; >= 1.
      classes: "pathological" only; task name -> the values to deal out, where they are not those of `labels`. A test
        set is dealt like its training set where it is given that one's.

    Returns:
      Per client a dict task name -> int64 ids in [0, sizes[task]), disjoint between clients of different parts.

    Raises:
      UserError: an unknown split, alpha <= 0, no classes for a client, a task without a size, or a client left without
        samples.
    """
    if split not in SPLITS:
        raise UserError(f"federation.split: unknown '{split}'; use one of {', '.join(SPLITS)}")
    if split == "dirichlet" and not alpha > 0:
        raise UserError(f"federation.alpha: {alpha}; use more than 0")
    if split == "pathological" and classes_per_client < 1:
        raise UserError(f"federation.classes_per_client: {classes_per_client}; use at least 1")
    dealt: list[dict[str, np.ndarray]] = [{} for _ in federation.clients]
    for task in federation.tasks:
        if task.name not in sizes:
            raise UserError(f"data: no training set for task {task.name}; add it or drop the task from all clients")
        stream = [seed, zlib.crc32(task.name.encode())]
        order = np.random.default_rng(stream).permutation(sizes[task.name])
        owners = [k for k, client in enumerate(federation.clients) if task.name in client.shares]
        if split == "share":
            slices = _by_share(federation, task.name, owners, order, min(parts or federation.groups, federation.groups))
        elif split == "iid":
            slices = np.array_split(order, len(owners))
        elif split == "pathological":
            kinds = np.asarray((labels or {}).get(task.name, np.zeros(len(order), np.int64)))
            values = np.unique((classes or {}).get(task.name, kinds))
            slices = _by_class(stream, order, len(owners), kinds, values, classes_per_client)
        else:
            slices = _by_dirichlet(stream, order, len(owners), (labels or {}).get(task.name), alpha)
        for client, ids in zip(owners, slices, strict=True):
            if not len(ids):
                raise UserError(
                    f"federation.clients: {federation.clients[client].name} is left with no sample of {task.name} "
                    f"({sizes[task.name]} for {len(owners)} clients); give it more data or a larger share, or let"
                    " groups share their data (federation.parts)"
                )
            dealt[client][task.name] = ids.astype(np.int64)
    return dealt


def by_name(
    federation: Federation, names: Mapping[str, Sequence[str]], *, test: bool = False
) -> list[dict[str, np.ndarray]]:
    """Each client's samples are those that bear its name, whatever the order of names in a set.

    Args:
      federation: the clients, by name.
      names: task name -> N names, whose each sample is.
      test: a client may lack samples of its task, and a name may be none of the clients'.

    Returns:
      As of `assign`; with `test`, a task is left out where the client has no sample of it.

    Raises:
      UserError: a client is left without a sample of its task.
    """
    dealt: list[dict[str, np.ndarray]] = [{} for _ in federation.clients]
    for task in federation.tasks:
        found, owner = np.unique(np.asarray(names[task.name], object).astype(str), return_inverse=True)
        order = np.argsort(owner, kind="stable")
        starts = np.searchsorted(owner[order], np.arange(1, len(found)))
        ids = dict(zip(found.tolist(), np.split(order, starts), strict=False))  # no names, no parts
        for client, mine in zip(federation.clients, dealt, strict=True):
            if task.name not in client.shares:
                continue
            if client.name in ids:
                mine[task.name] = ids[client.name].astype(np.int64)
            elif not test:
                raise UserError(
                    f"data: client {client.name} is left with no sample of {task.name}; raise data.train_size or"
                    " data.image_classes, or remove its rows"
                )
    return dealt


def _by_class(
    stream: list[int], order: np.ndarray, owners: int, labels: np.ndarray, values: np.ndarray, most: int
) -> list[np.ndarray]:
    """Owner k takes `most` values in a row of a shuffled circle of them, beginning where owner k - 1 ended."""
    circle = np.random.default_rng([*stream, 2]).permutation(values)
    taken = np.arange(owners * min(most, len(values))).reshape(owners, -1) % len(values)
    users: dict[int, list[int]] = {}
    for k, places in enumerate(taken):
        for place in places:
            users.setdefault(int(place), []).append(k)
    piles: list[list[np.ndarray]] = [[] for _ in range(owners)]
    kind = labels[order]
    for place, mine in users.items():
        for k, ids in zip(mine, np.array_split(order[kind == circle[place]], len(mine)), strict=True):
            piles[k].append(ids)
    return [np.concatenate(pile) for pile in piles]


def _by_share(federation: Federation, task: str, owners: list[int], order: np.ndarray, count: int) -> list[np.ndarray]:
    parts = np.array_split(order, count)
    taken = [0.0] * federation.groups
    slices = []
    for k in owners:
        client = federation.clients[k]
        part, start = parts[client.group % count], taken[client.group]
        taken[client.group] = start + client.shares[task]
        # Rounding the running totals, not each share, loses nothing: shares that add up to 1 use the whole part.
        cut = [min(len(part), round(total * len(part))) for total in (start, taken[client.group])]
        slices.append(part[cut[0] : cut[1]])
    return slices


def _by_dirichlet(
    stream: list[int], order: np.ndarray, owners: int, labels: np.ndarray | None, alpha: float
) -> list[np.ndarray]:
    kind = np.zeros(len(order), np.int64) if labels is None else np.asarray(labels)[order]
    piles: list[list[int]] = [[] for _ in range(owners)]
    for value in np.unique(kind):
        ids = order[kind == value]
        # A stream for each class: a test set of another size, or without some class, is cut in the same proportions.
        rng = np.random.default_rng([*stream, 1, value])
        weights = rng.gamma(alpha, size=owners)
        # Tiny alphas can underflow to all zeros; then one owner takes the class, as in the limit.
        shares = weights / weights.sum() if weights.sum() > 0 else np.eye(owners)[rng.integers(owners)]
        cuts = np.minimum(np.round(np.cumsum(shares)[:-1] * len(ids)).astype(np.int64), len(ids))
        for pile, ids_of_owner in zip(piles, np.split(ids, cuts), strict=True):
            pile.extend(ids_of_owner)
    for pile in piles:
        richest = max(piles, key=len)
        if not pile and len(richest) > 1:
            pile.append(richest.pop())
    return [np.array(pile, np.int64) for pile in piles]
