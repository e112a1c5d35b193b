"""Samples of a task, from the hub or from local files, with the columns that the task's source names.

Each split is converted once to arrays (pictures to 64x64, texts by their templates) and kept in files
named by a hash of where it came from and how it was converted; a damaged one is built anew. A split is only ever
seen complete: it is written beside its place and moved there.
"""

import logging

from tap_jax.data import cache, places
from tap_jax.data.examples import Examples
from tap_jax.data.samples import Tell, convert, silent
from tap_jax.errors import UserError
from tap_jax.tasks import Task

_LOG = logging.getLogger(__name__)


def load(
    task: Task,
    split: str,
    *,
    root: str,
    cache_dir: str | None = None,
    limit: int | None = None,
    client_column: str = "",
    on_bad_row: str = "stop",
    tell: Tell = silent,
) -> Examples:
    """Reads one split of one task.

    Args:
      task: with a source.
      split: "train" or "test".
      root: "hub", the id of a data set there, or a folder with one sub-folder for each task, in any layout of
        `reading`. A task whose source has a path is read from there.
      cache_dir: where converted splits are kept (and the hub's files); None converts every time.
      limit: at most so many samples, a fixed random subset in the file's order; None for all.
      client_column: the column that says whose a row is; "" where none does.
      on_bad_row: "stop" at a row that cannot be used, or "skip" it; what was skipped is in the examples' notes.
      tell: gets "task/split", how many rows are converted, and of how many.

    Raises:
      UserError: as of `convert`, or data that are missing or lack a column.
    """
    if split not in ("train", "test"):
        raise UserError(f"split: unknown '{split}'; use one of train, test")
    if limit is not None and limit < 1:
        raise UserError(f"data.{split}_size: {limit}; use at least 1, or leave it out for all")
    owner = (client_column,) if client_column else ()
    place = places.find(task, split, root)
    settings = [place.identity, places.SPLIT_SEED, places.VQA_TRAIN_ROWS, limit, on_bad_row, *owner]
    cached = cache_dir and cache.cache_path(cache_dir, task, split, settings)
    if cached and (examples := cache.read_cache(cached)) is not None:
        return examples
    rows = places.open_rows(task, split, place, cache_dir, owner)
    examples = convert(task, split, rows, limit=limit, client_column=client_column, on_bad_row=on_bad_row, tell=tell)
    if cached:
        try:
            cache.write_cache(cached, examples)
            return cache.read_cache(cached) or examples  # of what is mapped, memory holds what is in use
        except OSError as error:
            _LOG.warning("data: converted sets are not kept in %s (%s)", cached.parent, error.strerror or error)
    return examples
