"""Several processes decide alike: to stop, which checkpoint to use, and whether one was written."""

from tap_jax.engine.agreement import all_said, any_says, first_said
from tests.two_processes import run_together

PROGRAM = """
import pathlib, sys
import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from tap_jax.engine.agreement import all_said, any_says, first_said, in_step
from tap_jax.engine.checkpointing import Checkpoints
from tap_jax.errors import UserError

me, folder = jax.process_index(), pathlib.Path(sys.argv[1])
assert (jax.process_count(), len(jax.devices())) == (2, 4)

assert first_said("mine" if me == 1 else "") == "mine"
assert first_said(f"from {me}") == "from 0"
assert first_said("ä" * 300) == "ä" * 256  # 512 bytes
assert any_says(me == 1) and not any_says(False)
assert all_said(b"x" * me) == [b"", b"x"] and all_said(b"") == [b"", b""]

try:
    with in_step():
        if me == 1:
            raise OSError(28, "No space left on device", "rows")
except OSError as error:
    assert me == 1 and error.errno == 28
except UserError as error:
    assert me == 0 and str(error).startswith("workdir: No space left on device: rows; "), error
else:
    raise AssertionError("it failed in process 1")

mesh = jax.make_mesh((4,), ("clients",))
everywhere = NamedSharding(mesh, PartitionSpec())
server = jax.make_array_from_callback((5,), everywhere, lambda index: np.arange(5.0, dtype=np.float32)[index])
tree = {"server": server, "personal": np.full(100_000, 2.0, np.float32)}
with Checkpoints(folder / "shared") as checkpoints:
    for step in (1, 2, 3):
        checkpoints.save(step, tree | {"round": np.int32(step)}, {"config": "a"})
        double = jax.jit(lambda x: 2 * x)(server)  # the devices are free while it is written
step, found, metadata = checkpoints.restore_latest(tree | {"round": np.int32(0)})
assert (step, metadata, found["round"]) == (3, {"config": "a"}, 3)
np.testing.assert_array_equal(found["server"], np.arange(5))
np.testing.assert_array_equal(found["personal"], 2)

# A write that fails in process 0 fails in both.
def full(*_):
    raise OSError(28, "No space left on device")

checkpoints._write = full
checkpoints.save(4, tree, {})
try:
    checkpoints.wait()
except UserError as error:
    assert "checkpoints: 4 could not be written" in str(error) and "No space left" in str(error), error
else:
    raise AssertionError("nobody said that it failed")

# A folder of its own for each process: neither goes on without the other.
own = Checkpoints(folder / f"own{me}")
own.save(1, tree, {})
own.wait()
try:
    own.restore_latest(tree)
except UserError as error:
    assert "none of 1 can be used (checkpoint 1 passed over: process 1 (all must see one disk): " in str(error), error
else:
    raise AssertionError("process 1 has no such folder")
"""


def test_a_process_that_is_alone_asks_nobody():
    assert first_said("text") == "text"
    assert any_says(True)
    assert not any_says(False)
    assert all_said(b"text") == [b"text"]


def test_two_processes_agree(tmp_path):
    run_together(PROGRAM, tmp_path)
