"""Data of the hub's row counts and picture sizes: how long they take to read, convert and deal out, in which memory.

    python launch/hub_size.py OUT [--part 1.0]

Draws a stand-in for the eight data sets into OUT/data (0.3 GB; a set's pictures are the same two hundred again and
again, which changes neither decoding nor memory) where there is none, and builds `configs/mini.py` on it twice, each
time in a process of its own: with an empty cache (OUT/cache is removed first, and takes 3.6 GB then), and from the
cache. Prints seconds, CPU seconds and peak memory of each, beside the bytes of all pictures as they are kept. Needs
no network; ten minutes on two free cores.
"""

import argparse
import io
import pathlib
import resource
import shutil
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

# Rows to train and to test on, and pictures of the width and height, about as the hub has them.
PICTURES = {
    "tiny_imagenet": (100_000, 10_000, (64, 64), "JPEG"),
    "cifar100": (50_000, 10_000, (32, 32), "PNG"),
    "fashion_mnist": (60_000, 10_000, (28, 28), "PNG"),
    "caltech256": (24_000, 6_000, (320, 280), "JPEG"),
    "vqa": (17_000, 4_400, (640, 480), "JPEG"),
}
LABELS = {"tiny_imagenet": ("label", 200), "cifar100": ("fine_label", 100)}
TEXTS = {"ag_news": (120_000, 7_600), "mmlu": (2_100, 540), "common_gen": (67_389, 4_018)}
DIFFERENT, GROUP = 200, 1_000  # pictures of a set; rows written at once
WORDS = np.array([a + b + c for a in "bdfgklmnprst" for b in "aeiou" for c in ("n", "r", "st", "lo", "ki", "tam")])


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("out", type=pathlib.Path)
    options.add_argument("--part", type=float, default=1.0, help="of the hub's rows (default: %(default)s)")
    options.add_argument("--start", action="store_true", help=argparse.SUPPRESS)
    chosen = options.parse_args()
    if chosen.start:
        start(chosen.out)
        return
    if not (chosen.out / "data").exists():
        draw(chosen.out / "data", chosen.part)
    kept = sum(int(chosen.part * rows) for train, test, *_ in PICTURES.values() for rows in (train, test))
    print(f"pictures as they are kept: {kept * 64 * 64 * 3 / 1e9:.2f} GB", flush=True)
    shutil.rmtree(chosen.out / "cache", ignore_errors=True)
    for what in ("empty cache", "from the cache"):
        print(f"{what}: ", end="", flush=True)
        subprocess.run([sys.executable, __file__, str(chosen.out), "--start"], check=True)


def draw(folder: pathlib.Path, part: float) -> None:
    """Writes train.parquet and test.parquet of each task."""
    rng = np.random.default_rng(0)
    for name in (*PICTURES, *TEXTS):
        (folder / name).mkdir(parents=True)
        known = pictures(rng, *PICTURES[name][2:]) if name in PICTURES else None
        for split, rows in zip(("train", "test"), (PICTURES | TEXTS)[name][:2], strict=False):
            count, writer = max(1, int(part * rows)), None
            for begin in range(0, count, GROUP):
                table = pa.table(columns(rng, name, min(GROUP, count - begin), known, begin))
                writer = writer or pq.ParquetWriter(folder / name / f"{split}.parquet", table.schema)
                writer.write_table(table)
            writer.close()


def pictures(rng: np.random.Generator, size: tuple[int, int], kind: str) -> list[bytes]:
    """Encoded pictures, smooth with some grain, as photographs are to a decoder."""
    from PIL import Image

    found = []
    for _ in range(DIFFERENT):
        coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).resize(size, Image.Resampling.BICUBIC)
        grain = rng.integers(-12, 13, (size[1], size[0], 3))
        file = io.BytesIO()
        Image.fromarray(np.clip(np.asarray(coarse) + grain, 0, 255).astype(np.uint8)).save(file, kind)
        found.append(file.getvalue())
    return found


def columns(rng: np.random.Generator, name: str, count: int, known: list[bytes] | None, begin: int) -> dict:
    """So many rows with the hub's columns."""
    sentence = lambda least, most: " ".join(rng.choice(WORDS, rng.integers(least, most)))  # noqa: E731
    found: dict = {}
    if known:
        column = {"cifar100": "img"}.get(name, "image")
        found[column] = [{"bytes": known[i], "path": None} for i in rng.integers(len(known), size=count)]
    if name in LABELS:
        column, classes = LABELS[name]
        found[column] = rng.integers(classes, size=count)
    elif name == "vqa":
        found |= {"question": [sentence(4, 10) for _ in range(count)]}
        found |= {"multiple_choice_answer": rng.choice(WORDS, count).tolist()}
    elif name == "ag_news":
        found |= {"text": [sentence(25, 55) for _ in range(count)], "label": rng.integers(4, size=count)}
    elif name == "mmlu":
        subjects = ("professional_law", "professional_medicine", "moral_scenarios")
        found |= {
            "question": [sentence(40, 200) for _ in range(count)],
            "subject": rng.choice(subjects, count).tolist(),
        }
        found |= {"choices": [rng.choice(WORDS, 4).tolist() for _ in range(count)]}
        found |= {"answer": rng.integers(4, size=count)}
    elif name == "common_gen":
        found |= {"concept_set_idx": (begin + np.arange(count)) // 4}
        found |= {"concepts": [rng.choice(WORDS, 4).tolist() for _ in range(count)]}
        found |= {"target": [sentence(8, 16) for _ in range(count)]}
    return found


def start(out: pathlib.Path) -> None:
    """Builds a run as `tap-jax train` does, up to its first round."""
    import tap_jax as tap

    fields = {"data.root": str(out / "data"), "data.cache_dir": str(out / "cache"), "data.test_size": 0}
    config = tap.load_config("mini", fields | {"data.image_classes": 0})
    before, cpu = time.perf_counter(), time.process_time()
    experiment = tap.build(config)
    seconds, cpu = time.perf_counter() - before, time.process_time() - cpu
    experiment.evaluator  # noqa: B018 - puts the test sets on the device
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    samples = sum(sum(mine.values()) for mine in experiment.data.samples())
    print(f"{seconds:.0f} s, {cpu:.0f} CPU s, {peak:.2f} GB at most; {samples:,} samples dealt out")


if __name__ == "__main__":
    main()
