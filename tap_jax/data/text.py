"""Texts to numbers: the word-piece tokenizer and the token arrays of one split.

The tokenizer is BERT's (lower case, greedy longest piece first), either loaded with a pre-trained model or trained
on the run's own texts; both are the same class, `WordPiece`.
"""

import dataclasses
import functools
import hashlib
import json
import logging
import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import tokenizers

from tap_jax.data.examples import Examples
from tap_jax.errors import UserError
from tap_jax.whole_files import replaced

_LOG = logging.getLogger(__name__)

PAD = 0  # id of [PAD]
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


class WordPiece:
    """BERT word pieces: texts to id arrays and back.

    Attributes:
      size: V, the number of pieces.
      pad_id, unk_id, cls_id, sep_id: ids of [PAD], [UNK], [CLS], [SEP].
    """

    def __init__(self, backend: tokenizers.Tokenizer):
        backend.no_truncation()
        backend.no_padding()
        ids = [id_ for token in SPECIAL if (id_ := backend.token_to_id(token)) is not None]
        missing = [token for token in SPECIAL if backend.token_to_id(token) is None]
        if missing:
            raise UserError(
                f"data.tokenizer: no {', '.join(missing)} in its vocabulary; use a BERT word-piece tokenizer"
            )
        self._backend = backend
        self._specials = frozenset(ids)
        self.pad_id, self.unk_id, self.cls_id, self.sep_id, _ = ids
        self.size = backend.get_vocab_size()

    def encode(self, texts: Sequence[str], max_length: int, shorten: np.ndarray | None = None) -> np.ndarray:
        """[CLS] text [SEP] per text, padded: int32 [N, T].

        Args:
          texts: N texts.
          max_length: longer ones lose a part, never the [SEP].
          shorten: int [N, 2], where the part of each text begins and ends, in characters, that loses pieces from its
            middle until the text fits; then what is before it loses its end, and at last what is after it. None, or
            an empty part at 0: the end of the text is lost.

        Returns:
          T is the longest text's length rounded up to a multiple of 8, at most `max_length`.
        """
        return self.encode_counted(texts, max_length, shorten)[0]

    def encode_counted(
        self, texts: Sequence[str], max_length: int, shorten: np.ndarray | None = None
    ) -> tuple[np.ndarray, int]:
        """As `encode`, and how many of the texts were longer."""
        rows, longer = [], 0
        for number, encoding in enumerate(self._backend.encode_batch(list(texts), add_special_tokens=False)):
            ids = encoding.ids
            if len(ids) > max_length - 2:
                longer += 1
                start, stop = (0, 0) if shorten is None else shorten[number]
                first = sum(end <= start for _, end in encoding.offsets) if start < stop else len(ids)
                last = first + sum(begin < stop for begin, _ in encoding.offsets[first:])
                ids = _fitting(ids[:first], ids[first:last], ids[last:], max_length - 2)
            rows.append([self.cls_id, *ids, self.sep_id])
        longest = max(map(len, rows), default=2)
        out = np.full((len(rows), min(-(-longest // 8) * 8, max_length)), self.pad_id, np.int32)
        for row, ids in zip(out, rows, strict=True):
            row[: len(ids)] = ids
        return out, longer

    def decode(self, ids: np.ndarray) -> list[str]:
        """Texts of int [N, A]: each stops at its first [SEP], special pieces are dropped.

        Pieces are joined by blanks ("answer : yes"), the form in which `normalise` puts the references.
        """
        texts = []
        for row in np.asarray(ids):
            ends = np.flatnonzero(row == self.sep_id)
            kept = row[: ends[0]] if len(ends) else row
            pieces = [self._backend.id_to_token(int(i)) for i in kept if int(i) not in self._specials]
            # An id beyond the vocabulary (a padded output layer) has no piece; it writes nothing.
            texts.append(" ".join(piece for piece in pieces if piece).replace(" ##", ""))
        return texts

    def normalise(self, text: str) -> str:
        """The text as `decode` would spell it if no piece were missing: lower case, blanks around punctuation."""
        if self._backend.normalizer is not None:
            text = self._backend.normalizer.normalize_str(text)
        if self._backend.pre_tokenizer is not None:
            return " ".join(word for word, _ in self._backend.pre_tokenizer.pre_tokenize_str(text))
        return " ".join(text.split())

    def save(self, folder: str | os.PathLike) -> None:
        """Writes a folder that `transformers.AutoTokenizer.from_pretrained` and `load_tokenizer` read."""
        folder = pathlib.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.json").write_text(self._backend.to_str(pretty=True), encoding="utf-8")
        names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL, strict=True))
        config = {"tokenizer_class": "BertTokenizerFast", "do_lower_case": True, "model_max_length": 512, **names}
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
        vocabulary = sorted(self._backend.get_vocab().items(), key=lambda item: item[1])
        (folder / "vocab.txt").write_text("".join(f"{piece}\n" for piece, _ in vocabulary), encoding="utf-8")


def _fitting(before: list[int], part: list[int], after: list[int], room: int) -> list[int]:
    """At most `room` pieces of the three: `after` whole if it fits, then `before`, then both ends of `part`."""
    after = after[:room]
    before = before[: room - len(after)]
    left = room - len(after) - len(before)
    if len(part) > left:
        part = part[: left - left // 2] + part[len(part) - left // 2 :]
    return before + part + after


def load_tokenizer(
    source: str, corpus: Iterable[str] | None = None, *, vocab_size: int = 30522, cache_dir: str | None = None
) -> WordPiece:
    """A tokenizer from a folder, from the hub, or trained on the spot.

    Args:
      source: "train", a local folder (no network is used), or a hub id such as "google-bert/bert-base-uncased".
      corpus: the texts to train on; needed for "train" only.
      vocab_size: upper bound on V for "train".
      cache_dir: where hub files and trained tokenizers are kept; None for the hub's own place and no cache.

    Raises:
      UserError: "train" without texts, or a source that cannot be read.
    """
    if source == "train":
        return _train(list(corpus or ()), vocab_size, cache_dir)
    folder = pathlib.Path(source)
    file = folder / "tokenizer.json"
    if file.is_file():
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # bare, whatever is wrong with it
            raise UserError(
                f"data.tokenizer: cannot read {file} ({error}); replace it, or name another folder, a hub id or 'train'"
            ) from error
        return WordPiece(backend)
    from transformers import AutoTokenizer  # slow to import, and only pre-trained sources need it

    try:
        loaded = AutoTokenizer.from_pretrained(
            source, cache_dir=cache_dir, local_files_only=folder.is_dir(), use_fast=True
        )
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"data.tokenizer: cannot load '{source}' ({reason}); give a folder with tokenizer.json, a hub id or 'train'"
        ) from error
    return WordPiece(loaded.backend_tokenizer)


def _train(corpus: list[str], vocab_size: int, cache_dir: str | None) -> WordPiece:
    if not corpus:
        raise UserError("data.tokenizer: 'train' needs texts, the tasks have none; name a folder or a hub id")
    digest = hashlib.sha256(json.dumps([vocab_size, tokenizers.__version__, corpus]).encode()).hexdigest()[:16]
    cached = cache_dir and pathlib.Path(cache_dir) / f"tokenizer-{digest}.json"
    if cached and cached.is_file():
        try:
            return WordPiece(tokenizers.Tokenizer.from_file(str(cached)))
        except Exception:  # the library raises bare Exception for a damaged file: train again
            pass
    backend = _bert(tokenizers.models.WordPiece(unk_token="[UNK]"))
    # The trainer numbers the single characters in the order of a randomly seeded hash table and breaks ties by
    # these numbers, so two runs would differ. Naming the characters first, sorted, makes it deterministic; the
    # vocabulary then moves to a fresh tokenizer, in which only the real special tokens are special.
    words = {
        w for text in corpus for w, _ in backend.pre_tokenizer.pre_tokenize_str(backend.normalizer.normalize_str(text))
    }
    alphabet = sorted({w[0] for w in words} | {f"##{c}" for w in words for c in w[1:]})
    if vocab_size < len(SPECIAL) + len(alphabet):
        raise UserError(f"model.vocab: {vocab_size} is too small for {len(alphabet)} characters; raise it")
    trainer = tokenizers.trainers.WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=[*SPECIAL, *alphabet], show_progress=False, min_frequency=1
    )
    backend.train_from_iterator(corpus, trainer)
    backend = _bert(tokenizers.models.WordPiece(backend.get_vocab(), unk_token="[UNK]"))
    backend.add_special_tokens(list(SPECIAL))
    trained = WordPiece(backend)
    backend.post_processor = tokenizers.processors.BertProcessing(("[SEP]", trained.sep_id), ("[CLS]", trained.cls_id))
    if cached:
        try:
            cached.parent.mkdir(parents=True, exist_ok=True)
            with replaced(cached, shared=True) as fresh:
                backend.save(str(fresh))
        except OSError as error:
            _LOG.warning("data: trained word pieces are not kept in %s (%s)", cached.parent, error.strerror or error)
    return trained


def _bert(model: tokenizers.models.WordPiece) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    backend.decoder = tokenizers.decoders.WordPiece()
    return backend


@dataclasses.dataclass(frozen=True)
class TaskArrays:
    """The host arrays of one split of one task; N samples.

    Attributes:
      domains: int32 [N], index into `task.domains`.
      images: uint8 [N, 64, 64, 3], or None without the image modality.
      tokens: int32 [N, T], `[CLS] input [SEP]` padded, or None without the text modality.
      labels: int32 [N], classification only.
      answers: int32 [N, A], `[CLS] target [SEP]` padded, text_generation only.
      answer_lengths: int32 [N], how many tokens the decoder predicts: the answer's without its leading [CLS].
      references: per sample the acceptable outputs, spelt as `WordPiece.decode` spells, text_generation only.
      cut: how many inputs and how many answers were longer than the model takes.
    """

    domains: np.ndarray
    images: np.ndarray | None = None
    tokens: np.ndarray | None = None
    labels: np.ndarray | None = None
    answers: np.ndarray | None = None
    answer_lengths: np.ndarray | None = None
    references: tuple[tuple[str, ...], ...] | None = None
    cut: tuple[int, int] = (0, 0)

    def __len__(self) -> int:
        return len(self.domains)

    @functools.cached_property
    def text_lengths(self) -> np.ndarray:
        """int32 [N], tokens of each input, [CLS] and [SEP] included; 0 without the text modality."""
        if self.tokens is None:
            return np.zeros(len(self), np.int32)
        return (self.tokens != PAD).sum(1).astype(np.int32)


def encode_examples(
    examples: Examples, tokenizer: WordPiece | None, *, max_text: int, max_answer: int, too_long: str = "middle"
) -> TaskArrays:
    """Tokenises one split.

    Args:
      examples: N samples.
      tokenizer: may be None where there are no texts.
      max_text: longest input in word pieces, [CLS] and [SEP] included.
      max_answer: longest answer in word pieces, [CLS] and [SEP] included; of longer ones the end is lost.
      too_long: longer inputs lose the "middle" of what `examples.shorten` says, or their "end".
    """
    inputs_cut = answers_cut = 0
    fields: dict[str, Any] = {name: getattr(examples, name) for name in ("domains", "images", "labels")}
    if tokenizer and examples.inputs is not None:
        shorten = examples.shorten if too_long == "middle" else None
        fields["tokens"], inputs_cut = tokenizer.encode_counted(examples.inputs, max_text, shorten)
    if tokenizer and examples.targets is not None and examples.references is not None:
        answers, answers_cut = tokenizer.encode_counted(examples.targets, max_answer)
        fields["answers"] = answers
        fields["answer_lengths"] = ((answers != PAD).sum(axis=1) - 1).astype(np.int32)
        fields["references"] = tuple(tuple(map(tokenizer.normalise, group)) for group in examples.references)
    return TaskArrays(**fields, cut=(inputs_cut, answers_cut))
