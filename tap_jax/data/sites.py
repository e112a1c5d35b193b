"""A small embedded data set of named sites: different modalities, tasks, amounts and classes, as people have them.

The samples are those of the procedural suite (`synthetic`), drawn once per task; each site takes its own part of them.
The suite's tasks stand for what such sites have: textures for tissue, shapes for parts, silhouettes for photographs.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np

from tap_jax.data import synthetic
from tap_jax.data.examples import Examples
from tap_jax.errors import UserError
from tap_jax.tasks import Task

COLUMN = "site"  # what `data.client_column` calls the sites
_MOST_DRAWS = 8  # times as many samples as the sites want of a task, until there are enough of every class


@dataclasses.dataclass(frozen=True)
class Part:
    """What a site has of a task.

    Attributes:
      train, test: samples.
      classes: (from, to), the part of the task's classes that it has, in parts of all of them.
      domains: those that it has; () for all.
    """

    train: int
    test: int
    classes: tuple[float, float] = (0.0, 1.0)
    domains: tuple[str, ...] = ()


SITES: dict[str, dict[str, Part]] = {
    "factory-east": {"tiny_imagenet": Part(120, 30, (0.0, 0.6))},
    "factory-west": {"tiny_imagenet": Part(60, 20, (0.4, 1.0))},
    "hospital": {"cifar100": Part(150, 40), "mmlu": Part(90, 20, domains=("medicine",))},
    "law-office": {"mmlu": Part(90, 20, domains=("law",))},
    "newsroom": {"ag_news": Part(150, 40), "fashion_mnist": Part(60, 10)},
    "phone-1": {"fashion_mnist": Part(40, 10), "ag_news": Part(20, 10, (0.0, 0.5))},
    "phone-2": {"fashion_mnist": Part(30, 10)},
    "phone-3": {"fashion_mnist": Part(50, 10), "ag_news": Part(40, 10, (0.5, 1.0))},
}


def names(task: str, split: str) -> list[str]:
    """Whose each sample of a split is, in the order of `load`; nothing is drawn."""
    return [site for site, parts in SITES.items() if task in parts for _ in range(getattr(parts[task], split))]


def load(task: Task, split: str, *, seed: int) -> Examples:
    """One split of one task, with `Examples.clients`.

    Raises:
      UserError: a task that no site has.
    """
    mine = {site: parts[task.name] for site, parts in SITES.items() if task.name in parts}
    if not mine:
        raise UserError(f"data.root: no site has task {task.name}; there are {', '.join(tasks())}")
    wanted = len(names(task.name, split))
    for times in range(1, _MOST_DRAWS + 1):
        drawn = synthetic.load(task, split, size=times * wanted, seed=seed)
        if (ids := _deal(task, drawn, mine, split)) is not None:
            return dataclasses.replace(drawn.take(ids), clients=tuple(names(task.name, split)))
    raise UserError(f"data.root: not enough different samples of {task.name} for all sites; use more classes")


def tasks() -> list[str]:
    """The tasks that some site has."""
    return sorted({task for parts in SITES.values() for task in parts})


def _deal(task: Task, drawn: Examples, mine: Mapping[str, Part], split: str) -> np.ndarray | None:
    """The samples of each site, one site after the other; None where there are too few."""
    free, found = np.ones(len(drawn), bool), []
    for part in sorted(mine, key=lambda site: -_narrowness(mine[site])):
        fits = free & _fits(task, drawn, mine[part])
        ids = np.flatnonzero(fits)[: getattr(mine[part], split)]
        if len(ids) < getattr(mine[part], split):
            return None
        free[ids] = False
        found.append((part, ids))
    by_site = dict(found)
    return np.concatenate([by_site[site] for site in mine])


def _narrowness(part: Part) -> float:
    """Those that take few kinds of samples choose first."""
    return 1 - (part.classes[1] - part.classes[0]) + bool(part.domains)


def _fits(task: Task, drawn: Examples, part: Part) -> np.ndarray:
    fits = np.ones(len(drawn), bool)
    if drawn.labels is not None:
        low, high = (round(bound * task.classes) for bound in part.classes)
        fits &= (drawn.labels >= low) & (drawn.labels < high)
    if part.domains:
        fits &= np.isin(drawn.domains, [task.domains.index(domain) for domain in part.domains])
    return fits
