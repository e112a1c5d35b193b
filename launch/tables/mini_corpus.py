"""A folder for `launch/pretrain.py --data` from the training sets of a `data.root`.

    python launch/tables/mini_corpus.py DATA OUT

Every picture, that of a question with question and answer as its caption, and a line for every text of ag_news,
common_gen and mmlu (its question and its right choice). Labels of pictures and texts are left out, and no test set is
read.
"""

import pathlib
import sys

from tap_jax.data import places
from tap_jax.tasks import PAPER_TASKS, find_task


def main(root: str, out: pathlib.Path) -> None:
    """Writes TASK/NUMBER.png, .txt beside those that have a caption, and sentences.txt."""
    out.mkdir(parents=True)
    sentences = []
    for task in map(find_task, PAPER_TASKS):
        rows = places.rows_of(task, "train", root=root)
        columns = rows.columns([name for name in task.source.needed if name != task.source.image])
        if task.name == "mmlu":
            chosen = zip(columns["question"], columns["choices"], columns["answer"], strict=True)
            texts = [f"{question} {choices[answer]}" for question, choices, answer in chosen]
        elif task.name == "vqa":
            texts = list(map(" ".join, zip(columns["question"], columns["multiple_choice_answer"], strict=True)))
        else:
            texts = {"ag_news": columns.get("text"), "common_gen": columns.get("target")}.get(task.name) or []
        if not task.source.image:
            sentences += [" ".join(text.split()) + "\n" for text in texts]
            continue
        (out / task.name).mkdir()
        for number, picture in enumerate(rows.entries(task.source.image, range(rows.count))):
            file = out / task.name / f"{number}.png"
            file.write_bytes(picture["bytes"])
            if texts:
                file.with_suffix(".txt").write_text(texts[number] + "\n", encoding="utf-8")
    (out / "sentences.txt").write_text("".join(sentences), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], pathlib.Path(sys.argv[2]))
