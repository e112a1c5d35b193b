"""Optimised HLO is read as it is written, by hand and by a compiler."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from tap_jax.planning.targets import hlo
from tests.targets.float32 import float32_products, float32_residuals

TRIPS = 'backend_config={"known_trip_count":{"n":"3"}}'
TEXT = """HloModule small, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%rows_body (p.1: (s32[], f32[64,64])) -> (s32[], f32[64,64]) {
  %p.1 = (s32[], f32[64,64]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%p.1), index=0
  %m.1 = f32[64,64]{1,0} get-tuple-element(%p.1), index=1
  %w.1 = bf16[64,64]{1,0} convert(%m.1)
  %d.1 = f32[64,64]{1,0:T(8,128)} dot(%w.1, %w.1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %d.2 = f32[64,64]{1,0} dot(%m.1, %d.1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %t.1 = (s32[], f32[64,64]{1,0}) tuple(%i.1, %d.2)
}

%rows_condition (p.2: (s32[], f32[64,64])) -> pred[] {
  %p.2 = (s32[], f32[64,64]{1,0}) parameter(0)
  ROOT %c.2 = pred[] constant(false)
}

%layers_body (p.5: (s32[], f32[3,8,64])) -> (s32[], f32[3,8,64]) {
  ROOT %p.5 = (s32[], f32[3,8,64]{2,1,0}) parameter(0)
}

%steps_body (p.3: (s32[], f32[64,64])) -> (s32[], f32[64,64]) {
  %p.3 = (s32[], f32[64,64]{1,0}) parameter(0)
  %r.3 = (s32[], f32[64,64]{1,0}) while(%p.3), condition=%rows_condition, body=%rows_body
  %k.3 = (s32[], f32[3,8,64]{2,1,0}) while(%q.3), condition=%rows_condition, body=%layers_body, TRIPS
  %g.3 = f32[64,64]{1,0} get-tuple-element(%r.3), index=1
  %i.3 = s32[] get-tuple-element(%r.3), index=0
  %a.3 = f32[64,64]{1,0} all-reduce-start(%g.3), replica_groups={{0,1}}, to_apply=%add
  %b.3 = f32[64,64]{1,0} all-reduce-done(%a.3)
  ROOT %t.3 = (s32[], f32[64,64]{1,0}) tuple(%i.3, %b.3)
}

ENTRY %main (x.4: f32[64,64]) -> f32[64,64] {
  %x.4 = f32[64,64]{1,0} parameter(0)
  %z.4 = s32[] constant(0)
  %t.4 = (s32[], f32[64,64]{1,0}) tuple(%z.4, %x.4)
  %w.4 = (s32[], f32[64,64]{1,0}) while(%t.4), condition=%rows_condition, body=%steps_body
  %h.4 = f32[64,64]{1,0:S(5)} copy(%x.4)
  %n.4 = f32[64,64]{1,0:T(8,128)S(1)} copy(%x.4)
  %o.4 = f32[64,64]{1,0} all-gather(%x.4), dimensions={0}
  ROOT %g.4 = f32[64,64]{1,0} get-tuple-element(%w.4), index=1
}
"""


@pytest.fixture(scope="module")
def program():
    return hlo.Program(TEXT.replace("TRIPS", TRIPS))


def test_computations_and_loops(program):
    assert program.entry == "main"
    assert [loop.name for loop in program.loops] == ["r.3", "k.3", "w.4"]
    assert [program.trips(loop) for loop in program.loops] == [None, 3, None]
    assert program.looped == {"rows_body", "rows_condition", "layers_body", "steps_body", "add"}


def test_a_loop_whose_condition_compares_with_a_constant():
    """As compilers for TPUs leave it, without known_trip_count."""
    condition = "%turn = s32[] get-tuple-element(%p.2), index=0\n  %n = s32[]{:T(128)} constant(3)\n"
    known = TEXT.replace("TRIPS", "").replace(
        "ROOT %c.2 = pred[] constant(false)",
        condition + "  ROOT %c.2 = pred[]{:T(512)} compare(%turn, %n), direction=LT, metadata={}",
    )
    found = hlo.Program(known)
    assert [found.trips(loop) for loop in found.loops] == [3, 3, 3] and hlo.row_loops(found) == 0
    data = hlo.Program(known.replace("%n = s32[]{:T(128)} constant(3)", "%n = s32[] get-tuple-element(%p.2), index=1"))
    assert [data.trips(loop) for loop in data.loops] == [None] * 3


def test_collectives_by_where_they_are(program):
    inside, outside = hlo.collectives(program)
    assert dict(inside) == {"all-reduce": 1} and dict(outside) == {"all-gather": 1}
    assert hlo.short(inside) == "1 all-reduce" and hlo.short({}) == "none"


def test_host_transfers(program):
    assert hlo.host_transfers(program) == ["h.4"]


def test_row_loops(program):
    assert hlo.row_loops(program) == 1  # the loop over steps is none, and neither is that over layers


def test_float32_products(program):
    found = float32_products(program, 64)
    assert found == ["dot f32[64,64] x f32[64,64] (d.2)"]  # operands in bfloat16 may have sums in float32
    assert float32_products(program, 65) == []


def test_float32_residuals(program):
    assert float32_residuals(program, 3, 8 * 64) == ["f32[3,8,64] (k.3)"]
    assert float32_residuals(program, 3, 8 * 64 + 1) == []


def test_a_compiled_program():
    """A loop of unknown length around a product, with a sum over devices behind each."""
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    spec = PartitionSpec("x")

    def local(matrix, turns):
        def inner(_, m):
            return jnp.tanh(m @ m)

        def step(_, m):
            return jax.lax.psum(jax.lax.fori_loop(0, turns, inner, m), "x")

        return jax.lax.fori_loop(0, turns, step, matrix[0])[None]

    function = jax.shard_map(local, mesh=mesh, in_specs=(spec, PartitionSpec()), out_specs=spec, check_vma=False)
    shape = jax.ShapeDtypeStruct((2, 48, 48), np.float32, sharding=NamedSharding(mesh, spec))
    compiled = jax.jit(function).lower(shape, jax.ShapeDtypeStruct((), np.int32)).compile()
    program = hlo.Program(compiled.as_text())
    inside, outside = hlo.collectives(program)
    assert dict(inside) == {"all-reduce": 1} and not outside
    assert hlo.row_loops(program) == 1
    assert hlo.host_transfers(program) == []
    assert len(float32_products(program, 48)) == 1
