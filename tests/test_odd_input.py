"""Odd inputs, as people have them: rows, files, checkpoints, environments. A table: what goes in, what must come out.

What comes out is a value, or one line that says what is wrong. Where others met the same input, their report is cited.
"""

import dataclasses
import functools
import io
import json
import os
import re
import struct
import subprocess
import sys
import unittest.mock
import zlib
from collections.abc import Callable

import jax
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file

from tap_jax.cli.startup import start_jax
from tap_jax.config import load_config
from tap_jax.data import loading, values
from tap_jax.data.federated import _cut_notes
from tap_jax.data.images import to_rgb64
from tap_jax.data.text import TaskArrays, encode_examples, load_tokenizer
from tap_jax.errors import UserError
from tap_jax.experiment import build
from tap_jax.models import checkpoints
from tap_jax.models.layers import ModelConfig
from tap_jax.models.server_model import ServerModel
from tap_jax.tasks import find_task
from tests.models import huggingface

WHITE, BLACK, GREY = (255, 255, 255), (0, 0, 0), (128, 128, 128)


@dataclasses.dataclass(frozen=True)
class Case:
    """One odd input.

    Attributes:
      name: of the test.
      seen: where others met it, "owner/name#number"; "" where nobody is cited.
      make: (folder) -> what comes out of it.
      out: what must; a compiled pattern: the whole line of the error.
    """

    name: str
    seen: str
    make: Callable
    out: object


# --- images ---------------------------------------------------------------------------------------------------------


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def color(image, at=(32, 32)):
    """What a picture is converted to, at one place."""
    return tuple(map(int, to_rgb64(image, where="t/train row 3")[at]))


def picture(name, seen, image, out, at=(32, 32)):
    return Case(name, seen, lambda folder: color(image(), at), out)


def unreadable(name, seen, image, reason):
    pattern = (
        f"t/train row 3, column 'image': unreadable image.* \\({reason}\\); mend or remove that row, or set .*skip"
    )
    return Case(name, seen, lambda folder: color(image()), re.compile(pattern))


def deep(value, kind, dtype="<u2"):
    return encoded(Image.fromarray(np.full((8, 8), value, dtype)), kind)


def with_exif(orientation, damage=None):
    """Red above, blue below, in a JPEG that says how it is to be turned."""
    image = Image.new("RGB", (64, 64), "blue")
    image.paste((255, 0, 0), (0, 0, 64, 32))
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(image, "JPEG", quality=95, exif=damage or exif.tobytes())


def is_red(image, at):
    red, _, blue = color(image, at)
    return red > 200 and blue < 50


def palette_with_hole():
    image = Image.new("P", (8, 8), 0)
    image.putpalette([0, 0, 0, 255, 0, 0])
    return encoded(image, transparency=0)


def animated():
    frames = [Image.new("RGB", (8, 8), name) for name in ("white", "black")]
    return encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])


def bomb():
    """A PNG that says that it has 900 million pixels."""
    data = bytearray(encoded(Image.new("L", (8, 8))))
    data[16:24] = struct.pack(">II", 30_000, 30_000)
    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    return bytes(data)


def noise():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))


IMAGES = [
    picture("16-bit PNG, white", "python-pillow/Pillow#2574", lambda: deep(65535, "PNG"), WHITE),
    picture("16-bit PNG, grey", "python-pillow/Pillow#3011", lambda: deep(128 * 257, "PNG"), GREY),
    picture("16-bit TIFF", "python-pillow/Pillow#1108", lambda: deep(128 * 257, "TIFF"), GREY),
    picture("big-endian 16 bits", "python-pillow/Pillow#5991", lambda: deep(128 * 257, "TIFF", ">u2"), GREY),
    unreadable(
        "32-bit integers", "python-pillow/Pillow#2574", lambda: deep(70000, "TIFF", "<i4"), "mode I, .*; store 8 or .*"
    ),
    unreadable("floats", "python-pillow/Pillow#5991", lambda: deep(0.5, "TIFF", "<f4"), "mode F, .*; store 8 or 16.*"),
    Case(
        "EXIF: upside down", "huggingface/datasets#6252", lambda folder: is_red(with_exif(3), (60, 32)), True
    ),
    Case("EXIF: lying", "huggingface/datasets#6739", lambda folder: is_red(with_exif(6), (32, 60)), True),
    Case("EXIF: of no such turn", "", lambda folder: is_red(with_exif(77), (4, 32)), True),
    Case(
        "damaged EXIF", "huggingface/datasets#7668",
        lambda folder: is_red(with_exif(1, b"Exif\0\0MM\0*\xff\xff\xff\xff\xa8"), (4, 32)), True,
    ),
    Case(
        "EXIF that ends after its header", "python-pillow/Pillow#6124",
        lambda folder: is_red(with_exif(1, b"Exif\0\0"), (4, 32)), True,
    ),
    picture("transparent pixels", "", lambda: encoded(Image.new("RGBA", (8, 8), (0, 0, 0, 0))), WHITE),
    picture("half transparent", "", lambda: encoded(Image.new("RGBA", (8, 8), (0, 0, 0, 127))), GREY),
    picture("grey with alpha", "", lambda: encoded(Image.new("LA", (8, 8), (0, 0))), WHITE),
    picture("a palette with a transparent color", "", palette_with_hole, WHITE),
    picture("a transparent RGB color", "", lambda: encoded(Image.new("RGB", (8, 8)), transparency=BLACK), WHITE),
    picture("CMYK", "", lambda: encoded(Image.new("CMYK", (8, 8), (0, 0, 0, 0)), "JPEG", quality=100), WHITE),
    picture("1 bit", "", lambda: encoded(Image.new("1", (8, 8), 1)), WHITE),
    picture("animated: the first frame", "", animated, WHITE),
    unreadable("truncated", "huggingface/datasets#7612", lambda: encoded(noise())[:900], ".*truncated.*"),
    unreadable("a decompression bomb", "", bomb, ".*decompression bomb.*"),
    unreadable("no pixels", "", lambda: Image.new("RGB", (0, 5)), "no pixels"),
    unreadable("null", "huggingface/datasets#7612", lambda: None, "null"),
    unreadable("bytes and path null", "", lambda: {"bytes": None, "path": None}, "null"),
    unreadable("a path that is not there", "", lambda: {"bytes": None, "path": "/nowhere.png"}, ".*No such file.*"),
]  # fmt: skip

# --- rows -----------------------------------------------------------------------------------------------------------


def read(folder, task, columns, **kwargs):
    """The training split of a parquet folder."""
    (folder / task).mkdir()
    for split in ("train", "test"):
        pyarrow.parquet.write_table(pyarrow.table(columns), folder / task / f"{split}.parquet")
    return loading.load(find_task(task), "train", root=str(folder), **kwargs)


def news(text, label, what="labels"):
    """What two rows of ag_news become."""

    def make(folder):
        found = getattr(read(folder, "ag_news", {"text": text, "label": label}), what)
        return found.tolist() if isinstance(found, np.ndarray) else found

    return make


def refused_row(task, row, column, wrong):
    return re.compile(f"{task}/train row {row}, column '{column}': {wrong}; .*mend or remove that row, or set .*")


def mmlu(**changes):
    row = {"question": "q", "subject": "professional_law", "choices": ["a", "b"], "answer": 0} | changes
    return lambda folder: read(folder, "mmlu", {name: [entry] for name, entry in row.items()}).inputs[0]


TEXTS = ["a", "b"]
NO_TEXT = "null where a text is expected"
ROWS = [
    Case("label 1.5", "", news(TEXTS, [1.0, 1.5]), refused_row("ag_news", 1, "label", "label 1.5 is not a whole .*")),
    Case("labels as whole floats", "", news(TEXTS, [1.0, 3.0]), [1, 3]),
    Case("labels as bools", "", news(TEXTS, [True, False]), [1, 0]),
    Case("null label", "", news(TEXTS, [None, 1]), refused_row("ag_news", 0, "label", "label is null")),
    Case("label NaN", "", news(TEXTS, [1.0, float("nan")]), refused_row("ag_news", 1, "label", "label is null")),
    Case("label infinite", "", news(TEXTS, [1.0, float("inf")]), refused_row("ag_news", 1, "label", "label inf is .*")),
    Case(
        "label -1: hidden", "huggingface/datasets#245", news(TEXTS, [0, -1]),
        refused_row("ag_news", 1, "label", "label -1 is not in 0..3, as of test sets whose labels are hidden"),
    ),
    Case("label too large", "", news(TEXTS, [0, 4]), refused_row("ag_news", 1, "label", "label 4 is not in 0..3")),
    Case(
        "label that int32 does not hold", "", news(TEXTS, [0, 2**40]),
        refused_row("ag_news", 1, "label", "label 1099511627776 is not in 0..3"),
    ),
    Case(
        "labels as texts", "", news(TEXTS, ["sports", "world"]),
        refused_row("ag_news", 0, "label", "label 'sports' is not a number in 0..3"),
    ),
    Case(
        "labels as lists", "", news(TEXTS, [[1], [2]]),
        refused_row("ag_news", 0, "label", "a list where a label is expected"),
    ),
    Case("null text", "neuml/txtai#607", news(["a", None], [0, 1]), refused_row("ag_news", 1, "text", NO_TEXT)),
    Case(
        "a text column of nulls", "apache/texera#7549", news([None, None], [0, 1]),
        refused_row("ag_news", 0, "text", NO_TEXT),
    ),
    Case("empty texts", "", news(["", " "], [0, 1], "inputs"), ("", " ")),
    Case("numbers as texts", "", news([7, 12], [0, 1], "inputs"), ("7", "12")),
    Case(
        "bytes as texts", "", news([b"a", b"b"], [0, 1], "inputs"),
        refused_row("ag_news", 0, "text", r"b'a' \(bytes\) where a text is expected"),
    ),
    Case(
        "a lone surrogate", "huggingface/transformers#43459",
        lambda folder: values.text("ab\ud800", where="ag_news/train row 0", column="text"),
        refused_row("ag_news", 0, "text", "a lone surrogate at character 2, .*"),
    ),
    Case("null question", "", mmlu(question=None), refused_row("mmlu", 0, "question", NO_TEXT)),
    Case("a null option", "", mmlu(choices=["a", None]), refused_row("mmlu", 0, "choices", NO_TEXT)),
    Case("no options", "", mmlu(choices=[]), refused_row("mmlu", 0, "choices", "0 choices; 1 to 10 have letters")),
    Case("eleven options", "", mmlu(choices=TEXTS * 6), refused_row("mmlu", 0, "choices", "12 choices; 1 to 10 .*")),
    Case("answer as a letter", "", mmlu(answer="A"), refused_row("mmlu", 0, "answer", "answer 'A' is not a number .*")),
    Case("answer -1", "", mmlu(answer=-1), refused_row("mmlu", 0, "answer", "answer -1 of 2 choices")),
    Case(
        "another subject", "", mmlu(subject="anatomy"),
        refused_row("mmlu", 0, "subject", "subject anatomy has no domain among law, medicine, moral"),
    ),
]  # fmt: skip


def skipped(folder):
    """Two of four rows are used; the cache keeps the count."""
    columns = {"text": ["a", None, "c", "d"], "label": [0, 1, 2, 9]}
    kwargs = {"on_bad_row": "skip", "cache_dir": str(folder / "cache")}
    found = read(folder, "ag_news", columns, **kwargs)
    again = loading.load(find_task("ag_news"), "train", root=str(folder), **kwargs)
    return found.inputs, found.labels.tolist(), found.notes, again.notes == found.notes


def skipped_images(folder):
    image = {"bytes": encoded(Image.new("L", (8, 8), 9)), "path": None}
    columns = {"img": [{"bytes": b"x", "path": None}, image, None], "fine_label": [0, 5, 2]}
    found = read(folder, "cifar100", columns, on_bad_row="skip")
    return found.labels.tolist(), found.images[:, 0, 0, 0].tolist(), found.notes[0].partition(":")[2].split(";")[0]


def skipped_references(folder):
    (folder / "common_gen").mkdir()
    columns = {"concept_set_idx": [1, 1, 2, None], "concepts": [["a"]] * 4, "target": ["x", None, None, "y"]}
    for split in ("train", "test"):
        pyarrow.parquet.write_table(pyarrow.table(columns), folder / "common_gen" / f"{split}.parquet")
    found = loading.load(find_task("common_gen"), "test", root=str(folder), on_bad_row="skip")
    return found.references, found.notes[0].split(";")[0]


SKIPPED = [
    Case(
        "bad rows that are skipped", "", skipped,
        (
            ("a", "c"), [0, 2],
            (
                "data: ag_news/train: 2 rows skipped as data.on_bad_row says; the first: ag_news/train row 1, column "
                "'text': null where a text is expected",
            ),
            True,
        ),
    ),
    Case(
        "bad images that are skipped", "", skipped_images,
        ([5], [9], " cifar100/train: 2 rows skipped as data.on_bad_row says"),
    ),
    Case(
        "bad references that are skipped", "", skipped_references,
        ((("Description: x",),), "data: common_gen/test: 3 rows skipped as data.on_bad_row says"),
    ),
    Case(
        "no row that can be used", "",
        lambda folder: read(folder, "ag_news", {"text": TEXTS, "label": [7, 8]}, on_bad_row="skip"),
        re.compile("data.root: ag_news/train has no row that can be used; the first: ag_news/train row 0, .*"),
    ),
]  # fmt: skip


# --- texts that are too long ----------------------------------------------------------------------------------------


def long_question(words, options, **kwargs):
    """(what the model reads of a question of so many words, with so many words of options; what was cut)."""

    def make(folder):
        question = " ".join(f"q{i}" for i in range(words))
        row = {"question": question, "subject": "professional_law", "choices": ["x"] * options, "answer": 0}
        found = read(folder, "mmlu", {name: [entry] for name, entry in row.items()})
        pieces = load_tokenizer("train", [*found.inputs, *found.targets], vocab_size=2000)
        arrays = encode_examples(found, pieces, max_text=60, max_answer=8, **kwargs)
        (shown,), (answer,) = pieces.decode(arrays.tokens), arrays.answers.tolist()
        return re.sub("^the following .* question : ", "... ", shown), arrays.cut, answer[-1] == pieces.sep_id

    return make


# 60 pieces less [CLS] and [SEP]; 23 before the question, "options :" and 3 for each option after it.
LONG = [
    Case(
        "a question that fits", "",
        long_question(20, 3), (f"... {' '.join(f'q{i}' for i in range(20))} options : a . x b . x c . x", (0, 1), True),
    ),
    Case(
        "a question that is too long: its options stay", "",
        long_question(200, 4),
        (
            f"... {' '.join(f'q{i}' for i in (*range(11), *range(190, 200)))} options : a . x b . x c . x d . x",
            (1, 1), True,
        ),
    ),
    Case(
        "a question that is too long: cut as a tokenizer does", "",
        long_question(200, 4, too_long="end"), (f"... {' '.join(f'q{i}' for i in range(35))}", (1, 1), True),
    ),
    Case(
        "notes of what is cut", "",
        lambda folder: _cut_notes(
            find_task("mmlu"), *(TaskArrays(np.zeros(n, np.int32), cut=cut) for n, cut in ((8, (2, 0)), (4, (1, 0)))),
            256, 64, "middle",
        ),
        [
            "data: mmlu: 2 of 8 (25 %) to train on, 1 of 4 (25 %) to test on have inputs longer than model.max_text ="
            " 256: the middle of the question or text in them is cut (data.too_long)"
        ],
    ),
]  # fmt: skip

# --- checkpoints in the wild ----------------------------------------------------------------------------------------

SIZES = ModelConfig(
    name="vilt", width=12, heads=3, mlp=20, image_size=40, patch=8, vocab=37, max_text=11, text_positions=13,
    backbone_layers=(1, 2), text_heads=2, text_cond_heads=4, text_inner=10, max_answer=6, position_grid=3,
)  # fmt: skip
WORDS, NORM = "embeddings.text_embeddings.word_embeddings.weight", "embeddings.text_embeddings.LayerNorm"


@functools.cache
def vilt():
    """The state of a random ViltModel."""
    config = huggingface.vilt_config(SIZES, layers=4)
    model = huggingface.randomise(transformers.ViltModel(config), seed=1)
    return config, {name: value.contiguous() for name, value in model.state_dict().items()}


def checkpoint(edit=None, *, write=save_file, file="model.safetensors", config=None):
    """(is it the model that was saved?, of which type) of an edited checkpoint, converted."""

    def make(folder):
        kind, state = vilt()
        kind.save_pretrained(folder)
        if config:
            values = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps(values | config))
        state = dict(state)
        state = (edit and edit(state)) or state
        write(state, folder / file)
        found = checkpoints.load(str(folder), ServerModel(SIZES, (find_task("ag_news"), find_task("fashion_mnist"))))
        words, scale = found.frozen["encoder/text"]["words"], found.frozen["encoder/text"]["embedding_norm"]["scale"]
        right = [
            np.allclose(mine, vilt()[1][name].numpy(), rtol=1e-2, atol=0)
            for mine, name in ((words, WORDS), (scale, f"{NORM}.weight"))
        ]
        return all(right), words.dtype.name

    return make


def renamed(change):
    return lambda state: {change(name): value for name, value in state.items()}


def cast(dtype):
    return lambda state: {
        name: value.to(dtype) if value.is_floating_point() else value for name, value in state.items()
    }


def old_norms(name):
    return re.sub("LayerNorm.bias", "LayerNorm.beta", re.sub("LayerNorm.weight", "LayerNorm.gamma", name))


def with_head(state):
    return state | {"classifier.0.weight": torch.ones(3, 12), "classifier.1.bias": torch.ones(3)}


def with_adapter(state):
    """As PEFT names the weights of a model that it has wrapped."""
    layer = re.compile(r"(query|value)\.(weight|bias)$")
    return {"base_model.model." + layer.sub(r"\1.base_layer.\2", name): value for name, value in state.items()}


def adapter_alone(folder):
    """What `PeftModel.save_pretrained` writes, beside the model's own config.json."""
    vilt()[0].save_pretrained(folder)
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    save_file({"base_model.model.query.lora_A.weight": torch.ones(2, 12)}, folder / "adapter_model.safetensors")
    checkpoints.load(str(folder), ServerModel(SIZES, (find_task("ag_news"),)))


def tied(state, path):
    """One of two tied weights is stored, under the head's name."""
    state = {"mlm_score.decoder.weight" if name == WORDS else name: value for name, value in state.items()}
    save_file(state, path, metadata={"format": "pt", WORDS: "mlm_score.decoder.weight"})


def without_a_shard(state, path):
    first, second = (f"model-0000{n}-of-00002.safetensors" for n in (1, 2))
    names = {name: (first, second)[n % 2] for n, name in enumerate(state)}
    save_file({name: value for name, value in state.items() if names[name] == first}, path.with_name(first))
    path.with_name("model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def truncated(state, path):
    save_file(state, path)
    path.write_bytes(path.read_bytes()[:-50])


def pointer(state, path):
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def pickled(state, path):
    torch.save(state, path)


def dropped(name):
    return lambda state: {key: value for key, value in state.items() if key != name}


BIN = {"write": pickled, "file": "pytorch_model.bin"}
CHECKPOINTS = [
    Case("fp16", "", checkpoint(cast(torch.float16)), (True, "float32")),
    Case("bf16", "", checkpoint(cast(torch.bfloat16)), (True, "float32")),
    Case("bf16, pickled", "", checkpoint(cast(torch.bfloat16), **BIN), (True, "float32")),
    Case("float64", "", checkpoint(cast(torch.float64)), re.compile("model.weights: .* is float64, not float32")),
    Case(
        "module. before every name", "pytorch/pytorch#9176", checkpoint(renamed(lambda name: f"module.{name}"), **BIN),
        (True, "float32"),
    ),
    Case(
        "module. and vilt. before every name", "pytorch/pytorch#3805",
        checkpoint(renamed(lambda name: f"module.vilt.{name}")), (True, "float32"),
    ),
    Case("_orig_mod. before every name", "", checkpoint(renamed(lambda name: f"_orig_mod.{name}")), (True, "float32")),
    Case(
        "both, one behind the other", "huggingface/pytorch-image-models#2003",
        checkpoint(renamed(lambda name: f"_orig_mod.module.{name}")), (True, "float32"),
    ),
    Case(
        "a PEFT adapter still in the model", "huggingface/peft#3000", checkpoint(with_adapter),
        re.compile("model.weights: 'base_model.* in .* is of a model with a PEFT adapter; merge it .*"),
    ),
    Case(
        "a PEFT adapter alone", "huggingface/peft#1323", adapter_alone,
        re.compile("model.weights: .* is a PEFT adapter without its model; merge both .*"),
    ),
    Case("gamma and beta", "huggingface/transformers#11809", checkpoint(renamed(old_norms)), (True, "float32")),
    Case("heads of another class", "", checkpoint(with_head), (True, "float32")),
    Case(
        "an unknown weight", "", checkpoint(lambda state: state | {"tower.weight": torch.ones(3)}),
        re.compile("model.weights: 'tower.weight' in .* is not a weight of vilt"),
    ),
    Case("tied weights, stored once", "keras-team/keras-hub#3075", checkpoint(write=tied), (True, "float32")),
    Case(
        "a weight left out", "huggingface/transformers#38870", checkpoint(dropped(WORDS)),
        re.compile(f"model.weights: '{WORDS}' is missing in .*; use a whole checkpoint"),
    ),
    Case(
        "a shard that is missing", "huggingface/transformers#16343", checkpoint(write=without_a_shard),
        re.compile("model.weights: .*model-00002-of-00002.safetensors is missing; download it again"),
    ),
    Case(
        "a truncated file", "lyogavin/airllm#93", checkpoint(write=truncated),
        re.compile("model.weights: .*model.safetensors is damaged or incomplete .*; download it again"),
    ),
    Case(
        "a pointer of Git LFS", "turboderp/exllama#242", checkpoint(write=pointer),
        re.compile("model.weights: .* is a pointer of Git LFS and not the file; call `git lfs pull` there"),
    ),
    Case(
        "a whole model, pickled", "", checkpoint(lambda state: {"model": Code()}, **BIN),
        re.compile("model.weights: .* holds more than tensors and could run code when loaded, .*; use .* safetensors"),
    ),
    Case(
        "another model's config", "", checkpoint(config={"model_type": "bert"}),
        re.compile("model.weights: .* is a checkpoint of 'bert'; use one of flava, vilt"),
    ),
    Case(
        "another vocabulary", "", checkpoint(config={"vocab_size": 41}),
        re.compile("model.vocab: 37, but the checkpoint has 41 .*; set model.vocab=41, or .*; random ones: .*"),
    ),
    Case(
        "a vocabulary that the config denies", "",
        checkpoint(lambda state: state | {WORDS: torch.ones(41, 12)}),
        re.compile(rf"model.weights: '{WORDS}' in .* has shape \(41, 12\), not \(37, 12\)"),
    ),
]  # fmt: skip


class Code:
    """What a pickled model is; nothing that a state holds."""


# --- environments: another process, which ends before work begins ---------------------------------------------------


def command(*, workdir="run", **environment):
    """(status, lines of stderr) of a training, and whether it left anything."""

    def make(folder):
        config = ["--config=demo", "--config.compilation_cache=off", f"--workdir={folder}/{workdir}"]
        done = subprocess.run(
            [sys.executable, "-m", "tap_jax", "train", *config],
            env=os.environ | environment,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
        assert not any(folder.iterdir())
        assert done.returncode == 2
        raise UserError(done.stderr.rstrip("\n"))

    return make


def wide_floats(folder):
    """A process in which 64 bits are on: the command line turns them off, and Python's `build` says so."""
    jax.config.update("jax_enable_x64", True)
    try:
        return build(load_config("demo"))
    finally:
        jax.config.update("jax_enable_x64", False)


def wide_floats_of_the_command_line(folder):
    jax.config.update("jax_enable_x64", True)
    try:
        with unittest.mock.patch.dict(os.environ, JAX_NUM_CPU_DEVICES="8"):  # the tests' own devices stay
            start_jax(load_config("demo", {"compilation_cache": "off"}))
        return bool(jax.config.jax_enable_x64)
    finally:
        jax.config.update("jax_enable_x64", False)


def no_cache(folder):
    """A cache folder that cannot be made: the data are read all the same."""
    (folder / "file").write_text("")
    return read(folder, "ag_news", {"text": TEXTS, "label": [0, 1]}, cache_dir=str(folder / "file" / "cache")).inputs


ENVIRONMENTS = [
    Case(
        "JAX_PLATFORMS of a device that is not there", "jax-ml/jax#28376", command(JAX_PLATFORMS="cuda"),
        re.compile("tap-jax: JAX_PLATFORMS: 'cuda' has no device on this machine.*; unset it or use JAX_PLATFORMS=cpu"),
    ),
    Case(
        "a workdir with letters that the locale lacks", "",
        command(workdir="\u00e9", LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0"),
        re.compile(r"tap-jax: workdir: the locale has no letters for .*; set LC_ALL=C.UTF-8 or name another"),
    ),
    Case(
        "64 bits, in Python", "", wide_floats,
        re.compile("jax_enable_x64: is on, and everything here is float32 or bfloat16; set it to False"),
    ),
    Case("64 bits, JAX_ENABLE_X64=1", "", wide_floats_of_the_command_line, False),
    Case("a cache folder that cannot be made", "", no_cache, ("a", "b")),
]  # fmt: skip


@pytest.mark.parametrize(
    "case", [*IMAGES, *ROWS, *SKIPPED, *LONG, *CHECKPOINTS, *ENVIRONMENTS], ids=lambda case: case.name
)
def test_odd_input(case, tmp_path):
    if not isinstance(case.out, re.Pattern):
        assert case.make(tmp_path) == case.out
        return
    with pytest.raises(UserError) as caught:
        case.make(tmp_path)
    assert re.fullmatch(case.out, str(caught.value)), str(caught.value)
