"""The templates of Table 23, cut where the answer starts.

The model reads the first part and must write the second, from "Correct answer on ...", "Answer:" or "Description:" on.
"""

from collections.abc import Callable, Mapping

LETTERS = "ABCDEFGHIJ"


def mmlu_text(record: Mapping) -> tuple[str, str]:
    """{question, subject, choices, answer} -> (input, target), Table 23; options are lines "A. ..."."""
    subject = record["subject"].replace("_", " ")
    options = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, record["choices"], strict=False)]
    shown = "\n".join(options)
    return (
        f"The following is a multiple-choice question about {subject}. Choose the correct answer from the options "
        f"below. Question: {record['question']} Options:\n{shown}",
        f"Correct answer on {subject}: {options[record['answer']]}",
    )


def vqa_text(record: Mapping) -> tuple[str, str]:
    """{question, multiple_choice_answer} -> (input, target), Table 23."""
    question = record["question"]
    return (
        f"Answer the question based on the image. Question: {question}",
        f"Answer: {record['multiple_choice_answer']}",
    )


def common_gen_text(record: Mapping) -> tuple[str, str]:
    """{concepts, target} -> (input, target), Table 23; concepts are joined by commas."""
    concepts = ", ".join(record["concepts"])
    return (
        f"Generate an appropriate description from the concepts below. Concepts: {concepts}",
        f"Description: {record['target']}",
    )


TEMPLATES: dict[str, Callable[[Mapping], tuple[str, str]]] = {
    "mmlu": mmlu_text,
    "vqa": vqa_text,
    "common_gen": common_gen_text,
}
