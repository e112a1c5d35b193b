"""How many floating-point operations a function and its gradient take, from shapes alone; nothing is run.

Counted are products (of matrices, and convolutions), a multiply-add as 2; what goes on element by element is not. The
backward pass of a product costs as much again for each of its two operands that depends on something trained: frozen
weights need no gradient of their own, and below the first trained weight there is no backward pass at all. That is what
the algorithm needs, and may be less than a compiled program does (a scan over layers also differentiates the first
layer's input).
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Literal
from jax.interpreters.partial_eval import dce_jaxpr


@dataclasses.dataclass(frozen=True)
class Flops:
    """Floating-point operations.

    Attributes:
      forward, backward: of the two passes.
      recomputed: of the forward pass, what rematerialisation does at most once more in the backward pass.
    """

    forward: int = 0
    backward: int = 0
    recomputed: int = 0

    @property
    def total(self) -> int:
        """Forward and backward; what is done twice counts once."""
        return self.forward + self.backward

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(self.forward + other.forward, self.backward + other.backward, self.recomputed + other.recomputed)

    def __mul__(self, times: int) -> "Flops":
        return Flops(self.forward * times, self.backward * times, self.recomputed * times)


def count(function: Callable[..., Any], trained: Any, *rest: Any) -> Flops:
    """The operations of `function(trained, *rest)`, and of its gradient with respect to `trained`.

    Args:
      function: pure; whatever does not contribute to what it returns is not counted.
      trained, rest: trees of arrays, or of their shapes; an empty `trained` leaves the forward pass. What only serves
        behind a `stop_gradient` (a teacher's weights) belongs in `rest`.

    Raises:
      ValueError: a loop whose length is not known beforehand.

    Example:
      >>> shape = lambda *axes: jax.ShapeDtypeStruct(axes, jnp.float32)
      >>> count(lambda w, x: (x @ w).sum(), shape(3, 5), shape(2, 3))
      Flops(forward=60, backward=60, recomputed=0)
    """
    closed = jax.make_jaxpr(function)(trained, *rest)
    jaxpr, used = dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
    count_of_trained = len(jax.tree.leaves(trained))
    active = [number < count_of_trained for number, kept in enumerate(used) if kept]
    return _walk(jaxpr, active)[0]


def _walk(jaxpr: Any, active: Sequence[bool]) -> tuple[Flops, list[bool]]:
    """Operations of a jaxpr -> (count, which outputs depend on something trained); `active`: which inputs do."""
    found = dict(zip(jaxpr.invars, active, strict=True))
    total = Flops()

    def depends(atom: Any) -> bool:
        return not isinstance(atom, Literal) and found.get(atom, False)

    for equation in jaxpr.eqns:
        inputs = [depends(atom) for atom in equation.invars]
        cost, outputs = _operation(equation, inputs)
        total += cost
        for variable, output in zip(equation.outvars, outputs, strict=True):
            found[variable] = output and jnp.issubdtype(variable.aval.dtype, jnp.inexact)
    return total, [depends(atom) for atom in jaxpr.outvars]


def _operation(equation: Any, active: list[bool]) -> tuple[Flops, list[bool]]:
    name, params = equation.primitive.name, equation.params
    everywhere = [any(active)] * len(equation.outvars)
    if name in ("dot_general", "conv_general_dilated"):
        one = _dot(equation) if name == "dot_general" else _convolution(equation)
        return Flops(one, one * sum(active[:2])), everywhere
    if name == "stop_gradient":
        return Flops(), [False] * len(equation.outvars)
    if name == "scan":
        return _scan(equation, active)
    if name == "while":
        parts = [_opened(params[part]) for part in ("cond_jaxpr", "body_jaxpr")]
        inside = [_walk(part, [False] * len(part.invars))[0] for part in parts]
        if any(cost.total for cost in inside):
            raise ValueError("flops: a loop of unknown length has products in it; use a scan")
        return Flops(), everywhere
    if name == "cond":  # the dearest branch
        branches = [_walk(_opened(branch), active[1:]) for branch in params["branches"]]
        outputs = [any(flags) for flags in zip(*(flags for _, flags in branches), strict=True)]
        return max((cost for cost, _ in branches), key=lambda cost: cost.total), outputs
    if called := next((key for key in ("jaxpr", "call_jaxpr", "fun_jaxpr") if key in params), None):
        cost, outputs = _walk(_opened(params[called]), active)  # of jit, remat, custom derivatives
        if name.startswith(("remat", "checkpoint")) and any(active):
            cost = dataclasses.replace(cost, recomputed=cost.forward)
        return cost, outputs
    return Flops(), everywhere


def _opened(jaxpr: Any) -> Any:
    """Without the constants that it may be closed over."""
    return getattr(jaxpr, "jaxpr", jaxpr)


def _scan(equation: Any, active: list[bool]) -> tuple[Flops, list[bool]]:
    """Turn by turn, since what the first turn is given may depend on nothing trained where what it hands on does."""
    body, length = _opened(equation.params["jaxpr"]), equation.params["length"]
    # Constants, carry, slices -> carry, slices. Parameters that count them differ between versions of JAX; what is cut
    # into slices, or put together from them, has an axis more outside.
    slices, stacked = (
        sum(outer.aval.ndim > inner.aval.ndim for outer, inner in zip(outside, inside, strict=True))
        for outside, inside in ((equation.invars, body.invars), (equation.outvars, body.outvars))
    )
    carried = len(equation.outvars) - stacked
    constants = len(equation.invars) - slices - carried
    state, total = active[constants : constants + carried], Flops()
    outputs = [False] * len(body.outvars)
    for turn in range(length):
        given = [*active[:constants], *state, *active[constants + carried :]]
        cost, found = _walk(body, given)
        outputs = [*found[:carried], *(a or b for a, b in zip(outputs[carried:], found[carried:], strict=True))]
        if found[:carried] == state:  # and so it stays
            return total + cost * (length - turn), outputs
        total, state = total + cost, found[:carried]
    return total, outputs


def _dot(equation: Any) -> int:
    left, right = (atom.aval.shape for atom in equation.invars[:2])
    (contracted, _), (batch, _) = equation.params["dimension_numbers"]
    shared = math.prod(left[axis] for axis in (*contracted, *batch))
    return 2 * math.prod(left) * math.prod(right) // shared


def _convolution(equation: Any) -> int:
    """Every output is a sum over the window and a group's input channels; zeros between inputs are not counted."""
    kernel, params = equation.invars[1].aval.shape, equation.params
    per_output = math.prod(kernel) // kernel[params["dimension_numbers"].rhs_spec[0]]
    return 2 * math.prod(equation.outvars[0].aval.shape) * per_output // math.prod(params["lhs_dilation"])
