"""Small grammars for the procedural suite: news, multiple choice, and sentences from concepts.

Each function draws one record with the columns of the data set it stands in for, so that templates and metrics
treat both alike. Fewer than 300 words in all. A rule decides every answer; which words belong to which topic,
crime or illness is fixed, never seeded, so that all clients face the same world.
"""

from collections.abc import Mapping

import numpy as np

TOPIC_WORDS = (
    "minister troops treaty embassy border rebels election refugees president protest army",
    "coach goal season league striker medal stadium playoff tournament referee champion",
    "shares profit bank investors merger dollar earnings stocks inflation bonds sales",
    "software internet satellite virus browser chip robot rocket planet laser laptop",
)
# Words of two topics each; on their own they do not decide.
SHARED_TOPIC_WORDS = (
    "talks launch attack victory oil",
    "record team race deal victory games",
    "talks record network deal oil market",
    "launch network team race attack market games",
)
_TOPICS = tuple(tuple(words.split()) for words in TOPIC_WORDS)
_CONFUSABLE = tuple(tuple(words.split()) for words in SHARED_TOPIC_WORDS)
_NEWS_FRAMES = (
    "{a} and {b} shake {s} as {c} returns {t}",
    "{s} says new {a} may change {b} and {c} {t}",
    "no {a} for {s} {t} after big {b} and {c}",
    "{t} {s} wants {a} but {b} needs more {c}",
    "report : {a} , {b} and {c} surprise {s} {t}",
)
_NEWS_SOURCES = ("expert", "city", "paper", "group", "teacher", "player")
_NEWS_TIMES = ("today", "monday", "friday", "tonight")


def news(rng: np.random.Generator, label: int) -> dict:
    """A headline {text, label}; its three topic words mostly come from topic `label` of 4.

    Each is the topic's own with probability .62, one shared with another topic with .26, and another topic's else.
    """
    words = []
    while len(words) < 3:
        where = rng.random()
        topic = label if where < 0.88 else (label + rng.integers(1, 4)) % 4
        word = _pick(rng, _CONFUSABLE[topic] if 0.62 <= where < 0.88 else _TOPICS[topic])
        if word not in words:
            words.append(word)
    a, b, c = words
    text = _pick(rng, _NEWS_FRAMES).format(a=a, b=b, c=c, s=_pick(rng, _NEWS_SOURCES), t=_pick(rng, _NEWS_TIMES))
    return {"text": text, "label": label}


# Offence families: two names each, of which a question offers exactly one, and the acts that count as it.
_CRIMES = (
    (("theft", "robbery"), ("takes a car", "keeps a coin", "takes a coat")),
    (("assault", "battery"), ("hits a guard", "kicks a clerk", "pushes a guest")),
    (("fraud", "deceit"), ("sells a fake coin", "signs a false paper", "lies to a clerk")),
    (("arson", "damage"), ("burns a boat", "breaks a window", "burns a car")),
    (("trespass", "intrusion"), ("enters a boat", "climbs a fence", "enters a garden")),
    (("bribery", "corruption"), ("pays a guard", "pays a judge", "gives a judge a coat")),
)
_PERSONS = ("man", "woman", "boy", "girl", "player", "farmer", "teacher", "driver")
_TIMES = ("today", "tonight", "at school", "in the park")
# Illness families: two treatments each, of which a question offers exactly one, and the signs.
_ILLNESSES = (
    (("insulin", "diet"), ("thirst", "sugar", "hunger")),
    (("aspirin", "surgery"), ("chest pain", "sweat", "weak pulse")),
    (("inhaler", "steam"), ("cough", "wheeze", "weak breath")),
    (("antibiotic", "fluids"), ("fever", "chills", "headache")),
    (("cast", "splint"), ("bent arm", "red leg", "sharp pain")),
    (("lotion", "cream"), ("rash", "itch", "red skin")),
)
_GOOD_ACTS = ("help", "thank", "feed", "teach", "save")
_BAD_ACTS = ("rob", "hurt", "insult", "trick", "scare")
_OTHERS = ("a friend", "a guest", "a child", "a farmer", "a man", "a teacher", "a dog", "a girl")
_VERDICTS = ("wrong, wrong", "wrong, fine", "fine, wrong", "fine, fine")


def law(rng: np.random.Generator) -> dict:
    """What is X guilty of? The act decides, unless the owner or victim agreed: then it is "nothing"."""
    family = rng.integers(len(_CRIMES))
    agreed = rng.random() < 0.25
    act = _pick(rng, _CRIMES[family][1])
    question = f"A {_pick(rng, _PERSONS)} {act} {_pick(rng, _TIMES)}{' with consent' if agreed else ''}. Guilty of?"
    true_name, *others = _one_per_family(rng, _CRIMES, family)
    if agreed:
        return _choice("law", question, "nothing", [true_name, *others[:2]])
    return _choice("law", question, true_name, others if rng.random() < 0.7 else ["nothing", *others[:2]])


def medicine(rng: np.random.Generator) -> dict:
    """Which treatment? Two of the illness's three signs are named; one of its two treatments is on offer."""
    family = rng.integers(len(_ILLNESSES))
    first, second = rng.permutation(len(_ILLNESSES[family][1]))[:2]
    signs = _ILLNESSES[family][1]
    question = f"A {_pick(rng, _PERSONS)} has {signs[first]} and {signs[second]} {_pick(rng, _TIMES)}. Best treatment?"
    answer, *others = _one_per_family(rng, _ILLNESSES, family)
    return _choice("medicine", question, answer, others)


def moral(rng: np.random.Generator) -> dict:
    """Two acts, each wrong or fine: the verb decides, but nothing done by accident is wrong."""
    wrong, parts = [], []
    for _ in range(2):
        bad, accident = rng.random() < 0.6, rng.random() < 0.2
        verb = _pick(rng, _BAD_ACTS if bad else _GOOD_ACTS)
        parts.append(f"I {verb} {_pick(rng, _OTHERS)}{' by accident' if accident else ''}.")
        wrong.append(bad and not accident)
    answer = 2 * (not wrong[0]) + (not wrong[1])
    return {"question": " Then ".join(parts), "subject": "moral", "choices": list(_VERDICTS), "answer": answer}


# Who does what to what, where: transitive verbs with their own objects.
_DOERS = ("dog", "cat", "boy", "girl", "man", "woman", "child", "farmer", "teacher", "player", "driver", "horse")
_INTRANSITIVE = ("run", "walk", "sleep", "jump", "dance", "play")
_TRANSITIVE = {
    "throw": ("ball", "coin", "stone"),
    "eat": ("apple", "cake", "bread"),
    "carry": ("bag", "box", "stone"),
    "read": ("book", "report", "paper"),
    "watch": ("bird", "robot", "boat"),
    "wash": ("car", "coat", "window"),
    "paint": ("fence", "boat", "box"),
}
_PLACES = {
    "park": "in the park",
    "street": "on the street",
    "beach": "on the beach",
    "garden": "in the garden",
    "kitchen": "in the kitchen",
    "school": "at the school",
    "river": "by the river",
    "field": "in the field",
    "market": "at the market",
}


def scene(rng: np.random.Generator) -> dict:
    """{concepts, target, others}: two to four concepts, a sentence with all of them, and other ways to say it."""
    doer = _pick(rng, _DOERS)
    concepts, clause = [doer], ""
    if rng.random() < 0.4:
        verb = _pick(rng, _INTRANSITIVE)
    else:
        verb = _pick(rng, tuple(_TRANSITIVE))
        thing = _pick(rng, _TRANSITIVE[verb])
        concepts.append(thing)
        clause = f" the {thing}"
    concepts.append(verb)
    clause = f"{doer} {_third_person(verb)}{clause}"
    if rng.random() < 0.85:
        place = _pick(rng, tuple(_PLACES))
        concepts.append(place)
        where = _PLACES[place]
        sentences = [f"a {clause} {where}.", f"{where} a {clause}.", f"the {clause} {where}."]
    else:
        sentences = [f"a {clause}.", f"the {clause}."]
    # One wording is usual; the others exist, so that a set has several references.
    chosen = 0 if rng.random() < 0.7 else rng.integers(1, len(sentences))
    target = sentences.pop(chosen)
    return {"concepts": [concepts[i] for i in rng.permutation(len(concepts))], "target": target, "others": sentences}


def _third_person(verb: str) -> str:
    if verb == "carry":
        return "carries"
    return verb + ("es" if verb.endswith(("ch", "sh")) else "s")


def _pick(rng: np.random.Generator, options):
    return options[rng.integers(len(options))]


def _one_per_family(rng: np.random.Generator, families, first: int) -> list[str]:
    """One name of family `first`, then one each of three other families."""
    rest = rng.permutation([f for f in range(len(families)) if f != first])[:3]
    return [_pick(rng, families[f][0]) for f in (first, *rest)]


def _choice(subject: str, question: str, answer: str, others: list[str]) -> Mapping:
    # Options in alphabetical order: then the letter, too, can be learned from the words.
    choices = sorted([answer, *others])
    return {"question": question, "subject": subject, "choices": choices, "answer": choices.index(answer)}
