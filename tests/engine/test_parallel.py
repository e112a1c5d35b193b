"""Dealing clients to devices."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tap_jax.engine.parallel import deal, devices
from tap_jax.errors import UserError


@settings(deadline=None)
@given(st.lists(st.integers(0, 20), max_size=12), st.integers(1, 5), st.integers(0, 2))
def test_everybody_sits_once_and_loads_are_even(work, shards, spare):
    positions = max(1, -(-len(work) // shards) + spare)
    clients = [10 + 3 * n for n in range(len(work))]
    table = deal(clients, work, shards=shards, positions=positions)
    assert table.shape == (shards, positions)
    assert sorted(table[table >= 0]) == clients
    # Longest first: with room everywhere no load exceeds another by more than the largest client.
    loads = [sum(work[clients.index(k)] for k in row if k >= 0) for row in table]
    if positions >= len(work):
        assert max(loads) - min(loads) <= max(work, default=0)
    assert np.array_equal(table, deal(clients, work, shards=shards, positions=positions))


def test_more_devices_than_there_are_is_an_error():
    assert devices(3).size == 3
    assert devices().size == len(jax.devices()) == 8
    with pytest.raises(UserError, match="mesh.clients: 9 of 8 devices"):
        devices(9)
