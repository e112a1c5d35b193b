"""Methods by name: what the configuration, the plans and the reports know of each.

A configuration is read and checked before JAX starts, since the devices that JAX is to make follow from it. So what it
knows of a method stands here, without JAX; the mathematics is in the method's file, which `make` names. A method of
one's own is registered in a file of one's own (`--register=FILE`), with `make` a function beside its entry.
"""

import dataclasses
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tap_jax.errors import UserError

if TYPE_CHECKING:
    from tap_jax.methods.base import Method, MethodContext

Settings = Mapping[str, Any]  # the sections and fields that `MethodEntry.reads` names, as plain values
SERVER = "server"  # `Variant.model` of W̃, the server's blocks


@dataclasses.dataclass(frozen=True)
class Variant:
    """A result that a run can yield.

    Attributes:
      name: in `config.variants`, in results and reports.
      model: which model it is made of, as the last round leaves it: `SERVER`, or a client's by its name in `State`.
      periods: how long a client then trains it, in units of P iterations: 0, 1 or 2.
    """

    name: str
    model: str = SERVER
    periods: int = 0

    @property
    def of_server(self) -> bool:
        """Whether it is the server's blocks as they are, so that no client has a model of its own."""
        return self.model == SERVER and not self.periods


def federated_variants(name: str) -> tuple[Variant, Variant, Variant]:
    """NAME is the server's blocks, NAME+post what clients make of them in P iterations, NAME+2p in 2P."""
    return Variant(name), Variant(f"{name}+post", periods=1), Variant(f"{name}+2p", periods=2)


@dataclasses.dataclass(frozen=True)
class MethodEntry:
    """What is known of a method without its mathematics.

    Attributes:
      name: value of `config.method`.
      variants: what one run can yield; the first is the default, and has another for each further entry of `margins`.
      always: those of them that every run trains, since others learn from them.
      make: (settings, `methods.base.MethodContext`) -> `Method`; a function, or "module:function".
      section: fields of `config.<name>`, which the method alone reads, and their defaults.
      choices: field of the section -> the words that it takes.
      reads: sections and fields of the configuration that not all methods read; its own section among them.
      gradients: settings -> gradients of the task losses that a local step takes; None where it computes more.
      personal: it trains models X beside W̃[i], which nothing of the server waits for (`methods.base.SplitRound`).
      sends: clients send updates to a server.
      pooled: one client has all clients' data and takes the iterations of a whole cohort.
      routed: it needs the routed backbone.
      adapters: settings -> inner width of the bottleneck adapters that take LoRA's place; 0: none.
      second_order: settings -> whether the loss is differentiated twice.
    """

    name: str
    variants: tuple[Variant, ...]
    always: tuple[str, ...] = ()
    make: "str | Callable[[Settings, MethodContext], Method]" = ""
    section: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    choices: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    reads: tuple[str, ...] = ()
    gradients: Callable[[Settings], int | None] = lambda settings: 1
    personal: bool = False
    sends: bool = True
    pooled: bool = False
    routed: bool = False
    adapters: Callable[[Settings], int] = lambda settings: 0
    second_order: Callable[[Settings], bool] = lambda settings: False

    @property
    def default(self) -> str:
        """The variant that a run yields where the configuration names none."""
        return self.variants[0].name

    def variant(self, name: str) -> Variant:
        """The variant of that name, "NAME@LABEL" where it is of a further entry of `margins`."""
        return next(variant for variant in self.variants if variant.name == name.partition("@")[0])

    def post_periods(self, variants: Sequence[str]) -> tuple[int, ...]:
        """Lengths of what a client trains after the last round of a run that yields `variants`, and for those.

        They are in units of P iterations; 0 of a model that is left as it is.
        """
        return tuple(self.variant(name).periods for name in dict.fromkeys((*variants, *self.always)))

    def reads_field(self, field: str) -> bool:
        """Whether the method reads a field of the configuration that not all methods read."""
        return any(field == name or field.startswith(f"{name}.") for name in self.reads)

    def method(self, settings: Settings, context: "MethodContext") -> "Method":
        """The method, of `settings` in a context."""
        make = self.make
        if isinstance(make, str):
            module, _, function = make.partition(":")
            make = getattr(importlib.import_module(module), function)
        return make(settings, context)


METHODS: dict[str, MethodEntry] = {}


def register_method(entry: MethodEntry) -> MethodEntry:
    """Adds a method to the registry `METHODS`, so that `config.method` can name it.

    Raises:
      UserError: the name is taken by another method, or the variants are none, no `Variant`s or not named once each.
    """
    if entry.name in METHODS:
        raise UserError(f"method {entry.name}: already registered; choose another name")
    names = {variant.name for variant in entry.variants if isinstance(variant, Variant)}
    if not names or len(names) < len(entry.variants) or {*entry.always} - names:
        raise UserError(f"method {entry.name}: variants {entry.variants}; give each once, as a `registry.Variant`")
    METHODS[entry.name] = entry
    return entry


def server_variants() -> tuple[str, ...]:
    """The variants of all methods that are the server's blocks."""
    return tuple(variant.name for entry in METHODS.values() for variant in entry.variants if variant.of_server)


for _entry in (
    # Those of TAP share the federated models (Sec. 3, App. C). tap-no-kd: Stage 2 without distillation; tap-stage1: no
    # Stage 2 at all; tap-stage2: no replacement in Stage 1.
    MethodEntry(
        "tap",
        (
            Variant("tap", "personal", 1),
            Variant("tap-no-kd", "personal", 1),
            Variant("tap-stage1", "personal"),
            Variant("tap-stage2", "local", 1),
            Variant("local", "local"),
            *federated_variants("fedavg"),
        ),
        always=("fedavg+post",),
        make="tap_jax.methods.tap:configured",
        reads=("margins", "replacement", "distillation"),
        personal=True,
    ),
    MethodEntry("fedavg", federated_variants("fedavg"), make="tap_jax.methods.fedavg:configured"),
    MethodEntry("local", (Variant("local", "local"),), make="tap_jax.methods.local:configured", sends=False),
    MethodEntry(
        "per_fedavg",
        federated_variants("per-fedavg")[:2],
        make="tap_jax.methods.per_fedavg:configured",
        section={
            "inner_scale": 1.0,  # inner rate / outer rate; Table 21 has one schedule for both
            "hessian": "none",  # ⚙ first-order | "exact", by forward differentiation of the gradient
        },
        choices={"hessian": ("none", "exact")},
        reads=("per_fedavg",),
        gradients=lambda settings: 2 if settings["per_fedavg"]["hessian"] == "none" else None,
        second_order=lambda settings: settings["per_fedavg"]["hessian"] == "exact",
    ),
    MethodEntry(
        "disentafl",
        federated_variants("disentafl"),
        make="tap_jax.methods.disentafl:configured",
        section={"weight": 0.5},  # of the disentanglement loss
        reads=("disentafl",),
        gradients=lambda settings: None,
        routed=True,
    ),
    MethodEntry(
        "feddat",
        (Variant("feddat", "private"), Variant("feddat+post", "private", 1)),
        make="tap_jax.methods.feddat:configured",
        section={
            "bottleneck": 32,  # inner width of the adapters; 16 for ViLT
            "weight": 2e-3,  # of the KL terms
        },
        reads=("feddat", "distillation.image_loss"),
        gradients=lambda settings: None,
        adapters=lambda settings: settings["feddat"]["bottleneck"],
    ),
    MethodEntry(
        "centralised",
        (Variant("centralised"),),
        make="tap_jax.methods.fedavg:centralised",
        sends=False,
        pooled=True,
    ),
):
    register_method(_entry)
