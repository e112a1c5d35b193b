"""Templates of Table 23, the word-piece tokenizer, and token arrays."""

import pathlib
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tap_jax.data.examples import Examples
from tap_jax.data.text import encode_examples, load_tokenizer
from tap_jax.errors import UserError

CORPUS = ["Answer: yes", "what color is the circle?", "a dog runs in the park.", "the unaffordable circle"]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("train", CORPUS, vocab_size=200)


def test_special_pieces(tokenizer):
    assert (tokenizer.pad_id, tokenizer.cls_id, tokenizer.sep_id) == (0, 2, 3)
    ids = tokenizer.encode(["yes", "what color is the circle?"], 32)
    assert ids.shape == (2, 8)
    assert ids.dtype == np.int32
    assert ids[0, 0] == tokenizer.cls_id
    assert ids[0, 2:].tolist() == [tokenizer.sep_id, 0, 0, 0, 0, 0]


def test_truncation_keeps_the_separator(tokenizer):
    ids = tokenizer.encode(["a dog runs in the park."] * 2, 5)
    assert ids.shape == (2, 5)
    assert (ids[:, -1] == tokenizer.sep_id).all()
    assert tokenizer.decode(ids) == ["a dog runs"] * 2


def test_no_texts_make_an_empty_array(tokenizer):
    assert tokenizer.encode([], 16).shape == (0, 8)


def test_decode_stops_at_the_first_separator_and_skips_unknown_ids(tokenizer):
    ids = tokenizer.encode(["answer: yes"], 16)
    tail = np.array([[tokenizer.cls_id, 7, tokenizer.size + 5]])
    assert tokenizer.decode(np.concatenate([ids, tail], axis=1)) == ["answer : yes"]
    assert tokenizer.decode(np.array([[tokenizer.size + 5, tokenizer.pad_id]])) == [""]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from("answer yes what color is the circle a dog runs in park , . ? :".split()), max_size=12))
def test_decoding_gives_the_normalised_text_back(words):
    tokenizer = load_tokenizer("train", CORPUS, vocab_size=200)
    text = " ".join(words).capitalize().replace(",", "")
    assert tokenizer.decode(tokenizer.encode([text], 64)) == [tokenizer.normalise(text)]


def test_training_is_deterministic_across_processes(tokenizer):
    # The library's trainer orders ties by a random hash; two fresh processes must agree all the same.
    program = (
        "from tap_jax.data.text import load_tokenizer\n"
        "words = [chr(97 + i % 8) + chr(97 + i // 8 % 8) + chr(97 + i * 7 % 8) for i in range(200)]\n"
        "t = load_tokenizer('train', [' '.join(words)], vocab_size=60)\n"
        "print(t.encode(words, 8).tolist())"
    )
    root = pathlib.Path(__file__).parents[2]
    runs = [
        subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, cwd=root).stdout
        for _ in range(3)
    ]
    assert runs[0] == runs[1] == runs[2] != b""


def test_saved_folder_loads_in_transformers_and_here(tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer.save(tmp_path)
    text = "What color is the unaffordable circle?"
    ours = tokenizer.encode([text], 32)[0]
    for cls in (transformers.AutoTokenizer, transformers.BertTokenizerFast):
        theirs = cls.from_pretrained(str(tmp_path))
        assert theirs(text)["input_ids"] == ours[ours != tokenizer.pad_id].tolist()
        assert theirs.pad_token_id == tokenizer.pad_id
        assert theirs.vocab_size == tokenizer.size
    assert np.array_equal(load_tokenizer(str(tmp_path)).encode([text], 32)[0], ours)


def test_folder_with_a_vocabulary_only_goes_through_transformers(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    again = load_tokenizer(str(tmp_path))
    assert np.array_equal(again.encode(CORPUS, 32), tokenizer.encode(CORPUS, 32))


def test_trained_tokenizer_is_cached_and_a_damaged_cache_is_rebuilt(tokenizer, tmp_path):
    load_tokenizer("train", CORPUS, vocab_size=200, cache_dir=str(tmp_path))
    (cached,) = tmp_path.iterdir()
    cached.write_text("{")
    again = load_tokenizer("train", CORPUS, vocab_size=200, cache_dir=str(tmp_path))
    assert np.array_equal(again.encode(CORPUS, 32), tokenizer.encode(CORPUS, 32))
    assert cached.stat().st_size > 10


@pytest.mark.parametrize(
    ("source", "corpus", "size"), [("train", [], 100), ("train", CORPUS, 10), ("/no/such/folder", None, 100)]
)
def test_user_errors(source, corpus, size, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=r"data\.tokenizer|model\.vocab"):
        load_tokenizer(source, corpus, vocab_size=size)


@pytest.mark.parametrize("left", ["", '{"version": "1.0", ', "{}"])
def test_a_damaged_tokenizer_is_named(tokenizer, tmp_path, left):
    tokenizer.save(tmp_path)
    (tmp_path / "tokenizer.json").write_text(left)
    with pytest.raises(UserError, match=r"^data\.tokenizer: cannot read .*tokenizer\.json \(.+\); replace it, or .*$"):
        load_tokenizer(str(tmp_path))


def test_arrays_of_a_generation_task(tokenizer):
    examples = Examples(
        np.zeros(2, np.int32),
        inputs=("a dog", "the park"),
        targets=("A dog runs.", "Yes"),
        references=(("A dog runs.", "The dog runs."), ("Yes",)),
    )
    arrays = encode_examples(examples, tokenizer, max_text=16, max_answer=12)
    assert len(arrays) == 2
    assert arrays.images is None and arrays.labels is None
    # [CLS] a dog runs . [SEP]: the decoder predicts all but the [CLS].
    assert arrays.answer_lengths.tolist() == [5, 2]
    assert arrays.references == (("a dog runs .", "the dog runs ."), ("yes",))
    assert tokenizer.decode(arrays.answers) == ["a dog runs .", "yes"]


def test_a_picture_task_needs_no_tokenizer():
    examples = Examples(np.zeros(1, np.int32), images=np.zeros((1, 64, 64, 3), np.uint8))
    arrays = encode_examples(examples, None, max_text=8, max_answer=8)
    assert arrays.tokens is None and arrays.answers is None and arrays.images.shape == (1, 64, 64, 3)
