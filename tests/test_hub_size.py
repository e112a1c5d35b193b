"""launch/hub_size.py and launch/tables/mini_corpus.py: what they write can be read, and holds what they say."""

import importlib.util
import pathlib

import pyarrow.parquet as pq
import pytest

from tap_jax.data import loading
from tap_jax.tasks import PAPER_TASKS, find_task

LAUNCH = pathlib.Path(__file__).parents[1] / "launch"


def script(name):
    spec = importlib.util.spec_from_file_location(pathlib.Path(name).stem, LAUNCH / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    module, folder = script("hub_size.py"), tmp_path_factory.mktemp("drawn") / "data"
    module.DIFFERENT, module.GROUP = 3, 40  # several row groups
    module.draw(folder, 0.002)
    return folder


def test_the_stand_in_has_the_hubs_columns(drawn):
    sizes = {name: len(loading.load(find_task(name), "train", root=str(drawn))) for name in PAPER_TASKS}
    assert sizes == {
        "tiny_imagenet": 200, "cifar100": 100, "fashion_mnist": 120, "caltech256": 48,
        "ag_news": 240, "mmlu": 4, "vqa": 34, "common_gen": 134,
    }  # fmt: skip


def test_the_corpus_is_of_training_sets_alone(drawn, tmp_path):
    for path in drawn.glob("*/test.parquet"):  # whoever opens one fails
        path.write_bytes(b"")
    script("tables/mini_corpus.py").main(str(drawn), tmp_path / "corpus")
    pictures = {path.name: len(list(path.glob("*.png"))) for path in (tmp_path / "corpus").iterdir() if path.is_dir()}
    assert pictures == {"tiny_imagenet": 200, "cifar100": 100, "fashion_mnist": 120, "caltech256": 48, "vqa": 34}
    row = pq.read_table(drawn / "vqa" / "train.parquet").to_pylist()[5]
    caption = (tmp_path / "corpus" / "vqa" / "5.txt").read_text()
    assert caption == f"{row['question']} {row['multiple_choice_answer']}\n"
    assert len(list((tmp_path / "corpus").rglob("*.txt"))) == 34 + 1
    assert len((tmp_path / "corpus" / "sentences.txt").read_text().splitlines()) == 240 + 134 + 4
