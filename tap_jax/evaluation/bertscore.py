"""BERTScore F1 of many pairs of texts with a BERT in a folder (Zhang et al., ICLR 2020; bert-score's embeddings).

Every distinct text goes through the BERT once: bert-score itself embeds both texts of every pair, and the clients of a
federation are scored against the same references again and again.

Letters: B texts or pairs of a batch, T tokens, D width of the BERT.
"""

import functools
import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tap_jax.errors import UserError

_LOG = logging.getLogger(__name__)
# Tokens of a batch, padding counted. On a CPU larger batches fall out of the caches, on a GPU smaller ones leave it
# idle; there the activations of a BERT of base size take about 2 GB.
TOKENS = {"cpu": 2**12}
TOKENS_OF_A_GPU = 2**15
KEPT_BYTES = 2**28  # of the references' embeddings that are kept for the next call; the hub's test sets need 200 MB


def torch_device(name: str) -> str:
    """The torch device that `metrics.device` means: "auto" is the GPU where PyTorch sees one, else the CPU.

    JAX keeps three quarters of a GPU's memory for itself unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise, and a
    BERT of base size needs about 3 GB of the rest, batches included.

    Raises:
      UserError: PyTorch has no such device.
    """
    if name in ("auto", "cpu"):
        try:
            import torch
        except ImportError:
            return "cpu"
        return "cuda" if name == "auto" and torch.cuda.is_available() else "cpu"
    try:
        import torch

        torch.zeros(1, device=name).item()  # a CUDA device may be named and not be there
    except Exception as error:  # ImportError, RuntimeError, AssertionError, NotImplementedError, ...
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"metrics.device: PyTorch has no device '{name}' ({reason}); use 'auto' or 'cpu'") from None
    return name


def bert_scores(
    pairs: Sequence[tuple[str, tuple[str, ...]]], *, folder: Path, layer: int, device: str = "cpu"
) -> list[float]:
    """BERTScore F1 x100 of each (candidate, references), the best over its references; texts without a word score 0.

    The batches are made here: bert-score keeps every embedding at once, orders equally long sentences by Python's
    per-process string hash, which shows in the last digits, and fails on empty texts under transformers 5.

    Args:
      folder: holds the BERT. layer: the hidden layer to compare, from 1.
      device: a torch device. Where its memory does not do, the CPU goes on, with a warning.
    """
    distinct: dict[str, dict[str, None]] = {}  # candidate -> its references
    for candidate, texts in pairs:
        if candidate.strip():
            distinct.setdefault(candidate, {}).update((text, None) for text in texts if text.strip())
    distinct = {candidate: texts for candidate, texts in distinct.items() if texts}
    found = _scored(distinct, folder, layer, device) if distinct else {}
    return [max(found.get((candidate, text), 0.0) for text in texts) for candidate, texts in pairs]


def _scored(wanted: dict[str, dict[str, None]], folder: Path, layer: int, device: str) -> dict[tuple[str, str], float]:
    """(candidate, reference) -> F1 x100."""
    import torch

    if device != "cpu" and (folder, layer, device) in _FULL:
        device = "cpu"
    try:
        return _bert(folder, layer, device).compare(wanted)
    except torch.OutOfMemoryError as error:
        if device == "cpu":
            raise
        reason = str(error).split(". ")[0]
    _bert.cache_clear()
    torch.cuda.empty_cache()
    _FULL.add((folder, layer, device))
    _LOG.warning(
        "metrics.device: BERTScore goes on on the CPU, since '%s' has no memory left (%s); lower"
        " XLA_PYTHON_CLIENT_MEM_FRACTION",
        device,
        reason,
    )
    return _bert(folder, layer, "cpu").compare(wanted)


_FULL: set[tuple[Path, int, str]] = set()  # where there was no memory


@functools.lru_cache(maxsize=1)
def _bert(folder: Path, layer: int, device: str) -> "_Bert":
    return _Bert(*load_bert(folder, layer, device), device)


class _Bert:
    """A BERT, and the embeddings of references that it has seen.

    Args:
      model: texts' ids [B, T] -> embeddings [B, T, D].
      device: where both are.
    """

    def __init__(self, model: Any, tokenizer: Any, device: str):
        self.model, self.tokenizer, self.device = model, tokenizer, device
        self.tokens = TOKENS.get(device, TOKENS_OF_A_GPU)
        self.ids: Callable[[str], list[int]] = functools.lru_cache(maxsize=2**16)(self._ids)
        # Every word piece counts 1, [CLS] and [SEP] count 0.
        self.weights = defaultdict(lambda: 1.0, {tokenizer.sep_token_id: 0.0, tokenizer.cls_token_id: 0.0})
        self._kept: dict[str, Any] = {}
        self._bytes = 0

    def _ids(self, text: str) -> list[int]:
        from bert_score.utils import sent_encode

        return sent_encode(self.tokenizer, text)

    def compare(self, wanted: dict[str, dict[str, None]]) -> dict[tuple[str, str], float]:
        """candidate -> references; F1 x100 of each pair. Batches hold candidates of like length."""
        found: dict[tuple[str, str], float] = {}
        for candidates in self._batches(wanted):
            ours = self._embed(candidates)
            theirs = self._references({text for candidate in candidates for text in wanted[candidate]})
            flat = [(candidate, text) for candidate in candidates for text in wanted[candidate]]
            flat.sort(key=lambda pair: (len(self.ids(pair[1])), pair))
            size = max(1, self.tokens // max(len(self.ids(text)) for pair in flat for text in pair))
            for start in range(0, len(flat), size):
                batch = flat[start : start + size]
                values = self._f1([ours[candidate] for candidate, _ in batch], [theirs[text] for _, text in batch])
                found.update(zip(batch, (100.0 * value for value in values), strict=True))
        return found

    def _f1(self, candidates: Sequence[Any], references: Sequence[Any]) -> list[float]:
        """F1 of greedy matching by cosine; B texts each, as their unit embeddings [T, D] and weights [T].

        bert-score lets a word match the padding of its batch, with similarity 0, where it is less like every real word:
        there a score depends, in its second decimal, on what else is scored. Here it does not.
        """
        import torch

        pad = functools.partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
        ours, theirs = (pad([embedding for embedding, _ in texts]) for texts in (candidates, references))
        our_weights, their_weights = (pad([weights for _, weights in texts]) for texts in (candidates, references))
        ours_real, theirs_real = (
            pad([torch.ones_like(weights, dtype=torch.bool) for _, weights in texts])
            for texts in (candidates, references)
        )
        alike = ours @ theirs.transpose(1, 2)
        nearest = alike.masked_fill(~theirs_real[:, None, :], -torch.inf).amax(2)
        precision = (nearest * our_weights).sum(1) / our_weights.sum(1)
        nearest = alike.masked_fill(~ours_real[:, :, None], -torch.inf).amax(1)
        recall = (nearest * their_weights).sum(1) / their_weights.sum(1)
        return torch.nan_to_num(2 * precision * recall / (precision + recall)).tolist()

    def _references(self, texts: set[str]) -> dict[str, Any]:
        known = {text: self._kept[text] for text in texts if text in self._kept}
        for batch in self._batches(texts - known.keys()):
            for text, (embedding, weights) in self._embed(batch).items():
                known[text] = embedding, weights
                if self._bytes < KEPT_BYTES:
                    self._kept[text] = known[text]
                    self._bytes += embedding.nbytes
        return known

    def _batches(self, texts: Iterable[str]) -> Iterator[list[str]]:
        """Texts by length, a batch as many as `tokens` hold at the longest's length."""
        batch: list[str] = []
        for text in sorted(texts, key=lambda text: (len(self.ids(text)), text)):
            if batch and (len(batch) + 1) * len(self.ids(text)) > self.tokens:
                yield batch
                batch = []
            batch.append(text)
        if batch:
            yield batch

    def _embed(self, texts: Sequence[str]) -> dict[str, Any]:
        """Text -> the embeddings of its tokens, each of length 1, [T, D], and their weights [T]."""
        import torch
        from bert_score.utils import bert_encode, padding

        ids = [self.ids(text) for text in texts]
        padded, _, mask = padding(ids, self.tokenizer.pad_token_id)
        embedded = bert_encode(self.model, padded.to(self.device), attention_mask=mask.to(self.device))
        embedded = embedded / embedded.norm(dim=-1, keepdim=True)
        weights = [torch.tensor([self.weights[i] for i in mine], device=self.device) for mine in ids]
        # Copies: a view would keep the whole batch, padding too.
        return {
            text: (row[: len(mine)].clone(), weight)
            for text, row, mine, weight in zip(texts, embedded, ids, weights, strict=True)
        }


def load_bert(folder: Path, layer: int, device: str) -> tuple[Any, Any]:
    """(model cut after `layer`, tokenizer); bert-score's own loader takes any path with "t5" in it for a T5."""
    from transformers import AutoConfig, AutoModel, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()  # it would list every weight of the layers above
    transformers_logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(folder, num_hidden_layers=layer, local_files_only=True)
        model = AutoModel.from_pretrained(folder, config=config, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
    # Saved tokenizers may claim a length of 1e30, and bert-score truncates at what they claim.
    tokenizer.model_max_length = min(tokenizer.model_max_length, getattr(config, "max_position_embeddings", 512))
    return model.float().to(device).eval(), tokenizer
