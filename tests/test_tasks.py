"""Tasks as plain values: the paper's eight and a user's own, and one line for a declaration that is wrong."""

import re

import pytest

from tap_jax.config import config_hash, default_config, from_json, load_config, override, to_json, validate
from tap_jax.errors import UserError
from tap_jax.tasks import PAPER_TASKS, TASKS, Task, declare, declared, find_task

IMAGES = {"kind": "image_classification", "image": "scan", "label": "finding"}
NOTES = {"kind": "text_generation", "text": "Q: {question}", "answer": "{reply}"}


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    """What a test declares goes with it."""
    monkeypatch.setattr("tap_jax.tasks._DECLARED", set())
    before = dict(TASKS)
    yield
    TASKS.clear()
    TASKS.update(before)


def test_templates_are_table_23():
    record = {
        "question": "Is it?",
        "subject": "professional_law",
        "choices": ["no", "yes", "maybe", "never"],
        "answer": 1,
        "multiple_choice_answer": "blue",
        "concepts": ["dog", "run"],
        "target": "A dog runs.",
    }
    assert find_task("mmlu").source.written(record) == (
        "The following is a multiple-choice question about professional law. Choose the correct answer from the "
        "options below. Question: Is it? Options:\nA. no\nB. yes\nC. maybe\nD. never",
        "Correct answer on professional law: B. yes",
    )
    assert find_task("vqa").source.written(record) == (
        "Answer the question based on the image. Question: Is it?",
        "Answer: blue",
    )
    assert find_task("common_gen").source.written(record) == (
        "Generate an appropriate description from the concepts below. Concepts: dog, run",
        "Description: A dog runs.",
    )


def test_a_declaration_becomes_a_task():
    task = declared("xray", IMAGES | {"class_names": ("normal", "pneumonia"), "domains": ("lung",)})
    assert task == Task(
        "xray", "image_classification", ("image",), ("lung",), "xray", 2, ("normal", "pneumonia"), task.source
    )
    assert task.source.needed == ("scan", "finding")
    assert declared("notes", NOTES | {"image": "photo"}).modalities == ("image", "text")
    assert declared("notes", NOTES).head == "text_generation"
    assert declared("notes", NOTES | {"domain_column": "ward", "domains": ("a", "b")}).streams[1].name == "notes/b"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({**IMAGES, "labl": "x"}, "tasks.own.labl: unknown field; did you mean 'label'? a task has: kind, image"),
        ({**IMAGES, "kind": "regression"}, "tasks.own.kind: unknown 'regression'; use one of image_classification"),
        ({**IMAGES, "image": ""}, "tasks.own.image: missing; image_classification needs the name of that column"),
        ({**IMAGES, "label": ""}, "tasks.own.label: missing"),
        ({**IMAGES, "classes": "3"}, "tasks.own.classes: '3' is of type str; use a int"),
        ({**IMAGES, "classes": -1}, "tasks.own.classes: -1; use at least 1, or 0 for those of the data"),
        ({**IMAGES, "class_names": (1.5,)}, "tasks.own.class_names: (1.5,); use str or int entries"),
        ({**IMAGES, "class_names": ("a", "a")}, "tasks.own.class_names: an entry is there twice; drop one"),
        ({**IMAGES, "class_names": ("a",), "classes": 2}, "tasks.own.classes: 2, but class_names has 1; drop one"),
        ({**IMAGES, "answer": "reply"}, "tasks.own.answer: goes with text_generation, not image_classification"),
        ({**NOTES, "label": "x"}, "tasks.own.label: goes with classification, not text_generation; drop it"),
        ({**NOTES, "answer": ""}, "tasks.own.answer: missing"),
        ({**NOTES, "text": ""}, "tasks.own.text: missing"),
        ({**NOTES, "text": "Q: {question"}, "tasks.own.text: expected '}' before end of string"),
        ({**NOTES, "domains": ("a", "b")}, "tasks.own.domain_column: missing; name the column that says which of a, b"),
        ({**NOTES, "domain_values": ("a",)}, "tasks.own.domain_values: goes with domain_column"),
        (
            {**NOTES, "domains": ("a",), "domain_column": "c", "domain_values": ("x", "y")},
            "tasks.own.domain_values: 2 for 1 domains; give one for each",
        ),
        ({**NOTES, "domains": ("a.b",)}, "tasks.own.domains: 'a.b'; blocks are named by it, so use no '.' and no '/'"),
        ({**NOTES, "head": "a/b"}, "tasks.own.head: 'a/b'; blocks are named by it"),
    ],
)
def test_a_declaration_that_is_wrong(fields, message):
    config = default_config()
    config.tasks = {"own": fields}
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        validate(config)
    assert "\n" not in str(caught.value)


def test_names():
    with pytest.raises(UserError, match="tasks: a task named 'a task'; use letters, digits, _ and -"):
        declare({"a task": IMAGES})
    with pytest.raises(UserError, match="tasks: a task named 'a.b'; use letters, digits, _ and -"):
        declare({"a.b": IMAGES})
    with pytest.raises(UserError, match="tasks.mmlu: there is a task of that name; choose another one"):
        declare({"mmlu": NOTES})
    declare({"mmlu": PAPER_TASKS["mmlu"]})  # the same
    config = default_config()
    config.tasks = {"own": "image_classification"}
    with pytest.raises(UserError, match="tasks.own: 'image_classification'; use a dict"):
        validate(config)


def test_what_is_declared_again_is_what_it_is_now():
    for classes in (3, 4):
        declare({"xray": IMAGES | {"classes": classes}})
        assert find_task("xray").classes == classes


def test_a_config_keeps_its_tasks_and_can_change_their_fields(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(f"""
from tap_jax.config import default_config
def get_config(argument=""):
    config = default_config()
    config.tasks = {{"xray": {IMAGES | {"class_names": ["normal", "ill"]}!r}}}
    config.federation.update(table="custom", rows=({{"xray": 1.0}},), groups=1)
    config.cohort_size = 1
    return config
""")
    config = load_config(file, {"tasks.xray.path": "scans", "tasks.xray.classes": 2})
    assert config.tasks.xray.path == "scans" and config.tasks.xray.class_names == ("normal", "ill")
    TASKS.pop("xray")
    again = from_json(to_json(config))
    assert find_task("xray").classes == 2, "reading a run's configuration makes its tasks known"
    assert config_hash(again) == config_hash(config)
    assert config_hash(config) != config_hash(load_config(file))
    with pytest.raises(UserError, match="tasks.xray.pth: unknown field; did you mean 'path'"):
        load_config(file, {"tasks.xray.pth": "scans"})
    with pytest.raises(UserError, match="tasks.yray.kind: unknown ''; use one of"):
        load_config(file, {"tasks.yray.path": "scans"})
    with pytest.raises(UserError, match="tasks.xray.classes: 'two' is of type str; use a int"):
        load_config(file, {"tasks.xray.classes": "two"})


def test_a_loaded_configuration_takes_a_new_task():
    """It is locked against fields that do not exist; a task's name is the user's own."""
    config = override(load_config("demo"), {"tasks": {"xray": IMAGES}})
    assert config.tasks.xray.label == "finding" and config.is_locked and config.tasks.is_locked
    validate(config)
