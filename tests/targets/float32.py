"""What a compiled program does in float32 that it need not."""

import math

from tap_jax.planning.targets.hlo import GEMM, PRODUCTS, Program


def float32_products(program: Program, width: int) -> list[str]:
    """Products of float32 matrices with a side of at least `width`, as text.

    A product whose operands are all narrower than float32 may yield float32: its sums are.
    """
    found = []
    for name, one in program:
        gemm = one.operation == "custom-call" and GEMM.search(one.target)
        if one.operation not in PRODUCTS and not gemm:
            continue
        scope = program.computations[name]
        operands = [
            scope[operand].shapes[0] for operand in one.operands[:2] if operand in scope and scope[operand].shapes
        ]
        wide = [shape for shape in operands if shape.dtype == "f32" and max(shape.sizes, default=0) >= width]
        if wide and len(operands) == 2 and all(shape.dtype == "f32" for shape in operands):
            found.append(f"{one.operation} {' x '.join(map(str, operands))} ({one.name})")
    return found


def float32_residuals(program: Program, layers: int, elements: int) -> list[str]:
    """What scans over layers keep in float32 for the backward pass: arrays [layers, ..., D].

    Args:
      layers: of a scan. elements: that an array has at least for each of them.
    """
    found = set()
    for loop in program.loops:
        if program.trips(loop) in (None, layers):
            found |= {
                f"{shape} ({loop.name})"
                for shape in loop.shapes
                if shape.dtype == "f32"
                and len(shape.sizes) > 2
                and shape.sizes[0] == layers
                and math.prod(shape.sizes) >= layers * elements
            }
    return sorted(found)
