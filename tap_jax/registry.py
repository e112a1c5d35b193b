"""Methods by name: what the configuration, the plans and the reports know of each.

A configuration is read and checked before JAX starts, since the devices that JAX is to make follow from it. So what it
knows of a method stands here, without JAX; the mathematics is in the method's file, which `make` names. A method of
one's own is registered in a file of one's own (`--register=FILE`), with `make` a function beside its entry.
"""

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from typing import Any

from tap_jax.errors import UserError

Settings = Mapping[str, Any]  # the sections and fields that `MethodEntry.reads` names, as plain values


def one_gradient(settings: Settings) -> int | None:
    """A local step takes one gradient of the task losses."""
    return 1


def more_than_gradients(settings: Settings) -> int | None:
    """A local step computes more than gradients of the task losses."""
    return None


@dataclasses.dataclass(frozen=True)
class MethodEntry:
    """What is known of a method without its mathematics.

    Attributes:
      name: value of `config.method`.
      variants: names of what one run can yield; the first is the default.
      server: those of them that are the server's blocks as they are, so that no client has a model of its own.
      untrained: those of them that nothing is trained for after the last round, beside the server's.
      make: (settings, `methods.base.MethodContext`) -> `Method`; a function, or "module:function".
      section: fields of `config.<name>`, which the method alone reads, and their defaults.
      choices: field of the section -> the words that it takes.
      reads: sections and fields of the configuration that not all methods read; its own section among them.
      gradients: settings -> gradients of the task losses that a local step takes; None where it computes more.
      personal: it trains models X beside W̃[i], which nothing of the server waits for (`methods.base.SplitRound`).
      sends: clients send updates to a server.
      pooled: one client has everybody's data and takes the iterations of a whole cohort.
      routed: it needs the routed backbone.
      adapters: settings -> inner width of the bottleneck adapters that take LoRA's place; 0: none.
      second_order: settings -> whether the loss is differentiated twice.
    """

    name: str
    variants: tuple[str, ...]
    server: tuple[str, ...] = ()
    untrained: tuple[str, ...] = ()
    make: str | Callable[[Settings, Any], Any] = ""
    section: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    choices: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    reads: tuple[str, ...] = ()
    gradients: Callable[[Settings], int | None] = one_gradient
    personal: bool = False
    sends: bool = True
    pooled: bool = False
    routed: bool = False
    adapters: Callable[[Settings], int] = lambda settings: 0
    second_order: Callable[[Settings], bool] = lambda settings: False

    def method(self, settings: Settings, context: Any) -> Any:
        """The `Method`, of `settings` in a `MethodContext`."""
        make = self.make
        if isinstance(make, str):
            module, _, function = make.partition(":")
            make = getattr(importlib.import_module(module), function)
        return make(settings, context)


METHODS: dict[str, MethodEntry] = {}


def register_method(entry: MethodEntry) -> MethodEntry:
    """Adds a method to the registry `METHODS`, so that `config.method` can name it.

    Raises:
      UserError: the name is taken by another method, or a variant is named twice or as the server's only.
    """
    if entry.name in METHODS:
        raise UserError(f"method {entry.name}: already registered; choose another name")
    if not entry.variants or len({*entry.variants}) < len(entry.variants) or {*entry.server} - {*entry.variants}:
        raise UserError(f"method {entry.name}: variants {entry.variants}, of the server {entry.server}; name each once")
    METHODS[entry.name] = entry
    return entry


def server_variants() -> tuple[str, ...]:
    """The variants of all methods that are the server's blocks."""
    return tuple(name for entry in METHODS.values() for name in entry.server)


for _entry in (
    # Those of TAP share a trunk (Sec. 3, App. C). tap-no-kd: Stage 2 without distillation; tap-stage1: no Stage 2 at
    # all; tap-stage2: no replacement in Stage 1.
    MethodEntry(
        "tap",
        ("tap", "tap-no-kd", "tap-stage1", "tap-stage2", "local", "fedavg", "fedavg+post", "fedavg+2p"),
        server=("fedavg",),
        untrained=("tap-stage1", "local"),
        make="tap_jax.methods.tap:configured",
        reads=("margins", "replacement", "distillation"),
        personal=True,
    ),
    MethodEntry(
        "fedavg",
        ("fedavg", "fedavg+post", "fedavg+2p"),
        server=("fedavg",),
        make="tap_jax.methods.fedavg:configured",
    ),
    MethodEntry("local", ("local",), make="tap_jax.methods.local:configured", sends=False),
    MethodEntry(
        "per_fedavg",
        ("per-fedavg", "per-fedavg+post"),
        server=("per-fedavg",),
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
        ("disentafl", "disentafl+post", "disentafl+2p"),
        server=("disentafl",),
        make="tap_jax.methods.disentafl:configured",
        section={"weight": 0.5},  # of the disentanglement loss
        reads=("disentafl",),
        gradients=more_than_gradients,
        routed=True,
    ),
    MethodEntry(
        "feddat",
        ("feddat", "feddat+post"),
        make="tap_jax.methods.feddat:configured",
        section={
            "bottleneck": 32,  # inner width of the adapters; 16 for ViLT
            "weight": 2e-3,  # of the KL terms
        },
        reads=("feddat", "distillation.image_loss"),
        gradients=more_than_gradients,
        adapters=lambda settings: settings["feddat"]["bottleneck"],
    ),
    MethodEntry(
        "centralised",
        ("centralised",),
        server=("centralised",),
        make="tap_jax.methods.fedavg:centralised",
        sends=False,
        pooled=True,
    ),
):
    register_method(_entry)
