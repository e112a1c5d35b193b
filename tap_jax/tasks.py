"""Tasks: what is learned, and which columns of whose rows it is learned from (Sec. 3.1 and 5.1, App. D.1, Table 23).

A *task* is a data set; losses, histories, margins and results are kept per task. Its *kind* selects the routed
experts, its *domain* (per sample) the query and value experts, its *head* the decoder. A *stream* is a (task, domain)
pair, the unit for which the compiled program has one static path.

A task is declared by plain values, the fields of `DECLARATION`: the paper's eight in `PAPER_TASKS`, a user's own in
`config.tasks`, which a run's config.json keeps. Neither model nor engine knows one by name.
"""

import dataclasses
import difflib
import re
from collections.abc import Mapping
from typing import Any, NoReturn

from tap_jax import templates
from tap_jax.errors import UserError

KINDS = ("image_classification", "image_generation", "text_classification", "text_generation")
MODALITIES = ("image", "text")

# Field of a declaration -> its default, whose type it has.
DECLARATION: dict[str, Any] = {
    "kind": "",  # one of KINDS
    "image": "",  # column of pictures
    "text": "",  # column of texts that the model reads, or a template of several (`tap_jax.templates`)
    "label": "",  # column of classes, as numbers or as names; classification only
    "answer": "",  # column or template of texts that the model writes; a column may hold a list: the first is learned
    "group_by": "",  # test rows that agree in this column are one sample with as many references; text_generation only
    "classes": 0,  # how many; 0: as many as have names, or as the training rows have
    "class_names": (),  # what the label column calls class 0, 1, ...; (): numbers, or the training rows' texts, sorted
    "domains": (),  # names; (): the values of domain_column, or the task's name
    "domain_column": "",  # says which domain a row is of; "": all are of the one
    "domain_values": (),  # what that column calls the domains; (): their names
    "head": "",  # tasks that name the same share a decoder; "": the kind's where it generates, else one of its own
    "path": "",  # folder or file of its rows, or a data set's id on the hub; "": what data.root says
    "hub": "",  # the data set that data.root=hub stands for
    "configs": (),  # configurations of that data set, or sub-folders, to put one after the other
    "train": "",  # what training and test data are called where it is not train and test
    "test": "",
    "stand_ins": (),  # sub-folders of data.root to use where there is none of the task's name, in this order
}


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a task's rows are, and what their columns mean; the fields are those of `DECLARATION`."""

    image: str = ""
    text: str = ""
    label: str = ""
    answer: str = ""
    group_by: str = ""
    domain_column: str = ""
    domain_values: tuple[str | int, ...] = ()
    path: str = ""
    hub: str = ""
    configs: tuple[str, ...] = ()
    train: str = ""
    test: str = ""
    stand_ins: tuple[str, ...] = ()

    @property
    def texts(self) -> tuple[str, ...]:
        """The columns that become texts."""
        return tuple(dict.fromkeys((*templates.columns(self.text), *templates.columns(self.answer))))

    def written(self, row: Mapping[str, Any]) -> tuple[str, str]:
        """What the model reads of a row, and what it writes.

        Raises:
          templates.Unfit: an entry that a template cannot use.
        """
        return templates.fill(self.text, row)[0], templates.fill(self.answer, row)[0]

    @property
    def needed(self) -> tuple[str, ...]:
        """All columns that are read."""
        named = (self.image, self.label, self.domain_column, self.group_by, *self.texts)
        return tuple(dict.fromkeys(name for name in named if name))


@dataclasses.dataclass(frozen=True)
class Task:
    """One data set and what is learned on it.

    Attributes:
      name: unique; also the name of its folder under `data.root`.
      kind: one of `KINDS`.
      modalities: subset of `MODALITIES`, in that order.
      domains: names of the domains its samples fall into, at least one.
      head: name of the decoder; tasks that name the same head share it.
      classes: number of classes of a classification task, else 0.
      class_names: what its label column calls them, texts or whole numbers; () where labels are numbers from 0.
      source: its data's; one without columns for a task that only a rule in `data.synthetic` draws.
    """

    name: str
    kind: str
    modalities: tuple[str, ...]
    domains: tuple[str, ...]
    head: str
    classes: int = 0
    class_names: tuple[str | int, ...] = ()
    source: Source = Source()

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UserError(f"task {self.name}: unknown kind '{self.kind}'; use one of {', '.join(KINDS)}")
        if not self.modalities or any(m not in MODALITIES for m in self.modalities):
            raise UserError(f"task {self.name}: modalities {self.modalities}; use a non-empty subset of {MODALITIES}")
        if not self.domains:
            raise UserError(f"task {self.name}: needs at least one domain")
        if self.kind.endswith("classification") != (self.classes > 0):
            raise UserError(f"task {self.name}: classes must be > 0 exactly for classification, not {self.classes}")
        if self.class_names and len(self.class_names) < self.classes:
            raise UserError(
                f"task {self.name}: {self.classes} classes, but {len(self.class_names)} have names; name each"
            )

    @property
    def streams(self) -> tuple["Stream", ...]:
        """One stream per domain."""
        return tuple(Stream(self, domain) for domain in self.domains)


@dataclasses.dataclass(frozen=True)
class Stream:
    """A (task, domain) pair: the samples that take one static path through the model."""

    task: Task
    domain: str

    @property
    def name(self) -> str:
        """`task` where the task has one domain, else `task/domain`."""
        return self.task.name if len(self.task.domains) == 1 else f"{self.task.name}/{self.domain}"


TASKS: dict[str, Task] = {}
_DECLARED: set[str] = set()  # those that a configuration declares, and may declare anew


def register_task(task: Task) -> Task:
    """Adds a task to the registry `TASKS`; a name can be registered once.

    Raises:
      UserError: the name is taken by a different task.
    """
    if TASKS.setdefault(task.name, task) != task:
        raise UserError(f"task {task.name}: already registered; choose another name")
    return task


def find_task(name: str) -> Task:
    """The registered task of that name.

    Raises:
      UserError: there is none; the message lists the known ones.
    """
    if name not in TASKS:
        raise UserError(
            f"federation: unknown task '{name}'; known tasks: {', '.join(TASKS)}; declare one of your own in"
            " config.tasks, or name the file that registers it (--register=FILE)"
        )
    return TASKS[name]


def declare(tasks: Mapping[str, Mapping[str, Any]]) -> None:
    """Makes the tasks of `config.tasks` known; what is declared again replaces what it was.

    Args:
      tasks: name -> fields of `DECLARATION`. A task whose classes or domains are still to be found in the data
        (`is_open`) becomes known with one of them.

    Raises:
      UserError: a field that is wrong, or a name that the paper's tasks or a registered one have.
    """
    for task in [declared(name, fields) for name, fields in tasks.items()]:
        if task.name not in TASKS:
            _DECLARED.add(task.name)
        elif task.name not in _DECLARED and TASKS[task.name] != task:
            raise UserError(f"tasks.{task.name}: there is a task of that name; choose another one")
        TASKS[task.name] = task


def complete(name: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """A declaration with every field, each of its type.

    Raises:
      UserError: an unknown field, or a value of another type.
    """
    if not re.fullmatch(r"[\w-]+", name):
        raise UserError(f"tasks: a task named {name!r}; use letters, digits, _ and -")
    found = dict(DECLARATION)
    for field, value in fields.items():
        place = f"tasks.{name}.{field}"
        if field not in DECLARATION:
            near = difflib.get_close_matches(field, DECLARATION, n=1, cutoff=0.6)
            hint = f"did you mean '{near[0]}'? " if near else ""
            raise UserError(f"{place}: unknown field; {hint}a task has: {', '.join(DECLARATION)}")
        standard = DECLARATION[field]
        if isinstance(standard, tuple):
            value = tuple(value) if isinstance(value, (list, tuple)) else (value,)
            kinds = (str, int) if field in ("class_names", "domain_values") else (str,)
            if not all(isinstance(entry, kinds) for entry in value):
                raise UserError(f"{place}: {value!r}; use {' or '.join(kind.__name__ for kind in kinds)} entries")
            if len(set(value)) < len(value):
                raise UserError(f"{place}: an entry is there twice; drop one")
        elif type(value) is not type(standard):
            raise UserError(f"{place}: {value!r} is of type {type(value).__name__}; use a {type(standard).__name__}")
        found[field] = value
    return found


def declared(name: str, fields: Mapping[str, Any]) -> Task:
    """The task that a declaration describes.

    Args:
      name: of letters, digits, _ and -.
      fields: of `DECLARATION`, all or some.

    Raises:
      UserError: what is wrong with it, as `tasks.NAME.FIELD: ...`.

    Example:
      >>> task = declared("notes", {"kind": "text_classification", "text": "body", "label": "topic", "classes": 3})
      >>> task.modalities, task.domains, task.head, task.source.needed
      (('text',), ('notes',), 'notes', ('topic', 'body'))
    """
    given = complete(name, fields)
    _check(name, given)
    kind, names = given["kind"], given["class_names"]
    source = Source(**{field.name: given[field.name] for field in dataclasses.fields(Source)})
    classes = given["classes"] or len(names) or kind.endswith("classification")
    return Task(
        name,
        kind,
        tuple(modality for modality in MODALITIES if given[modality]),
        given["domains"] or (name,),
        given["head"] or (kind if kind.endswith("generation") else name),
        int(classes),
        names,
        source,
    )


def is_open(fields: Mapping[str, Any]) -> tuple[bool, bool]:
    """Whether a complete declaration leaves its classes to the data, and whether its domains."""
    classes = fields["kind"].endswith("classification") and not fields["classes"] and not fields["class_names"]
    return classes, bool(fields["domain_column"]) and not fields["domains"]


def _check(name: str, given: Mapping[str, Any]) -> None:
    """How the fields of a complete declaration go together."""

    def refuse(field: str, wrong: str) -> NoReturn:
        raise UserError(f"tasks.{name}.{field}: {wrong}")

    kind = given["kind"]
    if kind not in KINDS:
        refuse("kind", f"unknown '{kind}'; use one of {', '.join(KINDS)}")
    classifies, writes = kind.endswith("classification"), kind == "text_generation"
    wanted = {
        "image": kind.startswith("image"),
        "text": kind == "text_classification" or (writes and not given["image"]),
        "label": classifies,
        "answer": writes,
    }
    for field, needed in wanted.items():
        if needed and not given[field]:
            refuse(field, f"missing; {kind} needs the name of that column")
    for field, of in (("label", classifies), ("classes", classifies), ("class_names", classifies)):
        if given[field] and not of:
            refuse(field, f"goes with classification, not {kind}; drop it")
    for field in ("answer", "group_by"):
        if given[field] and not writes:
            refuse(field, f"goes with text_generation, not {kind}; drop it")
    for field in ("text", "answer"):
        try:
            templates.columns(given[field])
        except ValueError as error:
            refuse(field, str(error))
    names, domains = given["class_names"], given["domains"]
    if given["classes"] < 0:
        refuse("classes", f"{given['classes']}; use at least 1, or 0 for those of the data")
    if names and given["classes"] not in (0, len(names)):
        refuse("classes", f"{given['classes']}, but class_names has {len(names)}; drop one of the two")
    if len(domains) > 1 and not given["domain_column"]:
        refuse("domain_column", f"missing; name the column that says which of {', '.join(domains)} a row is of")
    if given["domain_values"] and not given["domain_column"]:
        refuse("domain_values", "goes with domain_column; drop it or name that")
    if given["domain_values"] and len(given["domain_values"]) != len(domains):
        refuse("domain_values", f"{len(given['domain_values'])} for {len(domains)} domains; give one for each")
    for field, values in (("domains", domains), ("head", filter(None, [given["head"]]))):
        for value in values:
            if not can_name_blocks(value):
                refuse(field, f"{value!r}; blocks are named by it, so use no '.' and no '/'")


def can_name_blocks(value: str) -> bool:
    """Whether a domain or a head may be called so."""
    return bool(value) and value.isprintable() and not {".", "/"} & set(value)


# The eight of Sec. 5.1: kinds and heads as in App. D.1 (generation heads are shared), texts as in Table 23, cut where
# the answer starts.
PAPER_TASKS: dict[str, dict[str, Any]] = {
    "tiny_imagenet": {
        "kind": "image_classification",
        "image": "image",
        "label": "label",
        "classes": 200,
        "domains": ("fine_grained",),
        "hub": "zh-plus/tiny-imagenet",
        "test": "valid",
    },
    "cifar100": {
        "kind": "image_classification",
        "image": "img",
        "label": "fine_label",
        "classes": 100,
        "domains": ("fine_grained",),
        "hub": "uoft-cs/cifar100",
    },
    "fashion_mnist": {
        "kind": "image_generation",
        "image": "image",
        "domains": ("general_object",),
        "hub": "zalando-datasets/fashion_mnist",
    },
    "caltech256": {
        "kind": "image_generation",
        "image": "image",
        "domains": ("general_object",),
        "hub": "ilee0022/Caltech-256",
        "stand_ins": ("caltech101",),
    },
    "ag_news": {
        "kind": "text_classification",
        "text": "text",
        "label": "label",
        "classes": 4,
        "domains": ("news",),
        "hub": "fancyzhx/ag_news",
    },
    "mmlu": {
        "kind": "text_generation",
        "text": (
            "The following is a multiple-choice question about {subject:words}. Choose the correct answer from the"
            " options below. Question: {question} Options:\n{choices:options}"
        ),
        "answer": "Correct answer on {subject:words}: {answer:option of choices}",
        "domains": ("law", "medicine", "moral"),
        "domain_column": "subject",
        "domain_values": ("professional_law", "professional_medicine", "moral_scenarios"),
        "hub": "cais/mmlu",
        "configs": ("professional_law", "professional_medicine", "moral_scenarios"),
        "train": "test",
        "test": "validation",
    },
    "vqa": {
        "kind": "text_generation",
        "image": "image",
        "text": "Answer the question based on the image. Question: {question}",
        "answer": "Answer: {multiple_choice_answer}",
        "domains": ("visual_answering",),
        "hub": "merve/vqav2-small",
        "train": "validation",  # the same twice: it is divided, see `data.places.divide_by_image`
        "test": "validation",
        "stand_ins": ("easy_vqa", "vqav2"),
    },
    "common_gen": {
        "kind": "text_generation",
        "text": "Generate an appropriate description from the concepts below. Concepts: {concepts:list}",
        "answer": "Description: {target}",
        "group_by": "concept_set_idx",
        "domains": ("common_sense",),
        "hub": "allenai/common_gen",
        "test": "validation",
    },
}
for _name, _fields in PAPER_TASKS.items():
    register_task(declared(_name, _fields))
