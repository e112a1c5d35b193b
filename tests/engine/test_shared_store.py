"""One store of several processes: each writes and reads what is its own, all have the same tables."""

from tests.two_processes import run_together

PROGRAM = """
import errno, pathlib
import numpy as np
from tap_jax.engine import row_file
from tap_jax.engine.agreement import any_says
from tap_jax.engine.checkpointing import Checkpoints
from tap_jax.engine.store import WRITER, StoredModels, folder_of, open_store
from tap_jax.errors import UserError
from tap_jax.methods.base import put_models
from tests.engine.test_store import CLIENTS, LIKE, PARTITION, drawn, in_memory, same

me, workdir = jax.process_index(), pathlib.Path(sys.argv[1])
start = drawn(np.random.default_rng(0), "abc")

# What process 1 alone has too little memory for, all have on disk.
folder = folder_of(workdir, needed=10, limit=100 if me == 0 else 1)
assert folder == workdir / "store"
store = open_store(folder / "blocks", PARTITION, start, LIKE)
models, expected = store.models(), in_memory(start)

# Clients go from process to process; each gives what it has trained. All draw all, to know what to expect.
rng, reads = np.random.default_rng(1), []
read = row_file.RowFile.read
row_file.RowFile.read = lambda file, row: reads.append(file.path.name) or read(file, row)
for round_ in range(30):
    dealt = rng.integers(0, 2, CLIENTS)
    update = {k: drawn(rng, PARTITION.blocks_of(k)) for k in rng.choice(CLIENTS, 3, replace=False).tolist()}
    mine = {k: found for k, found in update.items() if dealt[k] == me}
    reads.clear()
    models, expected = put_models(models, mine), put_models(expected, update)
    assert not reads, "to write reads nothing"
    if round_ % 7 == 6:
        store.commit(round_, [models])
        saved, saved_blocks = (models.rows, models.sums), expected
        store.release([round_] if me == 0 else [])  # process 1 does not see it yet
    for k in np.flatnonzero(dealt == me):
        same(models[k], expected[k])
writers = np.unique(models.rows[models.rows >= 0] // WRITER)
assert set(writers) == {0, 1}
for mine, theirs in zip(models, expected, strict=True):
    same(mine, theirs)
store.verify(models)
old = StoredModels(store, *saved)
for mine, theirs in zip(old, saved_blocks, strict=True):
    same(mine, theirs)
files = [path for path in (folder / "blocks").iterdir() if path.suffix == ".rows"]
assert len(files) == 4 and store.size_bytes() < 6 * 4 * (PARTITION.owned @ [23, 23, 5000]).sum()

# A full disk in one process is all processes', and the models are as they were.
def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device", "rows")

write = row_file.RowFile.write
if me == 1:
    row_file.RowFile.write = full
try:
    put_models(models, {me: drawn(rng, PARTITION.blocks_of(me))})
except (OSError, UserError) as error:
    assert isinstance(error, OSError) == (me == 1) and "No space left" in str(error)
else:
    raise AssertionError("process 1 could not write")
row_file.RowFile.write = write
for mine, theirs in zip(models, expected, strict=True):
    same(mine, theirs)

# What one process finds damaged is damaged for both: half of the clients are each one's to look at.
any_says(False)  # both have read what they wanted
if me == 0:
    for path in files:
        with path.open("r+b") as file:
            file.write(bytes(path.stat().st_size))
any_says(False)
try:
    store.verify(models)
except UserError as error:
    assert "is damaged" in str(error)
else:
    raise AssertionError("nobody noticed")

# A run that has a checkpoint keeps its form, whatever the memory of these processes.
with Checkpoints(workdir / "checkpoints") as checkpoints:
    checkpoints.save(1, {"a": np.zeros(1)}, {})
assert folder_of(workdir, needed=10, limit=100) == folder
assert folder_of(workdir / "other", needed=10, limit=100) is None
"""


def test_two_processes_write_and_read_one_store(tmp_path):
    run_together(PROGRAM, tmp_path)
