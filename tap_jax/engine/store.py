"""Personal blocks on disk, for federations whose clients' blocks do not fit into memory.

Blocks of one shape class (equal shapes) are the rows of one file, n float32 each. Models of the state are then a
table: which row holds client k's block r. Rows are never changed while anybody refers to them: to give a client new
blocks is to write new rows and to make a new table. So older states stay as they are, a checkpoint is the
table alone, and a process that is killed at any moment leaves every row that a checkpoint names as it was.

A row is free once no table in this process and no checkpoint that is kept refers to it. Which tables there are, Python
knows (a weak set); which checkpoints, `commit` and `release` are told.

Several processes share the folder. Each writes the blocks of its own devices' clients into files of its own, and they
tell each other the new tables, which are the same in all of them; in the rounds each reads only the rows that its
devices need.
A run that goes on with other processes reads what all of the former ones wrote.

Letters: K clients, R blocks, n parameters of a block.
"""

import contextlib
import json
import os
import pathlib
import shutil
import threading
import weakref
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from tap_jax import blocks
from tap_jax.blocks import Blocks, Partition
from tap_jax.engine import packed
from tap_jax.engine.agreement import all_said, any_says, first_said, in_step
from tap_jax.engine.checkpointing import Checkpoints
from tap_jax.engine.file_lock import hold
from tap_jax.engine.row_file import RowFile, flush, flush_folder
from tap_jax.errors import UserError
from tap_jax.methods.base import State

GROWTH = 8  # a file grows by a part of one in so many; what is free is looked up as often as that many rows are taken
WRITER = 2**32  # row number i of the file of process p is WRITER · p + i
_FORMAT = 2
_ABOUT = "store.json"


class Store:
    """Rows of blocks in one folder, for any number of models.

    Args:
      folder: made by `create`.
      partition: the federation's blocks.
      like: block name -> shapes of the blocks that are stored; others are left out.

    Raises:
      UserError: no store there, or one of other blocks.
    """

    def __init__(self, folder: str | os.PathLike, partition: Partition, like: Blocks):
        self.folder, self.partition, self.like = pathlib.Path(folder), partition, like
        try:
            found = json.loads((self.folder / _ABOUT).read_text())
        except (OSError, json.JSONDecodeError) as error:
            raise UserError(
                f"workdir: the personal blocks in {self.folder} cannot be read ({error}); train again in another folder"
            ) from error
        if found != _about(partition, like):
            raise UserError(f"workdir: {self.folder} holds blocks of another configuration; name another folder")
        self._members = members = _members(partition, like)
        self._mine = jax.process_index()
        self._opened: dict[tuple[int, int], RowFile] = {}
        for g, of in enumerate(members):
            file = self._file(g, 0)
            if file.rows < len(of):
                raise UserError(f"workdir: {file.path} is missing or cut off; train again in another folder")
        # Block -> its file, -1 where it is not stored; and the row of what it was before round 0.
        self.file_of, self._start = np.full(len(partition.names), -1), np.full(len(partition.names), -1)
        for g, of in enumerate(members):
            self.file_of[of], self._start[of] = g, np.arange(len(of))
        self._tables: weakref.WeakSet[StoredModels] = weakref.WeakSet()
        self._committed: dict[int, list[np.ndarray]] = {}  # step -> tables of rows
        # Checkpoints of earlier processes may refer to any row that is there already.
        self._protected: list[int] = [self._file(g, self._mine).rows for g in range(len(members))]
        self._lock = threading.RLock()
        self._owner: int | None = None  # a descriptor that holds the folder's lock

    @classmethod
    def create(cls, folder: str | os.PathLike, partition: Partition, start: Blocks, like: Blocks) -> "Store":
        """A new store; the folder is there whole or not at all.

        Args:
          start: block name -> what every client starts with; the first rows of the files.

        Raises:
          OSError: it cannot be written.
        """
        folder = pathlib.Path(folder)
        partial = folder.with_name(folder.name + ".partial")
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
        try:
            for g, of in enumerate(_members(partition, like)):
                with (partial / _file_name(g, 0)).open("wb") as file:
                    for r in of:
                        file.write(_vector(start[partition.names[r]]))
                    flush(file)
            with (partial / _ABOUT).open("w") as file:
                json.dump(_about(partition, like), file)
                flush(file)
            partial.replace(folder)
            flush_folder(folder.parent)
        except OSError:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        return cls(folder, partition, like)

    def models(self) -> "StoredModels":
        """The models before round 0: all clients refer to the same rows."""
        rows = np.where(self.partition.owned, self._start, -1)
        known = np.zeros(len(self._start), np.uint32)
        for r in np.flatnonzero(self.file_of >= 0):
            known[r] = zlib.crc32(self._file(self.file_of[r], 0).read(self._start[r]))
        return StoredModels(self, rows, np.where(rows >= 0, known, 0).astype(np.uint32))

    def read(self, rows: np.ndarray, sums: np.ndarray) -> dict[str, blocks.Tree]:
        """Blocks by name, copied from the rows [R] of one client; those of other processes' files are checked.

        Raises:
          UserError: what another process has written cannot be seen here.
        """
        found = {}
        for r in np.flatnonzero(rows >= 0):
            name, g, writer = self.partition.names[r], self.file_of[r], rows[r] // WRITER
            if writer == self._mine:
                vector = self._file(g, writer).read(rows[r] % WRITER)
            else:
                vector = self._checked(g, rows[r], sums[r])
            if vector is None:
                raise UserError(
                    f"workdir: block {name} is not in {self._file(g, writer).path} as another process wrote it; all"
                    " processes must see one disk, and it must be whole"
                )
            found[name] = packed.unflatten(vector, self.like[name])
        return found

    def put(self, models: "StoredModels", update: Mapping[int, Blocks]) -> "StoredModels":
        """The models with the updated clients' blocks exchanged; see `methods.base.put_models`.

        Of several processes each brings some clients, and all get the models of all.

        Raises:
          OSError: the rows cannot be written (a full disk); the models are as they were.
          ValueError: a client's blocks are not those that it has.
        """
        with self._lock:
            rows, sums = models.rows.copy(), models.sums.copy()
            for k, mine in update.items():
                if {self.partition.names[r] for r in np.flatnonzero(rows[k] >= 0)} != set(mine):
                    raise ValueError(f"client {k} has other blocks than {sorted(mine)}")
            clients = np.array(sorted(update), int)
            with in_step():
                self._own()
                for g, of in enumerate(self._members):
                    owners, which = np.nonzero(rows[np.ix_(clients, of)] >= 0)
                    free = self._take(g, len(owners))
                    for k, r, row in zip(clients[owners], of[which], free, strict=True):
                        vector = _vector(update[k][self.partition.names[r]])
                        self._file(g, self._mine).write(row, vector)
                        rows[k, r], sums[k, r] = WRITER * self._mine + row, zlib.crc32(vector)
                if jax.process_count() > 1:  # who reads them next may be on another machine
                    self._sync()
            for theirs, new_rows, new_sums in _shared(clients, rows[clients], sums[clients]):
                rows[theirs], sums[theirs] = new_rows, new_sums
            return StoredModels(self, rows, sums)

    def commit(self, step: int, tables: Sequence["StoredModels"]) -> None:
        """To be called before checkpoint `step` of these models is written: what they refer to is on the disk now.

        It stays there until `release` is told that the checkpoint is gone.
        """
        with self._lock:
            self._committed.pop(step, None)
            self._committed[step] = [models.rows for models in tables]
        with in_step():
            self._sync()

    def release(self, steps: Collection[int]) -> None:
        """To be called from time to time with the checkpoints there are; rows of others are free again.

        The one committed last counts among them, since it may be still being written. Of several processes the first
        one knows best.
        """
        steps = [int(step) for step in first_said(" ".join(["steps", *map(str, steps)])).split()[1:]]
        with self._lock:
            last = list(self._committed)[-1:]
            self._committed = {step: kept for step, kept in self._committed.items() if step in (*steps, *last)}
            if steps and set(steps) <= set(self._committed):
                self._protected = [0] * len(self._members)

    def verify(self, models: "StoredModels") -> None:
        """Reads every row that the models refer to; of several processes each some clients'.

        Raises:
          UserError: one of them is missing or damaged.
        """
        with in_step():
            mine = np.arange(self._mine, len(models), jax.process_count())
            for g, of in enumerate(self._members):
                table = np.ix_(mine, of)
                clients, which = np.nonzero(models.rows[table] >= 0)
                rows, first = np.unique(models.rows[table][clients, which], return_index=True)
                for at, row in zip(first, rows, strict=True):
                    k, r = mine[clients[at]], of[which[at]]
                    if self._checked(g, row, models.sums[k, r]) is None:
                        raise UserError(
                            f"workdir: block {self.partition.names[r]} of client {k} is damaged in"
                            f" {self._file(g, row // WRITER).path}; delete the newest checkpoint to go on from the one"
                            " before, or train again in another folder"
                        )

    def size_bytes(self) -> int:
        """Bytes of all files, free rows included."""
        return sum(path.stat().st_size for path in self.folder.glob("*.rows"))

    def _file(self, g: int, writer: int) -> RowFile:
        if (g, writer) not in self._opened:
            n = blocks.count(self.like[self.partition.names[self._members[g][0]]])
            self._opened[g, writer] = RowFile(self.folder / _file_name(g, writer), n)
        return self._opened[g, writer]

    def _checked(self, g: int, row: int, expected: int) -> np.ndarray | None:
        """float32 [n], or None if the row does not hold what it should."""
        for _ in range(2):
            with contextlib.suppress(OSError, ValueError):
                vector = self._file(g, row // WRITER).read(row % WRITER)
                if zlib.crc32(vector) == expected:
                    return vector
            if row // WRITER == self._mine:
                break
            # Another process's file grows, and a network's disk may show an older state to a process that has it open.
            del self._opened[g, row // WRITER]
        return None

    def _sync(self) -> None:
        """What this process has written is on the disk."""
        for g in range(len(self._members)):
            self._file(g, self._mine).sync()

    def _take(self, g: int, count: int) -> list[int]:
        """So many free rows of this process's file, which grows if need be."""
        file = self._file(g, self._mine)
        if len(file.free) < count:
            used = np.zeros(file.rows, bool)
            used[: max(self._protected[g], 0 if self._mine else len(self._members[g]))] = True
            tables = [models.rows for models in self._tables] + sum(self._committed.values(), [])
            for rows in tables:
                found = rows[:, self._members[g]]
                used[found[found // WRITER == self._mine] % WRITER] = True  # -1 is no process's
            file.free = np.flatnonzero(~used)[::-1].tolist()
            if len(file.free) < max(count, file.rows // GROWTH):
                file.grow(max(count, file.rows // GROWTH) - len(file.free))
        return [file.free.pop() for _ in range(count)]

    def _own(self) -> None:
        """Keeps a second run from writing into the files; the lock goes with this process, however it ends."""
        if self._owner is None:
            try:
                self._owner = hold(self.folder / f"{self._mine}.lock")
            except BlockingIOError as error:
                raise UserError(f"workdir: another process is training in {self.folder}; wait for it") from error
            weakref.finalize(self, os.close, self._owner)


@jax.tree_util.register_pytree_with_keys_class
class StoredModels(Sequence):
    """Models of the state whose blocks are in a `Store`; to a method, a sequence of one mapping per client.

    Attributes:
      rows: int64 [K, R], the row of client k's block r; -1 where there is none.
      sums: uint32 [K, R], CRC-32 of what is in the row.

    As a pytree its leaves are these two tables. It is never changed.
    """

    def __init__(self, store: Store, rows: np.ndarray, sums: np.ndarray):
        self.store, self.rows, self.sums = store, rows, sums
        if isinstance(rows, np.ndarray):  # else a tree of something else, such as shapes
            with store._lock:
                store._tables.add(self)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, client: int) -> dict[str, blocks.Tree]:
        """The client's blocks by name, as `Store.read` gives them."""
        return self.store.read(self.rows[client], self.sums[client])

    def put(self, update: Mapping[int, Blocks]) -> "StoredModels":
        """See `Store.put`."""
        return self.store.put(self, update)

    def tree_flatten_with_keys(self) -> tuple[tuple[tuple[jax.tree_util.GetAttrKey, Any], ...], Store]:
        """See `jax.tree_util`."""
        key = jax.tree_util.GetAttrKey
        return ((key("rows"), self.rows), (key("sums"), self.sums)), self.store

    @classmethod
    def tree_unflatten(cls, store: Store, leaves: Sequence[Any]) -> "StoredModels":
        """See `jax.tree_util`."""
        return cls(store, *leaves)


def folder_of(workdir: pathlib.Path, needed: int, limit: int) -> pathlib.Path | None:
    """Where a run's stores are or will be; None where its personal blocks are in memory.

    A run that has a checkpoint keeps the form in which it began, since the checkpoint has it.

    Args:
      needed: bytes of all that would be stored. limit: how many may be in memory.

    Raises:
      UserError: a store would go that is in use.
    """
    folder = workdir / "store"
    much = any_says(needed > limit)
    disk = ""
    with in_step():
        if jax.process_index() == 0:
            begun = bool(Checkpoints(workdir / "checkpoints").steps())
            disk = "yes" if (folder.is_dir() if begun else much) else "no"
            if not begun or disk == "no":
                _check_unused(folder)
                shutil.rmtree(folder, ignore_errors=True)  # of a run that never had a checkpoint
    return folder if first_said(disk) == "yes" else None


def _check_unused(folder: pathlib.Path) -> None:
    for path in folder.glob("*/0.lock"):
        try:
            os.close(hold(path))
        except BlockingIOError:
            raise UserError(
                f"workdir: {folder} has the personal blocks of a state that is in use; delete the state, or name"
                " another folder"
            ) from None


def open_store(folder: pathlib.Path, partition: Partition, start: Blocks, like: Blocks) -> Store:
    """The store of that folder, made where it is not there yet."""
    with in_step():
        if jax.process_index() == 0 and not folder.is_dir():
            Store.create(folder, partition, start, like)
    return Store(folder, partition, like)


def stored_models(state: State) -> dict[Store, list[StoredModels]]:
    """The stores of a state and their models; none where all is in memory."""
    found: dict[Store, list[StoredModels]] = {}
    for models in (*state.client_models.values(), *state.moments.values()):
        if isinstance(models, StoredModels):
            found.setdefault(models.store, []).append(models)
    return found


def commit(state: State, step: int) -> None:
    """`Store.commit` of a state that is about to be saved as checkpoint `step`."""
    for store, tables in stored_models(state).items():
        store.commit(step, tables)


def release(state: State, steps: Collection[int]) -> None:
    """`Store.release` for the stores of a state."""
    for store in stored_models(state):
        store.release(steps)


def verify(state: State) -> None:
    """`Store.verify` of all that a restored state refers to."""
    for store, tables in stored_models(state).items():
        for models in tables:
            store.verify(models)


def _shared(clients: np.ndarray, rows: np.ndarray, sums: np.ndarray) -> Iterator[tuple[np.ndarray, ...]]:
    """What every process has to say of some clients [k]: (clients, rows [k, R], sums [k, R])."""
    mine = np.column_stack([clients, rows, sums]).astype(np.int64)
    for message in all_said(mine.tobytes()):
        table = np.frombuffer(message, np.int64).reshape(-1, mine.shape[1])
        yield table[:, 0], *np.split(table[:, 1:], 2, axis=1)


def _file_name(g: int, writer: int) -> str:
    return f"{g}.{writer}.rows"


def _members(partition: Partition, like: Blocks) -> list[np.ndarray]:
    """The blocks of each group that is stored."""
    return [of for of in packed.members(partition).values() if partition.names[of[0]] in like]


def _about(partition: Partition, like: Blocks) -> dict:
    """What the files hold, for a process that opens them again."""
    groups = [
        {"blocks": [partition.names[r] for r in of], "parameters": blocks.count(like[partition.names[of[0]]])}
        for of in _members(partition, like)
    ]
    return {"format": _FORMAT, "dtype": "float32", "groups": groups}


def _vector(tree: blocks.Tree) -> np.ndarray:
    """float32 [n], contiguous."""
    return np.concatenate([np.ravel(np.asarray(leaf, np.float32)) for leaf in jax.tree.leaves(tree)])
