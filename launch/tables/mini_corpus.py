"""A folder for `launch/pretrain.py --data` from the training sets of a `data.root` in the hub's columns.

    python launch/tables/mini_corpus.py DATA OUT

Pictures of tiny_imagenet, cifar100, fashion_mnist and caltech without a text, those of the questions with question and
answer as their caption, and a line for every text of ag_news, common_gen and mmlu (its question and its right choice).
Labels of pictures and texts are left out. No test set is read: only train.parquet is opened.
"""

import pathlib
import sys

import pyarrow.parquet as pq

PICTURES = {"tiny_imagenet": "image", "cifar100": "img", "fashion_mnist": "image", "caltech256": "image"}
PICTURES |= {"caltech101": "image"}
QUESTIONS = ("vqa", "easy_vqa")


def main(root: pathlib.Path, out: pathlib.Path) -> None:
    """Writes NAME/NUMBER.png, .txt beside those that have a caption, and sentences.txt."""
    out.mkdir(parents=True)
    sets = {path.parent.name: pq.read_table(path).to_pylist() for path in sorted(root.glob("*/train.parquet"))}
    for name in (*PICTURES, *QUESTIONS):
        for number, row in enumerate(sets.get(name, ())):
            file = out / name / f"{number}.png"
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(row[PICTURES.get(name, "image")]["bytes"])
            if name in QUESTIONS:
                file.with_suffix(".txt").write_text(f"{row['question']} {row['multiple_choice_answer']}\n")
    lines = [row["text"] for row in sets.get("ag_news", ())]
    lines += [row["target"] for row in sets.get("common_gen", ())]
    lines += [f"{row['question']} {row['choices'][row['answer']]}" for row in sets.get("mmlu", ())]
    (out / "sentences.txt").write_text("".join(" ".join(line.split()) + "\n" for line in lines), encoding="utf-8")


if __name__ == "__main__":
    main(*map(pathlib.Path, sys.argv[1:]))
