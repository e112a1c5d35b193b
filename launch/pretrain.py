"""Pre-trains a small FLAVA or ViLT from nothing, on a CPU, and writes a checkpoint folder for `model.weights`.

    python launch/pretrain.py flava --out=weights/flava --minutes=15

Model and losses are transformers' own. FLAVA (`FlavaForPreTraining`): masked patches, masked words, both of captioned
pictures, captions against pictures (contrastive), and whether a caption belongs to its picture. ViLT
(`ViltForMaskedLM`): masked words, of captioned pictures and of sentences alone. transformers has no image-text matching
loss for ViLT (`ViltForImageAndTextRetrieval` refuses labels), so there is none here.

FLAVA predicts a code for each masked patch. The published model takes the codes from an image codebook of its own that
was trained on photographs, of which there is no small one, and a random one would tell patches apart by chance. Codes
here are the nearest of --codes centres, k-means of patches of the pictures, and go to the model as its `mim_labels`.

Pictures and texts are drawn by `tap_jax.data.corpus`, in combinations that no task of the embedded suite has; or they
are those of a folder (--data): NAME.txt beside NAME.png or .jpg is the picture's captions, one a line; lines of other
.txt files are sentences; pictures without a text are for masked patches alone.

Written to --out: config.json and model.safetensors (FlavaModel, ViltModel), the tokenizer's files, losses.csv and
losses.png, probe.json, and a card, README.md. The probe tells how well a linear model on the frozen features does what
each task of the embedded suite asks, once of the trained model and once of the model before its first step:

- features are the mean token of the last layer, which is what tap_jax's decoders read, and what is usual where masked
  modelling leaves [CLS] untrained (BEiT, Bao et al. 2022; MAE, He et al. 2022; ViLT here), standardised;
- logistic regression with an L2 penalty, on few samples a class and with the penalty chosen on as many held-out ones,
  as in CLIP (Radford et al. 2021, Sec. 3.1.5 and App. A.3); ridge regression, likewise, to rebuild a picture.

It reads training sets of a seed of its own; no test set is read.

Needs PyTorch, transformers and tap_jax; no network. One core is enough for the default sizes, those of the demos.
"""

import argparse
import csv
import dataclasses
import json
import math
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from scipy.cluster.vq import kmeans2, vq
from scipy.optimize import minimize
from scipy.special import logsumexp

from tap_jax.data import corpus, grammar, synthetic
from tap_jax.data.images import MEAN, STD
from tap_jax.data.text import SPECIAL, WordPiece, load_tokenizer
from tap_jax.errors import UserError
from tap_jax.tasks import TASKS

PROBE_SEED = 1009  # of training sets that no configuration here draws
PROBE_SIZE, PROBE_REPEATS = 1600, 10  # samples, and how often some of them are drawn to fit on
PROBE_SHOTS = (4, 16)  # of a class; a client of the demo has 25 or 30
PENALTIES = np.logspace(-4, 2, 13)  # of the squared weights, times the number of samples
MASKED_WORDS, MASKED_PATCHES = 0.3, 0.4  # parts
MASKED_CAPTIONS = 0.5  # of a caption's words, for ViLT: the more are hidden, the more must come from the picture
IMAGES = (".png", ".jpg", ".jpeg")
IGNORED = -100  # a label that no loss reads


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=("flava", "vilt"))
    parser.add_argument("--out", type=pathlib.Path, required=True, help="the checkpoint's folder, new or empty")
    parser.add_argument("--data", type=pathlib.Path, help="a folder of your own pictures and texts; else drawn ones")
    parser.add_argument("--minutes", type=float, default=15.0, help="of training, at most (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=0, help="so many, where the minutes allow; 0: as many as fit")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--mlp", type=int, default=32)
    parser.add_argument("--layers", type=int, default=1, help="of each of FLAVA's encoders (default: %(default)s)")
    parser.add_argument("--fusion-layers", type=int, help="multimodal layers (default: FLAVA 2, ViLT 4)")
    parser.add_argument("--image-size", type=int, default=32, help="pixels a side (default: %(default)s)")
    parser.add_argument("--patch", type=int, default=8, help="pixels a side (default: %(default)s)")
    parser.add_argument("--vocab", type=int, default=1000, help="word pieces, at most (default: %(default)s)")
    parser.add_argument(
        "--max-text", type=int, default=64, help="word pieces of a text, at most (default: %(default)s)"
    )
    parser.add_argument("--codes", type=int, default=256, help="of patches (default: %(default)s)")
    parser.add_argument("--pool", type=int, default=16000, help="pictures that are drawn (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=64, help="of each kind (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="AdamW's highest (default: %(default)s)")
    chosen = parser.parse_args(argv)
    try:
        run(chosen)
    except UserError as error:
        print(f"pretrain: {error}", file=sys.stderr)
        return 2
    return 0


def run(chosen: argparse.Namespace) -> None:
    """Reads or draws the data, trains, probes, writes."""
    if chosen.out.exists() and any(chosen.out.iterdir()):
        raise UserError(f"--out: {chosen.out} is not empty; name a new folder")
    for field in ("image_size", "width"):
        divisor = {"image_size": "patch", "width": "heads"}[field]
        if getattr(chosen, field) % getattr(chosen, divisor):
            raise UserError(f"--{divisor}: does not divide --{field.replace('_', '-')}; use one that does")
    chosen.fusion_layers = chosen.fusion_layers or {"flava": 2, "vilt": 4}[chosen.model]
    torch.manual_seed(chosen.seed)
    transformers.utils.logging.set_verbosity_error()
    print("reading the folder" if chosen.data else "drawing pictures and texts", flush=True)
    texts = read_folder(chosen.data, chosen) if chosen.data else drawn(chosen)
    tokenizer = load_tokenizer("train", [*texts.sentences, *texts.captions], vocab_size=chosen.vocab)
    data = Data.of(texts, tokenizer, chosen)
    model = (flava if chosen.model == "flava" else vilt)(chosen, tokenizer.size)
    features = flava_features if chosen.model == "flava" else vilt_features
    random = probe(model, features, tokenizer, chosen)
    print(f"probe of random weights: {random}", flush=True)
    curves = train(model, data, chosen)
    scores = {"random": random, "trained": probe(model, features, tokenizer, chosen)}
    chosen.out.mkdir(parents=True, exist_ok=True)
    write(chosen, model, tokenizer, data, curves, scores)
    for name, found in scores["trained"].items():
        print(f"probe {name}: {found}, of random weights {random[name]}")
    print(f"written to {chosen.out}; use it with\n  {usage(chosen, tokenizer.size)}")


# --- data ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Texts:
    """Pictures, their captions, and sentences.

    Attributes:
      images: float32 [N, 3, S, S], standardised, S the model's.
      captions, shown: M captions, and which picture each belongs to, int64 [M].
      sentences: may be none.
    """

    images: torch.Tensor
    captions: Sequence[str]
    shown: np.ndarray
    sentences: Sequence[str]


def pixels(images: np.ndarray, size: int) -> torch.Tensor:
    """uint8 [N, H, H, 3] -> float32 [N, 3, size, size], standardised and resized as tap_jax does it."""
    tensor = torch.tensor((images / np.float32(255) - np.float32(MEAN)) / np.float32(STD)).permute(0, 3, 1, 2)
    return F.interpolate(tensor, size=(size, size), mode="bilinear", align_corners=False)


def drawn(chosen: argparse.Namespace) -> Texts:
    """Three captions of each drawn picture, and as many sentences."""
    rng = np.random.default_rng([chosen.seed, corpus.STREAM])
    parts, captions = [], []
    for start in range(0, chosen.pool, 1000):
        images, found = corpus.draw_pictures(rng, min(1000, chosen.pool - start))
        parts.append(pixels(images, chosen.image_size))
        captions += [corpus.caption(rng, picture) for picture in found for _ in range(3)]
    sentences = [corpus.sentence(rng) for _ in captions]
    return Texts(torch.cat(parts), captions, np.repeat(np.arange(chosen.pool), 3), sentences)


def read_folder(folder: pathlib.Path, chosen: argparse.Namespace) -> Texts:
    """A folder's pictures, captions and sentences, at any depth."""
    from tap_jax.data.images import to_rgb64

    files = sorted(path for path in folder.rglob("*") if path.is_file())
    found = [path for path in files if path.suffix.lower() in IMAGES]
    if not found:
        raise UserError(f"--data: no {', '.join(IMAGES)} in {folder}; name a folder with pictures")
    number = {path.with_suffix(".txt"): at for at, path in enumerate(found)}
    captions, shown, sentences = [], [], []
    for path in files:
        if path.suffix != ".txt":
            continue
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        if path in number:
            captions += lines
            shown += [number[path]] * len(lines)
        else:
            sentences += lines
    if not captions:
        raise UserError(f"--data: no captions in {folder}; put NAME.txt beside NAME.png, a caption a line")
    images = []
    for path in found:
        try:
            images.append(pixels(to_rgb64(path.read_bytes(), where=str(path))[None], chosen.image_size))
        except UserError as error:
            wrong = str(error).partition("'image': ")[2].rpartition("; ")[0]
            raise UserError(f"--data: {path}: {wrong}; mend or remove it") from None
    return Texts(torch.cat(images), captions, np.array(shown), sentences)


@dataclasses.dataclass(frozen=True)
class Data:
    """What batches are cut from.

    Attributes:
      images: float32 [N, 3, S, S]. codes: int64 [N, (S/patch)²], of their patches.
      captions: int64 [M, T], 0-padded. shown: int64 [M], the picture of each.
      sentences: int64 [S, T], 0-padded, short ones first, or None.
      vocab, mask: how many word pieces, and which of them is [MASK].
    """

    images: torch.Tensor
    codes: torch.Tensor
    captions: torch.Tensor
    shown: torch.Tensor
    sentences: torch.Tensor | None
    vocab: int
    mask: int

    @classmethod
    def of(cls, texts: Texts, tokenizer: WordPiece, chosen: argparse.Namespace) -> "Data":
        """Encodes the texts, and the patches by k-means."""
        patches = F.unfold(texts.images, chosen.patch, stride=chosen.patch).transpose(1, 2).contiguous().numpy()
        flat = patches.reshape(-1, patches.shape[-1])
        rng = np.random.default_rng(chosen.seed)
        some = flat[rng.choice(len(flat), min(len(flat), 50 * chosen.codes), replace=False)]
        centres, _ = kmeans2(some, min(chosen.codes, len(some)), iter=10, minit="points", rng=rng)
        codes = vq(flat, centres)[0].reshape(patches.shape[:2])
        encode = lambda lines: torch.tensor(tokenizer.encode(lines, chosen.max_text)).long()  # noqa: E731
        return cls(
            texts.images,
            torch.tensor(codes).long(),
            encode(texts.captions),
            torch.tensor(texts.shown).long(),
            encode(sorted(texts.sentences, key=len)) if texts.sentences else None,
            tokenizer.size,
            SPECIAL.index("[MASK]"),
        )


def trimmed(tokens: torch.Tensor) -> torch.Tensor:
    """int64 [B, T] without the columns in which every text has ended."""
    return tokens[:, : int((tokens != 0).sum(1).max())]


def some_sentences(data: Data, batch: int) -> torch.Tensor:
    """int64 [B, T]: a random eighth of them by length, so that few places are padding, and B of those."""
    window = -(-len(data.sentences) // 8)
    start = int(torch.randint(len(data.sentences) - window + 1, ()))
    return trimmed(data.sentences[start + torch.randint(window, (batch,))])


def masked_words(tokens: torch.Tensor, data: Data, part: float = MASKED_WORDS) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens with some masked, labels [B, T]) as BERT has it: of those chosen 80 % [MASK], 10 % others, 10 % kept.

    All words are labels, also those that were not chosen (ELECTRA's All-Tokens MLM, Clark et al. 2020, Sec. 3.4), so
    that the features keep apart words that stand in the same places.
    """
    words = tokens >= len(SPECIAL)
    chosen = (torch.rand(tokens.shape) < part) & words
    labels = tokens.masked_fill(~words, IGNORED)
    how = torch.rand(tokens.shape)
    changed = tokens.masked_fill(chosen & (how < 0.8), data.mask)
    other = torch.randint(len(SPECIAL), data.vocab, tokens.shape)
    return torch.where(chosen & (how >= 0.9), other, changed), labels


# --- the models ----------------------------------------------------------------------------------------------------


def spread(chosen: argparse.Namespace) -> float:
    """Initial deviation of weights: BERT's 0.02 at width 768, as strong at any other."""
    return 0.02 * math.sqrt(768 / chosen.width)


def flava(chosen: argparse.Namespace, vocab: int) -> transformers.FlavaForPreTraining:
    """A FLAVA of the sizes chosen, random."""
    common = dict(
        hidden_size=chosen.width,
        num_attention_heads=chosen.heads,
        intermediate_size=chosen.mlp,
        initializer_range=spread(chosen),
    )
    config = transformers.FlavaConfig(
        image_config=common
        | dict(
            num_hidden_layers=chosen.layers,
            image_size=chosen.image_size,
            patch_size=chosen.patch,
            vocab_size=chosen.codes,
        ),
        text_config=common
        | dict(num_hidden_layers=chosen.layers, vocab_size=vocab, max_position_embeddings=chosen.max_text),
        multimodal_config=common | dict(num_hidden_layers=chosen.fusion_layers),
        hidden_size=chosen.width,
        projection_dim=chosen.width,
        initializer_range=spread(chosen),
        init_codebook=False,
    )
    model = transformers.FlavaForPreTraining(config)
    embeddings = model.flava.image_model.embeddings
    _place(embeddings.position_embeddings, embeddings.cls_token, embeddings.mask_token)
    _words(model.flava.text_model.embeddings.word_embeddings)
    return model


def vilt(chosen: argparse.Namespace, vocab: int) -> transformers.ViltForMaskedLM:
    """A ViLT of the sizes chosen, random."""
    config = transformers.ViltConfig(
        hidden_size=chosen.width,
        num_attention_heads=chosen.heads,
        intermediate_size=chosen.mlp,
        num_hidden_layers=chosen.fusion_layers,
        image_size=chosen.image_size,
        patch_size=chosen.patch,
        vocab_size=vocab,
        max_position_embeddings=chosen.max_text,
        initializer_range=spread(chosen),
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = transformers.ViltForMaskedLM(config)
    _place(model.vilt.embeddings.position_embeddings, model.vilt.embeddings.cls_token)
    _words(model.vilt.embeddings.text_embeddings.word_embeddings)
    return model


def _place(*parameters: torch.nn.Parameter) -> None:
    """transformers starts these at 0; a random model then could not tell places apart, which would flatter training."""
    with torch.no_grad():
        for parameter in parameters:
            parameter.normal_(std=0.02)


def _words(embedding: torch.nn.Embedding) -> None:
    """Words start from N(0, 1), PyTorch's own choice, and well above positions.

    A LayerNorm behind them takes the scale away, so long vectors turn slowly: words that stand in the same places stay
    apart, and do not become one before the model has learned what tells them apart.
    """
    with torch.no_grad():
        embedding.weight[1:].normal_()  # 0 is padding


def seen_through_adaptor(images: torch.Tensor) -> torch.Tensor:
    """Every other batch [B, 3, S, S] through a random input adaptor (3x3 convolution, GELU, 1x1), new each time.

    tap_jax puts a trainable one in front of the frozen encoder, and a run starts with a random one. Pictures with a
    caption go without: through another adaptor their colours have other names.
    """
    if torch.rand(()) < 0.5:
        return images
    first, second = (torch.empty(3, 3, side, side).uniform_(-1, 1) / math.sqrt(3 * side**2) for side in (3, 1))
    return F.conv2d(F.gelu(F.conv2d(images, first, padding=1)), second)


def flava_losses(model, data: Data, batch: int) -> dict[str, torch.Tensor]:
    """FlavaForPreTraining's losses of three batches: pictures, sentences, captioned pictures.

    Half of the captions are another picture's, for the matching loss; the other losses then leave those pairs out.
    """
    losses = {}
    at = torch.randint(len(data.images), (batch,))
    hidden = torch.rand(data.codes[at].shape) < MASKED_PATCHES
    shown = seen_through_adaptor(data.images[at])
    found = model(pixel_values=shown, bool_masked_pos=hidden, mim_labels=data.codes[at], return_loss=True)
    losses["mim"] = found.loss_info.mim
    if data.sentences is not None:
        tokens = some_sentences(data, batch)
        masked, labels = masked_words(tokens, data)
        found = model(
            input_ids=tokens, input_ids_masked=masked, attention_mask=tokens != 0, mlm_labels=labels, return_loss=True
        )
        losses["mlm"] = found.loss_info.mlm
    at = torch.randint(len(data.captions), (batch,))
    belongs = torch.rand(batch) < 0.5
    belongs[0] = True  # without one, transformers counts all pairs as matching
    read = torch.where(belongs, at, torch.randint(len(data.captions), (batch,)))
    tokens, seen = trimmed(data.captions[read]), data.shown[at]
    masked, labels = masked_words(tokens, data)
    found = model(
        input_ids=tokens,
        input_ids_masked=masked,
        attention_mask=tokens != 0,
        pixel_values=data.images[seen],
        bool_masked_pos=torch.rand(data.codes[seen].shape) < MASKED_PATCHES,
        mim_labels=data.codes[seen],
        mlm_labels=labels,
        itm_labels=belongs.long(),
        return_loss=True,
    )
    for name in ("mmm_image", "mmm_text", "itm", "global_contrastive"):
        losses[name] = getattr(found.loss_info, name)
    return losses


def vilt_losses(model, data: Data, batch: int) -> dict[str, torch.Tensor]:
    """ViltForMaskedLM's loss of two batches: captioned pictures, and sentences beside an empty picture."""
    at = torch.randint(len(data.captions), (batch,))
    tokens = trimmed(data.captions[at])
    masked, labels = masked_words(tokens, data, MASKED_CAPTIONS)
    shown = data.images[data.shown[at]]
    losses = {"captions": model(masked, attention_mask=(tokens != 0).long(), pixel_values=shown, labels=labels).loss}
    if data.sentences is not None:
        tokens = some_sentences(data, batch)
        masked, labels = masked_words(tokens, data)
        losses["sentences"] = model(masked, labels=labels, **without_picture(model, tokens)).loss
    return losses


def without_picture(model, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """What lets ViLT read a text alone: one image token that the attention leaves out."""
    empty = torch.zeros(len(tokens), 1, model.config.hidden_size)
    return {
        "attention_mask": (tokens != 0).long(),
        "image_embeds": empty,
        "pixel_mask": torch.zeros(len(tokens), 1, dtype=torch.long),
    }


def train(model, data: Data, chosen: argparse.Namespace) -> list[dict[str, float]]:
    """AdamW with a linear rise and a cosine's fall, until steps or minutes are over -> losses, means of 50 steps."""
    losses_of = flava_losses if chosen.model == "flava" else vilt_losses
    optimizer = torch.optim.AdamW(model.parameters(), lr=chosen.learning_rate, weight_decay=0.01)
    started, step, done, over, lines, recent = time.monotonic(), 0, 0.0, False, [], []
    model.train()
    while not over:
        rate = min(1.0, done / 0.03 + 0.01) * (0.02 + 0.98 * (1 + math.cos(math.pi * done)) / 2)
        for group in optimizer.param_groups:
            group["lr"] = chosen.learning_rate * rate
        losses = losses_of(model, data, chosen.batch)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        recent.append([loss.item() for loss in losses.values()])
        passed = (time.monotonic() - started) / (60 * chosen.minutes)
        done = step / chosen.steps if chosen.steps else passed  # of so many steps the clock decides the end alone
        over = max(passed, done) >= 1
        if step % 50 == 0 or over:
            line = {"step": step} | dict(zip(losses, np.mean(recent, 0).round(4).tolist(), strict=True))
            lines.append(line)
            recent = []
            if step % 1000 == 0:
                print(f"{done:.0%}: {line}", flush=True)
    model.eval()
    if chosen.steps and step < chosen.steps:
        print(f"--minutes were over after {step} of {chosen.steps} steps", flush=True)
    return lines


# --- the linear probe ----------------------------------------------------------------------------------------------


def mean_over(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """[B, T, D] -> [B, D] over the tokens that are there."""
    weights = mask.float()[..., None]
    return (states * weights).sum(1) / weights.sum(1)


def flava_features(model, images: torch.Tensor | None, tokens: torch.Tensor | None) -> torch.Tensor:
    """[B, D], mean token of FLAVA's last layer: the image's, the text's, or where there are both the multimodal one."""
    inner = model.flava
    if tokens is None:
        return inner.image_model(pixel_values=images).last_hidden_state.mean(1)
    if images is None:
        return mean_over(inner.text_model(tokens, attention_mask=tokens != 0).last_hidden_state, tokens != 0)
    found = inner(input_ids=tokens, pixel_values=images, attention_mask=tokens != 0).multimodal_embeddings
    before = found.shape[1] - tokens.shape[1]
    mask = torch.cat([torch.ones(len(tokens), before, dtype=torch.bool), tokens != 0], 1)
    return mean_over(found, mask)


def vilt_features(model, images: torch.Tensor | None, tokens: torch.Tensor | None) -> torch.Tensor:
    """[B, D], mean token of ViLT's last layer; beside a picture alone stands the text [CLS] [SEP]."""
    if tokens is None:
        tokens = torch.tensor([[SPECIAL.index("[CLS]"), SPECIAL.index("[SEP]")]]).expand(len(images), 2)
    if images is None:
        found = model.vilt(tokens, **without_picture(model, tokens)).last_hidden_state[:, : tokens.shape[1]]
        return mean_over(found, tokens != 0)
    torch.manual_seed(0)  # transformers shuffles the patches
    found = model.vilt(tokens, attention_mask=(tokens != 0).long(), pixel_values=images).last_hidden_state
    rest = torch.ones(len(tokens), found.shape[1] - tokens.shape[1], dtype=torch.bool)
    return mean_over(found, torch.cat([tokens != 0, rest], 1))


def probe(model, features: Callable, tokenizer: WordPiece, chosen: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Task -> samples a class -> accuracy of a logistic regression on frozen features.

    For tasks that rebuild a picture, the variance that a ridge regression on ten times as many samples explains.

    Targets: the label; of mmlu and vqa the answer; of common_gen the verb; of the picture 8x8 pixels.
    """
    model.eval()
    scores = {}
    for name, task in TASKS.items():
        if task.classes > 10:
            task = dataclasses.replace(task, classes=10)
        examples = synthetic.load(task, "train", size=PROBE_SIZE, seed=PROBE_SEED)
        images = None if examples.images is None else pixels(examples.images, chosen.image_size)
        tokens = None
        if examples.inputs is not None:
            tokens = torch.tensor(tokenizer.encode(examples.inputs, chosen.max_text)).long()
        with torch.inference_mode():
            parts = [
                features(model, *(None if whole is None else whole[at : at + 200] for whole in (images, tokens)))
                for at in range(0, PROBE_SIZE, 200)
            ]
        x = torch.cat(parts).double().numpy()
        if task.kind == "image_generation":
            score, target = explained, pixels(examples.images, 8).flatten(1).double().numpy()
        else:
            score, target = accuracy, answers(name, examples)
        scores[name] = {str(shots): round(float(score(x, target, shots)), 4) for shots in PROBE_SHOTS}
    return scores


def answers(name: str, examples) -> np.ndarray:
    """int [N]: what is to be told apart."""
    if examples.labels is not None:
        return examples.labels
    found = examples.targets
    if name == "common_gen":
        concepts = [text.split("Concepts: ")[1].split(", ") for text in examples.inputs]
        found = [next(verb for verb in grammar.VERBS if verb in mine) for mine in concepts]
    return np.unique(found, return_inverse=True)[1]


def divided(
    x: np.ndarray, y: np.ndarray, kinds: np.ndarray, shots: int
) -> Iterator[tuple[tuple[np.ndarray, np.ndarray], ...]]:
    """PROBE_REPEATS divisions of the samples -> ((x, y) to fit, to choose the penalty, to score), x standardised.

    Args:
      kinds: int [N]; `shots` of each fit, as many others choose, all others score.
    """
    for repeat in range(PROBE_REPEATS):
        order = np.random.default_rng([PROBE_SEED, repeat]).permutation(len(x))
        nth = np.zeros(len(x), int)  # of its kind
        for kind in np.unique(kinds):
            mine = order[kinds[order] == kind]
            nth[mine] = np.arange(len(mine))
        part = np.minimum(nth // shots, 2)
        mean, deviation = x[part == 0].mean(0), x[part == 0].std(0) + 1e-8
        yield tuple(((x[part == i] - mean) / deviation, y[part == i]) for i in range(3))


def accuracy(x: np.ndarray, labels: np.ndarray, shots: int) -> float:
    """Of logistic regression."""
    scores = []
    for fit, choose, rest in divided(x, labels, labels, shots):
        models = [logistic(*fit, penalty) for penalty in PENALTIES]
        hits = lambda model, part: (model(part[0]) == part[1]).mean()  # noqa: E731
        scores.append(hits(max(models, key=lambda model: hits(model, choose)), rest))
    return np.mean(scores)


def logistic(x: np.ndarray, labels: np.ndarray, penalty: float) -> Callable[[np.ndarray], np.ndarray]:
    """Multinomial, with an L2 penalty on the weights -> a function from features to labels."""
    wanted = np.eye(labels.max() + 1)[labels]
    shape = (x.shape[1] + 1, wanted.shape[1])
    x = np.c_[x, np.ones(len(x))]
    scale = np.r_[np.full(x.shape[1] - 1, penalty), 0][:, None]

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weights = flat.reshape(shape)
        logits = x @ weights
        logits -= logsumexp(logits, axis=1, keepdims=True)
        gradient = x.T @ (np.exp(logits) - wanted) / len(x) + scale * weights
        return -(wanted * logits).sum() / len(x) + (scale * weights**2).sum() / 2, gradient.ravel()

    found = minimize(loss, np.zeros(shape).ravel(), jac=True, method="L-BFGS-B", options={"maxiter": 1000})
    weights = found.x.reshape(shape)
    return lambda x: (x @ weights[:-1] + weights[-1]).argmax(1)


def explained(x: np.ndarray, y: np.ndarray, shots: int) -> float:
    """Part of the variance that ridge regression explains; y is float [N, M]."""
    scores = []
    kinds = np.arange(len(x)) % 10  # as many samples as of ten classes
    for fit, choose, rest in divided(x, y, kinds, shots):
        models = [ridge(*fit, penalty) for penalty in PENALTIES]
        error = lambda model, part: np.square(model(part[0]) - part[1]).mean()  # noqa: E731
        best = min(models, key=lambda model: error(model, choose))
        scores.append(1 - error(best, rest) / np.square(fit[1].mean(0) - rest[1]).mean())
    return np.mean(scores)


def ridge(x: np.ndarray, y: np.ndarray, penalty: float) -> Callable[[np.ndarray], np.ndarray]:
    """Least squares with an L2 penalty on the weights -> a function from features to predictions."""
    centre = y.mean(0)
    weights = np.linalg.solve(x.T @ x / len(x) + penalty * np.eye(x.shape[1]), x.T @ (y - centre) / len(x))
    return lambda x: x @ weights + centre


# --- what is left behind -------------------------------------------------------------------------------------------


def usage(chosen: argparse.Namespace, vocab: int) -> str:
    """The fields of a run that starts from the checkpoint."""
    fields = {
        "model.weights": chosen.out,
        "data.tokenizer": chosen.out,
        "model.vocab": vocab,
        "model.width": chosen.width,
        "model.heads": chosen.heads,
        "model.mlp": chosen.mlp,
        "model.image_size": chosen.image_size,
        "model.patch": chosen.patch,
        "model.max_text": chosen.max_text,
        "model.text_positions": chosen.max_text,
    }
    if chosen.model == "flava":
        fields |= {"model.image_layers": chosen.layers, "model.text_layers": chosen.layers}
    else:
        fields |= {"model.position_grid": chosen.image_size // chosen.patch}
    return " ".join(f"--config.{name}={value}" for name, value in fields.items())


def write(chosen, model, tokenizer: WordPiece, data: Data, curves: Sequence[dict], scores: dict) -> None:
    """The checkpoint's folder; config.json comes last of what a run reads."""
    out, inner = chosen.out, model.flava if chosen.model == "flava" else model.vilt
    tokenizer.save(out)
    inner.save_pretrained(out)
    (out / "probe.json").write_text(json.dumps(scores, indent=2) + "\n")
    with open(out / "losses.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, curves[0])
        writer.writeheader()
        writer.writerows(curves)
    draw_losses(out / "losses.png", curves)
    (out / "README.md").write_text(card(chosen, inner, data, curves, scores))


def draw_losses(path: pathlib.Path, curves: Sequence[dict]) -> None:
    """One line per loss over the steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for name in list(curves[0])[1:]:
        axes.plot([line["step"] for line in curves], [line[name] for line in curves], label=name, linewidth=1)
    axes.set(xlabel="step", ylabel="loss", yscale="log")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def card(chosen, inner, data: Data, curves: Sequence[dict], scores: dict) -> str:
    """README.md of the folder."""
    of = dict.fromkeys(("fashion_mnist", "caltech256"), "explained variance of 8x8 pixels")
    of |= {"mmlu": "accuracy, the answer", "vqa": "accuracy, the answer", "common_gen": "accuracy, the verb"}
    random, trained = scores["random"], scores["trained"]
    kinds = [(str(shots), which) for shots in PROBE_SHOTS for which in (random, trained)]
    rows = "\n".join(
        f"| {name}, {of.get(name, 'accuracy')} | {' | '.join(f'{which[name][shots]:.3f}' for shots, which in kinds)} |"
        for name in trained
    )
    behind = [
        f"{', '.join(names)} ({shots})"
        for shots in map(str, PROBE_SHOTS)
        if (names := [name for name in trained if trained[name][shots] <= random[name][shots]])
    ]
    note = f"\nNo better than random weights: {'; '.join(behind)}.\n" if behind else ""
    heads = " | ".join(f"{which}, {shots} a class" for shots in PROBE_SHOTS for which in ("random", "pre-trained"))
    skipped = ("model", "out")
    options = " ".join(
        f"--{name.replace('_', '-')}={value}"
        for name, value in vars(chosen).items()
        if name not in skipped and value is not None
    )
    source = f"the folder {chosen.data.name}" if chosen.data else "drawn by tap_jax/data/corpus.py"
    rest = "" if data.sentences is None else f", {len(data.sentences):,} sentences"
    kind = type(inner).__name__
    return f"""# A small {kind}, pre-trained

{sum(p.numel() for p in inner.parameters()):,} parameters, {data.vocab} word pieces. It is for the demos of tap_jax
and for tests; it knows nothing of the world.

- **Data**: {source}: {len(data.images):,} pictures, {len(data.captions):,} captions{rest}. Drawn ones have no
  combination of shape, colour and ground, and no sentence, that a train or test set of the embedded suite has.
- **Losses**: those of transformers {transformers.__version__}; see `launch/pretrain.py`, which made it:

      OMP_NUM_THREADS={torch.get_num_threads()} python launch/pretrain.py {chosen.model} --out=DIR {options}

  {curves[-1]["step"]:,} steps. Last losses: {", ".join(f"{k} {v:.3f}" for k, v in list(curves[-1].items())[1:])}
  (`losses.csv`, `losses.png`).
- **Linear probe** on the embedded tasks, by the mean token of the frozen model's last layer: logistic regression on
  {" or ".join(map(str, PROBE_SHOTS))} samples a class, ridge regression on ten times as many where a picture is
  rebuilt.
  As many others chose the penalty, and the rest of {PROBE_SIZE:,} from the training set (seed {PROBE_SEED}) are scored;
  means of {PROBE_REPEATS} draws. No test set was read. "Random" is the same model before its first step.

| task | {heads} |
|{"---|" * (1 + 2 * len(PROBE_SHOTS))}
{rows}
{note}
`transformers.{kind}.from_pretrained(DIR)` reads it, and tap_jax as `model.weights` and `data.tokenizer`.
"""


if __name__ == "__main__":
    sys.exit(main())
