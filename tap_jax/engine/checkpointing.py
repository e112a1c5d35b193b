"""Checkpoints of a run: atomic, written while training goes on, verified when read. Orbax lives only here.

How they are written: `save` takes what lies on devices and hands everything to a thread, which puts the files into a
folder of another name and renames it when it is whole. One write is under way at most; whatever goes wrong with it is
raised by the next `save` or `wait`. On several hosts all processes hold the same arrays, the first one writes, and all
learn together how it went.

What is in them: see `manifest`.
"""

import concurrent.futures
import contextlib
import json
import os
import pathlib
import re
import shutil
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from orbax import checkpoint as orbax
from orbax.checkpoint import v1 as ocp

from tap_jax.engine.agreement import first_said
from tap_jax.engine.manifest import abstract, checksum, expectation, match, pack, under_todays_names, unpack
from tap_jax.errors import UserError

_OTHERS = "it is of other settings or data"
_FORMAT = 1
_TRASH = ".deleted-"
_LOOKS = 20  # for what a failed write leaves, a twentieth of a second apart


class Checkpoints:
    """The checkpoints of one run in one folder, named by step.

    A context manager: on leaving it nothing is being written any more.

    Attributes:
      notes: one line for each checkpoint that `restore_latest` passed over, and why; and what others `note`.

    Example:
      >>> import numpy as np
      >>> tree = {"server": {"mote/image/attention": np.ones((1, 4), np.float32)}}
      >>> with Checkpoints("checkpoints") as checkpoints:
      ...     checkpoints.save(10, tree, {"config": "9f86d0"})
      >>> step, tree, metadata = checkpoints.restore_latest(tree)
      >>> step, metadata
      (10, {'config': '9f86d0'})
    """

    def __init__(self, folder: str | os.PathLike, *, keep: int = 2, report: Callable[[str], None] | None = None):
        """Opens a folder; nothing is created before the first save.

        Args:
          folder: holds one sub-folder per step, and nothing else.
          keep: how many of the newest to keep.
          report: is called with every line that goes to `notes`.
        """
        if keep < 1:
            raise ValueError(f"keep must be at least 1, not {keep}")
        self.folder = pathlib.Path(folder).absolute()
        self.keep = keep
        self.notes: list[str] = []
        self._report = report
        self._writer = concurrent.futures.ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._writing: tuple[int, concurrent.futures.Future | None] | None = None  # step; None where another writes

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, failed: type[BaseException] | None, *_) -> None:
        if failed is None:
            self.wait()
        elif self._writing and self._writing[1]:  # what failed counts more than how this ends
            concurrent.futures.wait([self._writing[1]])

    def save(self, step: int, tree: Any, metadata: dict[str, Any]) -> None:
        """Starts to write one checkpoint; once it is whole, those beyond `keep` are removed.

        Waits for the write before it, if that is still under way. A writer that is killed leaves a folder under
        another name, which the next save clears away. Checkpoints of later steps belong to a future that a resume has
        given up (they were not whole): they are removed too.

        Args:
          step: >= 0; an existing checkpoint of it is replaced.
          tree: arrays in dicts, lists, tuples, dataclasses; None is kept. Those of jax are copied (each process must
            have all of them); those of numpy are not, and must not be changed in place before `wait` returns.
          metadata: whatever JSON can say.

        Raises:
          UserError: the checkpoint before this one could not be written.
        """
        self.wait()
        tree = jax.tree_util.tree_map_with_path(_on_host, tree)
        mine = jax.process_index() == 0
        self._writing = step, self._writer.submit(self._write, step, tree, metadata) if mine else None

    def wait(self) -> None:
        """Returns when the checkpoint that `save` began is whole; on several hosts, in all processes alike.

        Raises:
          UserError: it could not be written; the older ones are as they were.
        """
        if self._writing is None:
            return
        (step, future), self._writing = self._writing, None
        error = future.exception() if future else None
        reason = first_said(_reason(error) if error else "")
        if reason:
            raise UserError(
                f"checkpoints: {step} could not be written to {self.folder} ({reason}); free some space or mend the"
                " folder, and the same command goes on from the checkpoint before"
            ) from error

    def _write(self, step: int, tree: Any, metadata: dict[str, Any]) -> None:
        """Packs, writes and tidies up; runs in the thread of the writer."""
        arrays, entries = pack(tree)
        manifest = json.dumps({"leaves": entries, "metadata": metadata})
        path, aside = self.folder / str(step), self.folder / f"{_TRASH}{step}"
        self._sweep()
        if path.exists():
            os.replace(path, aside)
        try:
            with _orbax_writer() as writer:
                writer.save(
                    path,
                    orbax.args.Composite(state=orbax.args.PyTreeSave(arrays)),
                    custom_metadata={"format": _FORMAT, "manifest": manifest, "checksum": checksum(manifest.encode())},
                )
        except Exception:
            if aside.exists():
                os.replace(aside, path)
            for _ in range(_LOOKS):  # half a checkpoint may fill the disk, and its other files may still be under way
                self._sweep()
                time.sleep(0.05)
            raise
        kept = [found for found in self.steps() if found <= step][-self.keep :]
        for found in set(self.steps()) - set(kept):
            os.replace(self.folder / str(found), self.folder / f"{_TRASH}{found}")
        self._sweep()

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, whole or not, in rising order."""
        if not self.folder.is_dir():
            return []
        return sorted(int(path.name) for path in self.folder.iterdir() if path.name.isdecimal() and path.is_dir())

    def restore_latest(
        self, like: Any, metadata: Mapping[str, Any] | None = None
    ) -> tuple[int, Any, dict[str, Any]] | None:
        """Reads the newest checkpoint that is whole and fits; on several hosts, the same in all processes.

        Args:
          like: a tree of arrays or `jax.ShapeDtypeStruct` with the structure, shapes and dtypes to expect.
          metadata: what the checkpoint's own must say, if anything.

        Returns:
          The step, a tree like `like` of numpy arrays, bit for bit as saved, and the metadata; None where there are no
          checkpoints at all. Each one passed over adds a line to `notes`.

        Raises:
          UserError: there are checkpoints, but none that is whole and fits.
        """
        problems, expected = [], expectation(like)
        steps = [int(step) for step in first_said(" ".join(map(str, self.steps()))).split()]
        for step in reversed(steps):
            found, reason = None, ""
            try:
                found = self._restore(step, like, expected, metadata or {})
            # Damage shows in as many ways as there are layers below: JSON, tensorstore, Orbax, the file system.
            except Exception as error:
                several = f"process {jax.process_index()} (all must see one disk): " if jax.process_count() > 1 else ""
                reason = several + _reason(error)
            reason = first_said(reason)
            if found and not reason:
                return step, *found
            problems.append(f"checkpoint {step} passed over: {reason}")
            self.note(problems[-1])
        if steps:
            remedy = "bring data and settings back" if problems[0].endswith(_OTHERS) else "delete the folder"
            raise UserError(
                f"checkpoints in {self.folder}: none of {len(steps)} can be used ({problems[0]});"
                f" {remedy} or choose another workdir to start afresh"
            )
        return None

    def note(self, line: str) -> None:
        """Adds a line to `notes`."""
        self.notes.append(line)
        if self._report:
            self._report(line)

    def _restore(
        self, step: int, like: Any, expected: dict[str, Any], metadata: Mapping[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        """Reads and verifies one checkpoint; raises whatever is wrong with it."""
        path = self.folder / str(step)
        context = ocp.Context()
        me = jax.process_index()
        context.multiprocessing.primary_host, context.multiprocessing.active_processes = me, {me}
        with context:
            custom = ocp.metadata(path).custom_metadata
            if not isinstance(custom, dict) or custom.get("format") != _FORMAT:
                raise ValueError("not written by this version")
            if checksum(custom["manifest"].encode()) != custom["checksum"]:
                raise ValueError("the manifest is damaged")
            manifest = json.loads(custom["manifest"])
            stored = manifest["leaves"]
            entries = under_todays_names(stored)
            match(entries, expected)
            for name, value in metadata.items():
                if manifest["metadata"].get(name) != value:
                    raise ValueError(_OTHERS)
            leaves = unpack(ocp.load(path, abstract(stored)), entries)
        tree = jax.tree_util.tree_unflatten(jax.tree_util.tree_structure(like), [leaves[leaf] for leaf in expected])
        return tree, manifest["metadata"]

    def _sweep(self) -> None:
        """Removes what is no checkpoint: those renamed to be removed, and what a writer left that was killed."""
        for path in self.folder.iterdir() if self.folder.is_dir() else ():
            if path.name.startswith(_TRASH) or ".orbax-checkpoint-tmp" in path.name:
                shutil.rmtree(path, ignore_errors=True)


def _orbax_writer() -> contextlib.closing:
    """Writes as if this process were alone.

    Orbax's v1 API would have all processes compare the folder's name over their devices, in the middle of what these
    compute; the older one can be told not to.
    """
    me = jax.process_index()
    alone = orbax.options.MultiprocessingOptions(primary_host=me, active_processes={me})
    handler = orbax.CompositeCheckpointHandler(
        state=orbax.PyTreeCheckpointHandler(
            use_zarr3=True,
            use_compression=False,  # weights shrink by 8 %, at half the speed
            multiprocessing_options=alone,
        ),
        composite_options=orbax.CompositeOptions(multiprocessing_options=alone),
    )
    return contextlib.closing(orbax.Checkpointer(handler, multiprocessing_options=alone))


def _on_host(path: tuple, leaf: Any) -> Any:
    """The leaf as a numpy array that no device can change."""
    if jax.dtypes.issubdtype(getattr(leaf, "dtype", None), jax.dtypes.prng_key):
        raise TypeError(f"leaf {jax.tree_util.keystr(path)} is a typed PRNG key; save jax.random.key_data(key)")
    return np.array(leaf) if isinstance(leaf, jax.Array) else leaf  # numpy's view of a CPU device's memory is not safe


def _reason(error: BaseException) -> str:
    """What is wrong, in one line of at most 200 characters; of tensorstore's long ones only the system's words."""
    code = re.search(r"os_error_code='(\d+)'", str(error))
    if code:
        return os.strerror(int(code[1]))
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return " ".join(str(error).split())[:200] or type(error).__name__
