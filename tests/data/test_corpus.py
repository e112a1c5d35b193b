"""What models are pre-trained on: as its captions say, and in no combination that a task draws, whatever its seed."""

import dataclasses
import re

import numpy as np
import pytest

from tap_jax.data import corpus, drawing, grammar, synthetic
from tap_jax.tasks import find_task

SEEDS = (41, 42, 1009)
CHROMATIC = set(drawing.COLORS) - {"white"}
RNG = lambda: np.random.default_rng([0, corpus.STREAM])  # noqa: E731


@pytest.fixture(scope="module")
def drawn():
    return corpus.draw_pictures(RNG(), 3000)


def task_examples(name, classes=0, size=300):
    task = find_task(name)
    task = dataclasses.replace(task, classes=classes) if classes else task
    for seed in SEEDS:
        for split in synthetic.SPLITS:
            yield synthetic.load(task, split, size=size, seed=seed)


class Spy:
    """Notes what the drawing functions are asked for."""

    def __init__(self, monkeypatch):
        self.centers, self.textures, self.bases, self.objects = [], [], [], 0
        grid, coverage, texture, blend = drawing.grid, drawing.coverage, drawing.texture, drawing.blend

        def spied_grid(centers, *args):
            self.centers.append(centers)
            return grid(centers, *args)

        def spied_coverage(*args):
            self.objects += 1
            return coverage(*args)

        def spied_texture(kinds, *args):
            self.textures.append(kinds)
            return texture(kinds, *args)

        def spied_blend(base, *args):
            self.bases.append(base)
            return blend(base, *args)

        for name in ("grid", "coverage", "texture", "blend"):
            monkeypatch.setattr(drawing, name, locals()[f"spied_{name}"])


# --- pictures: first what the tasks draw, then that the corpus never does -----------------------------------------


def grey(base):
    return (np.ptp(base, axis=-1) == 0).all()


@pytest.mark.parametrize("classes", [10, 200])
def test_tiny_imagenet_draws_one_object_on_grey(monkeypatch, classes):
    spy = Spy(monkeypatch)
    calls = sum(1 for _ in task_examples("tiny_imagenet", classes))
    assert spy.objects == calls and all(map(grey, spy.bases))


@pytest.mark.parametrize("classes", [10, 100])
def test_cifar100_draws_a_pattern_on_near_black(monkeypatch, classes):
    spy = Spy(monkeypatch)
    list(task_examples("cifar100", classes))
    assert spy.objects == 0 and all(base.max() < 0.36 for base in spy.bases)


@pytest.mark.parametrize("name", ["fashion_mnist", "caltech256"])
def test_tasks_of_reconstruction_draw_one_object_without_a_pattern(monkeypatch, name):
    spy = Spy(monkeypatch)
    calls = sum(1 for _ in task_examples(name))
    assert spy.objects == calls and not spy.textures


def test_vqa_draws_at_most_two_objects_side_by_side_on_grey(monkeypatch):
    spy = Spy(monkeypatch)
    calls = sum(1 for _ in task_examples("vqa"))
    assert spy.objects == 2 * calls and all(np.all(kinds == -1) for kinds in spy.textures)
    assert all(map(grey, spy.bases[::2]))
    places = np.concatenate([centers for i, centers in enumerate(spy.centers) if i % 3])  # the first is the ground's
    assert np.abs(places[:, 1] - 31.5).max() <= 3


def test_no_picture_of_the_corpus_is_a_task_s(drawn):
    counts = np.zeros(3, int)
    for picture in drawn[1]:
        counts[len(picture.things)] += 1
        first, second = picture.tones
        if not picture.things:  # cifar100 has a tone near black
            assert picture.pattern and first != second and {first, second} <= set(drawing.COLORS)
        elif len(picture.things) == 1:  # tiny_imagenet has grey grounds; fashion_mnist and caltech256 have no pattern
            assert picture.pattern and {first, second} & CHROMATIC
        elif first in ("grey", "black"):  # as vqa, which has objects side by side
            assert [thing.place for thing in picture.things] == ["top", "bottom"]
        assert all(thing.color != first for thing in picture.things)
    assert counts.min() > 400


def test_vqa_never_has_the_corpus_grounds_of_objects_side_by_side(drawn):
    beside = [picture for picture in drawn[1] if picture.things and picture.things[0].place == "left"]
    assert len(beside) > 300
    assert {picture.tones[0] for picture in beside} == set(drawing.COLORS)
    assert not any(picture.pattern for picture in beside)


@pytest.mark.parametrize(("name", "classes"), [("tiny_imagenet", 10), ("cifar100", 10), ("caltech256", 0), ("vqa", 0)])
def test_no_picture_has_the_pixels_of_a_task_s(drawn, name, classes):
    ours = {image.tobytes() for image in drawn[0]}
    assert len(ours) == len(drawn[0])
    for examples in task_examples(name, classes):
        assert not ours & {image.tobytes() for image in examples.images}


# --- pictures are as their records and captions say ---------------------------------------------------------------


def test_pictures_show_what_they_are_said_to(drawn):
    """Where two objects are, the pixel in the middle of a full shape has its colour, and the corner the ground's."""
    full = {"circle", "square", "star", "diamond"}
    palette = dict(zip(corpus.TONES, corpus._TONES, strict=True))
    at = {"left": (31, 17), "right": (31, 46), "top": (17, 31), "bottom": (46, 31)}
    checked = 0
    for image, picture in zip(*drawn, strict=True):
        for thing in picture.things:
            if len(picture.things) == 2 and thing.kind in full and thing.color not in ("white", "cyan"):
                y, x = at[thing.place]
                seen = image[y - 2 : y + 3, x - 2 : x + 3].reshape(-1, 3).mean(0) / 255
                others = {name: np.abs(seen / seen.max() - rgb / rgb.max()).sum() for name, rgb in palette.items()}
                assert min(others, key=others.get) in (thing.color, "yellow", "orange", "red"), (others, thing)
                assert others[thing.color] < 0.75
                checked += 1
    assert checked > 200


def test_captions_name_all_that_is_there(drawn):
    rng = RNG()
    for picture in drawn[1]:
        text = corpus.caption(rng, picture)
        if text.startswith("Answer"):
            continue
        assert picture.tones[0] in text and picture.pattern in text
        for thing in picture.things:
            assert f"a {thing.size} {thing.color} {thing.kind}" in text


def test_answers_are_true(drawn):
    rng = RNG()
    asked = set()
    for picture in drawn[1]:
        text = corpus.caption(rng, picture)
        if not text.startswith("Answer"):
            continue
        question, answer = re.search("Question: (.*)\\? Answer: (.*)", text).groups()
        word = question.split()[-1]
        asked.add(question.split()[0] + question.split()[1])
        things = {thing.kind: thing for thing in picture.things}
        if question.startswith("what color"):
            assert things[word].color == answer
        elif question.startswith("what shape"):
            assert things[answer].color == word
        elif question.startswith("is there"):
            assert (answer == "yes") == (word in things)
        elif question.startswith("is anything"):
            assert (answer == "yes") == (word in {thing.color for thing in picture.things})
        elif question.startswith("how many"):
            assert answer == ("one", "two")[len(things) - 1]
        else:
            assert answer == f"on the {things[word].place}"
    assert len(asked) == 6


# --- sentences ----------------------------------------------------------------------------------------------------

TOPIC_WORDS = {word for words in (*grammar.TOPIC_WORDS, *grammar.SHARED_TOPIC_WORDS) for word in words.split()}
DOERS = set(grammar._DOERS)
CUES = {cue for _, cues in grammar._QUESTIONS.values() for group in cues.values() for cue in group}


def topic_words(text):
    return sum(word in TOPIC_WORDS for word in text.split())


def cues(text):
    return sum(bool(re.search(rf"\b{cue}\b", text)) for cue in CUES)


@pytest.fixture(scope="module")
def sentences():
    rng = RNG()
    return [corpus.sentence(rng) for _ in range(5000)]


def test_headlines_have_three_words_of_topics_and_the_corpus_two_or_four(sentences):
    for examples in task_examples("ag_news"):
        assert {topic_words(text) for text in examples.inputs} == {3}
    rng = RNG()
    assert {topic_words(grammar.topical(rng)) for _ in range(2000)} == {2, 4}


def test_questions_have_four_cues_and_the_corpus_two(sentences):
    for examples in task_examples("mmlu"):
        assert {cues(text.split("Question: ")[1].split("?")[0]) for text in examples.inputs} == {4}
    rng = RNG()
    for record in (grammar.fact(rng) for _ in range(2000)):
        assert cues(record["question"]) == 2 and cues(record["text"]) == 2
        assert record["choices"][record["answer"]] in record["text"]


def test_sentences_of_common_gen_have_one_who_acts_and_the_corpus_two():
    for examples in task_examples("common_gen", size=200):
        for group in examples.references:
            assert {len(DOERS & set(re.findall(r"\w+", text))) for text in group} == {1}
    rng = RNG()
    for record in (grammar.joint_scene(rng) for _ in range(2000)):
        assert len(DOERS & set(record["concepts"])) == 2
        stems = record["target"].replace("carries", "carry")
        assert all(concept in stems for concept in record["concepts"])


def test_no_sentence_is_a_task_s(sentences):
    theirs = set()
    for name in ("ag_news", "mmlu", "common_gen"):
        for examples in task_examples(name, size=200):
            theirs |= set(examples.inputs)
            if examples.targets:
                theirs |= {f"{a} {b}" for a, b in zip(examples.inputs, examples.targets, strict=True)}
                theirs |= {text.split(": ", 1)[1] for group in examples.references for text in group}
    assert len(set(sentences)) > 3000 and not theirs & set(sentences)


def test_same_seed_same_corpus(drawn):
    images, pictures = corpus.draw_pictures(RNG(), 3000)
    assert np.array_equal(images, drawn[0]) and pictures == drawn[1]
