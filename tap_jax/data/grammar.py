"""Small grammars for the procedural suite: news, multiple choice, and sentences from concepts.

Each function draws one record with the columns of the data set it stands in for, so that templates and metrics
treat both alike. Fewer than 300 words in all. A rule decides every answer; which words belong to which topic,
offence or illness is fixed, never seeded, so that all clients face the same world.
"""

from collections.abc import Mapping, Sequence

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
    words: list[str] = []
    while len(words) < 3:
        where = rng.random()
        topic = label if where < 0.88 else (label + rng.integers(1, 4)) % 4
        word = _pick(rng, _CONFUSABLE[topic] if 0.62 <= where < 0.88 else _TOPICS[topic])
        if word not in words:
            words.append(word)
    a, b, c = words
    text = _pick(rng, _NEWS_FRAMES).format(a=a, b=b, c=c, s=_pick(rng, _NEWS_SOURCES), t=_pick(rng, _NEWS_TIMES))
    return {"text": text, "label": label}


# What a question may be about, by domain: (how it is put, answer -> the cues that call for it).
_QUESTIONS: Mapping[str, tuple[str, Mapping[str, tuple[str, ...]]]] = {
    "law": (
        "A {who} {a}, {b}, {c} and {d} {when}. Guilty of?",
        {
            "assault": ("hits guards", "kicks clerks", "pushes guests", "slaps players"),
            "damage": ("burns boats", "breaks windows", "cuts fences", "scratches cars"),
            "fraud": ("fakes papers", "cheats banks", "sells glass", "fools judges"),
            "theft": ("takes coats", "steals cars", "keeps coins", "robs markets"),
        },
    ),
    "medicine": (
        "A {who} has {a}, {b}, {c} and {d} {when}. Best treatment?",
        {
            "antibiotic": ("fever", "chills", "headache", "a sore throat"),
            "aspirin": ("chest pain", "sweat", "a weak pulse", "a numb arm"),
            "insulin": ("thirst", "sugar", "hunger", "weak sight"),
            "lotion": ("a rash", "itch", "red skin", "dry spots"),
        },
    ),
    "moral": (
        "I {a}, {b}, {c} and {d} a {who} {when}. That is?",
        {
            "cruel": ("hurt", "scare", "insult", "starve"),
            "dishonest": ("trick", "cheat", "mislead", "betray"),
            "kind": ("help", "thank", "feed", "teach"),
            "lazy": ("ignore", "forget", "delay", "avoid"),
        },
    ),
}
QUESTION_DOMAINS = tuple(_QUESTIONS)
_PERSONS = ("man", "woman", "boy", "girl", "child", "player", "farmer", "teacher", "driver", "guest")
_TIMES = ("today", "tonight", "at school", "in the park")


def question(rng: np.random.Generator, domain: str) -> dict:
    """One question of `domain`, {question, subject, choices, answer}: an answer's four cues, in any order, decide.

    Fewer would be lost among the fifty other words of a template, which a tiny model averages. Options come in
    alphabetical order, so that the letter, too, can be learned from the words.
    """
    frame, cues = _QUESTIONS[domain]
    choices = sorted(cues)
    answer = rng.integers(len(choices))
    a, b, c, d = rng.permutation(cues[choices[answer]])
    text = frame.format(a=a, b=b, c=c, d=d, who=_pick(rng, _PERSONS), when=_pick(rng, _TIMES))
    return {"question": text, "subject": domain, "choices": choices, "answer": int(answer)}


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
VERBS = (*_INTRANSITIVE, *_TRANSITIVE)
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


# --- for pre-training: the same words, in other combinations (`corpus` says which) --------------------------------

_TOPICAL_FRAMES = {
    2: ("{s} on {a} and {b}", "{a} , {b} : more on that {t}", "after {a} comes {b} , says a {s}"),
    4: (
        "{a} and {b} , {c} and {d}",
        "{s} : {a} and {b} surprise {c} , but no {d} {t}",
        "new {a} may change {b} , big {c} shake {d}",
    ),
}


def topical(rng: np.random.Generator) -> str:
    """Two or four words of one topic, some of them shared with another topic."""
    topic, count = rng.integers(len(_TOPICS)), (2, 4)[rng.integers(2)]
    own, shared = _TOPICS[topic], _CONFUSABLE[topic]
    words = [*rng.permutation(own)[:count]]
    if rng.random() < 0.6:
        words[rng.integers(count)] = _pick(rng, shared)
    named = dict(zip("abcd", words, strict=False))
    return _pick(rng, _TOPICAL_FRAMES[count]).format(**named, s=_pick(rng, _NEWS_SOURCES), t=_pick(rng, _NEWS_TIMES))


def fact(rng: np.random.Generator) -> dict:
    """{text, question, subject, choices, answer}: two cues and what they call for, as a sentence and as a question."""
    domain = _pick(rng, QUESTION_DOMAINS)
    frame, cues = _QUESTIONS[domain]
    choices = sorted(cues)
    answer = rng.integers(len(choices))
    first, second = rng.permutation(cues[choices[answer]])[:2]
    who, when = _pick(rng, _PERSONS), _pick(rng, _TIMES)
    asked = frame.replace("{a}, {b}, {c} and {d}", "{a} and {b}").format(a=first, b=second, who=who, when=when)
    text = f"{domain} : {first} and {second} , that is {choices[answer]}"
    return {"text": text, "question": asked, "subject": domain, "choices": choices, "answer": int(answer)}


# How each verb is done: without words of their own, verbs that take no object would be alike in all sentences.
_MANNERS = {
    "run": "fast",
    "walk": "slowly",
    "sleep": "deeply",
    "jump": "high",
    "dance": "wildly",
    "play": "loudly",
    "throw": "far",
    "eat": "hungrily",
    "carry": "carefully",
    "read": "silently",
    "watch": "closely",
    "wash": "gently",
    "paint": "neatly",
}


def joint_scene(rng: np.random.Generator) -> dict:
    """{concepts, target}: two who act, each in a way of their own or both in the same."""
    doers = [str(doer) for doer in rng.permutation(_DOERS)[:2]]
    actions = [_action(rng), _action(rng)]
    place = _pick(rng, tuple(_PLACES))
    if rng.random() < 0.5:
        used = list(actions[0])
        text = f"a {doers[0]} and a {doers[1]} {_clause(*used)} {_PLACES[place]}."
    else:
        used = [word for action in actions for word in action]
        clauses = [
            f"a {doer} {_clause(_third_person(verb), *rest)}"
            for doer, (verb, *rest) in zip(doers, actions, strict=True)
        ]
        text = f"{clauses[0]} and {clauses[1]} {_PLACES[place]}."
    concepts = list(dict.fromkeys([*doers, *filter(None, used), place]))
    return {"concepts": [concepts[i] for i in rng.permutation(len(concepts))], "target": text}


def _action(rng: np.random.Generator) -> tuple[str, str, str]:
    """A verb, what it is done to or "", and how or ""."""
    verb = _pick(rng, VERBS)
    thing = _pick(rng, _TRANSITIVE[verb]) if verb in _TRANSITIVE else ""
    return verb, thing, _MANNERS[verb] if rng.random() < 0.6 else ""


def _clause(verb: str, thing: str, manner: str) -> str:
    return " ".join(filter(None, (verb, thing and f"the {thing}", manner)))


def _third_person(verb: str) -> str:
    if verb == "carry":
        return "carries"
    return verb + ("es" if verb.endswith(("ch", "sh")) else "s")


def _pick(rng: np.random.Generator, options: Sequence[str]) -> str:
    return options[int(rng.integers(len(options)))]
