"""Every test runs on 8 fake CPU devices, offline, with full float32 products.

Strict dtype promotion is on in the tests of models, blocks and losses (the fixture `strict`), not everywhere: optax
itself raises a float to an int32 count. Rank promotion stays allowed: a bias [D] is added to tokens [B, T, D] all
over the models, as everywhere in JAX; code that keeps to equal ranks is tested with "raise" (tests/models/test_heads).
"""

import gc
import importlib.metadata
import os
import pathlib
import shutil
import subprocess

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
# Products of NumPy, SciPy and PyTorch are tiny here; threads of theirs would spend their time waiting for each other.
os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
# The tests compile much and run little: unoptimised code without the new fusion emitters compiles five times faster.
# TAP_TEST_XLA_FLAGS="" runs them with the compiler's defaults.
# One LLVM module per program, not 32 to be compiled side by side, saves a tenth more.
# jaxlib stops at a flag it does not know, and releases after 0.10 no longer know the second one.
FAST_COMPILE = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
if importlib.metadata.version("jaxlib").startswith("0.10."):
    FAST_COMPILE += " --xla_cpu_use_fusion_emitters=false"
_flags = os.environ.get("XLA_FLAGS", ""), os.environ.get("TAP_TEST_XLA_FLAGS", FAST_COMPILE)
os.environ["XLA_FLAGS"] = " ".join(filter(None, _flags))

import jax

# Before anything asks for a device: the backend is set up once per process.
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_default_matmul_precision", "highest")

import pytest

from tap_jax.config import default_config, override, validate
from tap_jax.engine.memory import give_back_memory

# Files that take minutes, the longest first. A file stays with one process; where a long one began last, the other
# process would have nothing to do.
LONG = (
    "test_readme.py",
    "test_oracle.py",
    "test_benchmark.py",
    "test_pretrained.py",
    "test_mesh.py",
    "models/test_residuals.py",
    "models/test_packing.py",
    "test_named_clients.py",
    "test_processes.py",
    "test_notebooks.py",
    "engine/test_privacy.py",
    "test_measuring.py",
    "engine/test_windows.py",
    "methods/test_disentafl.py",
    "methods/test_feddat.py",
    "test_cli.py",
    "test_resume.py",
    "engine/test_cohort.py",
    "engine/test_screening.py",
    "engine/test_store.py",
)


def pytest_sessionstart():
    """JAX starts with the devices named above, before a command that a test runs could name others."""
    jax.devices()


def pytest_collection_modifyitems(items):
    """The order in which xdist hands out files."""
    rank = {pathlib.Path(__file__).parent / name: number for number, name in enumerate(LONG)}
    assert all(path.exists() for path in rank), "LONG names a file that is not there"
    items.sort(key=lambda item: rank.get(item.path, len(LONG)))


def pytest_collection_finish():
    """The collector of garbage leaves out what was imported: to look through it takes a tenth of the tests' time."""
    gc.collect()
    gc.freeze()


# Linux lets a process map so many pieces of memory (vm.max_map_count is 65,530), of which every compiled program takes
# some; where it runs out of them, the compiler aborts the process.
MANY_MAPPINGS = 20_000
# And two processes of tests share a machine's memory.
MUCH_MEMORY = 3 * 2**30


@pytest.fixture(autouse=True, scope="module")
def programs_are_let_go():
    """What a file of tests has compiled, no later one needs."""
    yield
    process = pathlib.Path("/proc/self")
    if not (process / "maps").exists():
        return
    resident = int((process / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    if resident > MUCH_MEMORY or (process / "maps").read_bytes().count(b"\n") > MANY_MAPPINGS:
        jax.clear_caches()
        gc.collect()
        give_back_memory()


TINY = {
    "cohort_size": 2,
    "local_steps": 3,
    "batch_size": 8,
    "post_steps": 3,
    "rounds": 3,
    "checkpoint_every": 1,
    "optimizer.warmup_rounds": 2,
    "optimizer.learning_rate_initial": 1e-3,
    "optimizer.learning_rate": 3e-3,
    "optimizer.post_learning_rate": 1e-3,
    "model.width": 8,
    "model.heads": 2,
    "model.mlp": 12,
    "model.image_layers": 1,
    "model.text_layers": 1,
    "model.image_size": 16,
    "model.patch": 8,
    "model.upsample": 0.25,
    "model.vocab": 120,
    "model.max_text": 16,
    "model.max_answer": 8,
    "model.encoder_rank": 3,
    "model.attention_rank": 2,
    "model.expert_rank": 2,
    "model.lora_dropout": 0.0,
    "model.head_dropout": 0.0,
    "model.text_dropout": 0.0,
    "model.head_hidden": (6,),
    "model.image_channels": (4, 3, 2),
    "model.text_heads": 2,
    "model.text_cond_heads": 2,
    "model.text_inner": 12,
    "federation.table": "custom",
    "federation.groups": 1,
    "data.train_size": 48,
    "data.test_size": 6,
    "data.image_classes": 4,
    "mesh.clients": 1,
    "engine.microbatch": 8,
}


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a disk of 4 MB; skips where one cannot be mounted, which takes Linux and root."""
    folder = tmp_path / "small_disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no right to mount a small disk")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def strict():
    """Nothing is promoted silently between dtypes."""
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture(scope="session")
def tiny():
    """`tiny(rows, **fields)`: a config that trains in moments; rows are the client table, fields override."""

    def build(rows, fields=None):
        config = override(default_config(), TINY | {"federation.rows": tuple(rows)} | dict(fields or {}))
        validate(config)
        return config

    return build
