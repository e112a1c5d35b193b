"""What a compiled program does, read from the text of its optimised HLO.

A loop is an HLO `while`; what it runs is its body and condition and whatever they call.
"""

import dataclasses
import functools
import re
from collections import Counter
from collections.abc import Iterator, Mapping

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
_TRANSFERS = ("infeed", "outfeed", "send", "recv")
_HOST_CALLS = re.compile(r"MoveToHost|MoveToDevice|xla_python|HostExecute|callback", re.IGNORECASE)
_TO_HOST = re.compile(r"S\(5\).* copy(-start|-done)?\(")  # XLA's memory space of the host
PRODUCTS = ("dot", "convolution", "ragged-dot")
GEMM = re.compile(r"__cublas|gemm|cudnn\$conv|__onednn", re.IGNORECASE)
_SHAPE = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")
_INSTRUCTION = re.compile(r"^\s*(ROOT )?%?([\w.-]+) = (.*)$")
_CALLED = re.compile(
    r"(?:body|condition|to_apply|calls|branch_computations|called_computations)=(?:\{([^}]*)\}|%?([\w.-]+))"
)


@dataclasses.dataclass(frozen=True)
class Shape:
    """One array: its element type as HLO writes it ("f32"), and its sizes."""

    dtype: str
    sizes: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.sizes))}]"


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      name: without the percent sign. operation: "dot", "fusion", ...
      shapes: of what it yields, one for each array of a tuple.
      operands: names. called: computations. text: all of it.
    """

    name: str
    operation: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    called: tuple[str, ...]
    text: str

    @property
    def target(self) -> str:
        """Of a custom call: what it calls."""
        found = re.search(r'custom_call_target="([^"]*)"', self.text)
        return found[1] if found else ""


class Program:
    """The computations of a module, by name.

    Args:
      text: of `jax.stages.Compiled.as_text`.
    """

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        inside: dict[str, Instruction] | None = None
        for line in text.splitlines():
            if inside is None or not line.startswith(" "):
                if line.endswith("{") and (begun := re.match(r"(ENTRY )?%?([\w.-]+) ", line)) and "->" in line:
                    inside = self.computations[begun[2]] = {}
                    self.entry = begun[2] if begun[1] else self.entry
                elif line.startswith("}"):
                    inside = None
            elif found := _instruction(line):
                inside[found.name] = found

    def __iter__(self) -> Iterator[tuple[str, Instruction]]:
        """(Computation, instruction) of all."""
        for name, inside in self.computations.items():
            for one in inside.values():
                yield name, one

    @functools.cached_property
    def _calls(self) -> dict[str, set[str]]:
        calls: dict[str, set[str]] = {name: set() for name in self.computations}
        for name, one in self:
            calls[name] |= set(one.called) & calls.keys()
        return calls

    def reached(self, *names: str) -> set[str]:
        """These computations and whatever they call."""
        found, queue = set(), [name for name in names if name in self.computations]
        while queue:
            name = queue.pop()
            if name not in found:
                found.add(name)
                queue += self._calls[name]
        return found

    @functools.cached_property
    def loops(self) -> list[Instruction]:
        """All of them."""
        return [one for _, one in self if one.operation == "while"]

    def trips(self, loop: Instruction) -> int | None:
        """How often a loop runs, where the program tells.

        It may stand with the loop, as known_trip_count. In programs for TPUs it does not; there the condition compares
        the number of the turn with a constant.
        """
        if found := re.search(r'known_trip_count"?:?\s*[={]\s*\{?"?n"?:\s*"?(\d+)', loop.text):
            return int(found[1])
        for scope in (self.computations.get(name, {}) for name in loop.called):
            for one in scope.values():
                if one.operation == "compare" and one.text.startswith("ROOT ") and "direction=LT" in one.text:
                    limit = scope.get(one.operands[1])
                    found = limit and re.search(r"constant\((\d+)\)", limit.text)
                    return int(found[1]) if found else None
        return None

    def body(self, loop: Instruction) -> set[str]:
        """The computations that a loop runs."""
        return self.reached(*loop.called)

    @functools.cached_property
    def looped(self) -> set[str]:
        """The computations that run within some loop."""
        return set().union(*map(self.body, self.loops)) if self.loops else set()


def collectives(program: Program) -> tuple[Counter, Counter]:
    """(Inside loops, outside of them): kind -> how many stand in the program."""
    inside, outside = Counter(), Counter()
    for name, one in program:
        kind = one.operation.removesuffix("-start")
        if kind in COLLECTIVES:
            (inside if name in program.looped else outside)[kind] += 1
    return inside, outside


def host_transfers(program: Program) -> list[str]:
    """Instructions that move something between host and device, or call the host."""
    found = []
    for _, one in program:
        name = one.operation.removesuffix("-done")
        calls = one.operation == "custom-call" and _HOST_CALLS.search(one.target)
        if name in _TRANSFERS or calls or (name.startswith("copy") and _TO_HOST.search(one.text)):
            found.append(one.name)
    return found


def row_loops(program: Program) -> int:
    """How many bodies were compiled that run once per row.

    These are the loops within the loop over steps whose number of turns is data and that multiply matrices; scans over
    layers have as many turns as layers.
    """
    return sum(
        any(loop.name in program.computations[name] for name in program.looped)
        and program.trips(loop) is None
        and any(
            one.operation in PRODUCTS or (one.operation == "custom-call" and GEMM.search(one.target))
            for name in program.body(loop)
            for one in program.computations[name].values()
        )
        for loop in program.loops
    )


def short(counts: Mapping[str, int]) -> str:
    """Counts as "2 all-reduce, 1 all-gather"; "none" without any."""
    return ", ".join(f"{number} {kind}" for kind, number in sorted(counts.items())) or "none"


def _instruction(line: str) -> Instruction | None:
    found = _INSTRUCTION.match(line)
    if not found:
        return None
    rest = found[3]
    kind, rest = _split(rest)
    operation = re.match(r"\s*([\w-]+)\(", rest)
    if not operation:
        return None
    start = operation.end()
    end = _closing(rest, start - 1)
    operands = re.findall(r"%([\w.-]+)", rest[start:end]) or re.findall(r"([\w.-]+)(?:,|$)", rest[start:end])
    called = [name.strip().lstrip("%") for group in _CALLED.findall(rest[end:]) for name in "".join(group).split(",")]
    shapes = tuple(
        Shape(dtype, tuple(int(size) for size in sizes.split(",") if size)) for dtype, sizes in _SHAPE.findall(kind)
    )
    return Instruction(found[2], operation[1], shapes, tuple(operands), tuple(filter(None, called)), line.strip())


def _split(text: str) -> tuple[str, str]:
    """(Type, rest): a tuple's type ends with its parenthesis, any other at the first blank."""
    if text.startswith("("):
        end = _closing(text, 0)
        return text[: end + 1], text[end + 1 :]
    kind, _, rest = text.partition(" ")
    return kind, rest


def _closing(text: str, start: int) -> int:
    """Where the parenthesis that opens at `start` closes."""
    depth = 0
    for place in range(start, len(text)):
        depth += (text[place] == "(") - (text[place] == ")")
        if depth == 0:
            return place
    return len(text)
