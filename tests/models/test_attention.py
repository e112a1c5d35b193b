"""Attention: all implementations give one result, and cuDNN's is chosen only where it works."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tap_jax import assembly
from tap_jax.errors import UserError
from tap_jax.models.attention import attention, why_not_cudnn

ROWS = ({"ag_news": 0.5}, {"ag_news": 0.5})


def stand_in(asked, wrong=1.0):
    """`jax.nn.dot_product_attention` for any implementation, with what JAX demands of cuDNN's."""
    genuine = jax.nn.dot_product_attention

    def call(q, k, v, *, mask=None, query_seq_lengths=None, key_value_seq_lengths=None, implementation):
        asked.append((implementation, q.shape[1]))
        if implementation == "cudnn":
            assert q.shape[1] % 2 == 0 and q.dtype == jnp.bfloat16
            assert mask is None or mask.shape[1:] == (1, q.shape[1], q.shape[1]), "of packed sequences"
            lengths = {"query_seq_lengths": query_seq_lengths, "key_value_seq_lengths": key_value_seq_lengths}
            return wrong * genuine(q, k, v, mask=mask, **lengths, implementation="xla")
        return genuine(q, k, v, mask=mask, implementation=implementation)

    return call


@pytest.mark.parametrize("implementation", ["einsum", "xla", "cudnn"])
def test_packed_sequences_are_as_texts_by_themselves(monkeypatch, implementation):
    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in([]))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 8, 6)), jnp.bfloat16)
    segments = jnp.array([[0, 0, 0, 1, 1, -1, -1, -1], [2, 3, 3, 3, 3, 3, 3, -1]])
    mask = segments[:, :, None] == segments[:, None, :]
    found = attention(x, 2 * x, 3 * x, mask, heads=2, implementation=implementation)
    for row, first, last in ((0, 0, 3), (0, 3, 5), (1, 0, 1), (1, 1, 7)):
        alone = x[row : row + 1, first:last]
        expected = attention(alone, 2 * alone, 3 * alone, None, heads=2, implementation="einsum")
        np.testing.assert_allclose(np.float32(found[row, first:last]), np.float32(expected[0]), atol=0.05)


@pytest.mark.parametrize("length", [5, 6])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("implementation", ["xla", "cudnn"])
def test_as_einsum(monkeypatch, length, padded, implementation):
    """Values and gradients, for odd and even lengths, of rows side by side that share a mask or have their own."""
    asked = []
    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in(asked))
    x = np.random.default_rng(0).standard_normal((2, 3, length, 16)).astype(jnp.bfloat16)
    real = np.arange(length) < np.array([[[length], [2], [3]], [[1], [length], [4]]])
    masks = [None] if not padded else [real, real[0]]
    for mask in masks:

        def total(x, name, mask=mask):
            def each(row, mask):
                return attention(row, 2 * row, 3 * row, mask, heads=2, implementation=name)

            out = jax.vmap(each, (0, 0 if mask is not None and mask.ndim == 3 else None))(x, mask).astype(jnp.float32)
            return (out**2).sum(), out

        found, expected = (jax.grad(total, has_aux=True)(x, name) for name in (implementation, "einsum"))
        for ours, theirs in zip(found, expected, strict=True):
            ours, theirs = np.float32(ours), np.float32(theirs)
            np.testing.assert_allclose(ours, theirs, atol=0.05 * np.abs(theirs).max())
    assert set(asked) == {(implementation, length + (implementation == "cudnn" and length % 2))}


def test_cudnn_is_tried_and_compared(monkeypatch):
    """As training uses it: its gradient too, at every length, and a result that is off is no result."""
    try_it = why_not_cudnn.__wrapped__
    assert try_it(2, 16, (5,), "float32") == "it does not compute in float32"
    reason = try_it(2, 16, (5,), "bfloat16")
    assert "cuDNN" in reason, "no GPU here"
    asked = []
    with monkeypatch.context() as patch:
        patch.setattr(jax.nn, "dot_product_attention", stand_in(asked))
        assert try_it(2, 16, (5, 8), "bfloat16") == ""
        assert {length for name, length in asked if name == "cudnn"} == {6, 8}
    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in(asked, wrong=1.2))
    assert try_it(2, 16, (5,), "bfloat16").startswith("its results are off by ")


@pytest.mark.parametrize(("reason", "chosen"), [("", "cudnn"), ("RuntimeError: no plan", "xla")])
def test_auto_on_a_gpu(tiny, monkeypatch, reason, chosen):
    tried = []

    def trial(*args):
        tried.append(args)
        return reason

    config = tiny(ROWS, {"compute_dtype": "bfloat16"})
    found = assembly.cut(config)
    assert found.model.attention == "auto" and not found.notes, "on a CPU"
    assert not tried
    monkeypatch.setattr(assembly, "why_not_cudnn", trial)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    found = assembly.cut(config)
    assert found.model.attention == chosen
    assert tried == [(2, 8, (5, 16), "bfloat16")]
    (note,) = found.notes
    assert f"engine.attention: '{chosen}'" in note and reason in note
    for given in ("einsum", "xla", *["cudnn"] * (not reason)):
        config.engine.attention = given
        found = assembly.cut(config)
        assert found.model.attention == given and not found.notes


def test_cudnn_that_cannot_be_had_is_the_users_error(tiny, monkeypatch):
    config = tiny(ROWS, {"compute_dtype": "bfloat16", "engine.attention": "cudnn"})
    with pytest.raises(UserError, match="engine.attention: 'cudnn' cannot be had .no NVIDIA GPU .*use 'auto'"):
        assembly.cut(config)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(assembly, "why_not_cudnn", lambda *args: "it is old")
    with pytest.raises(UserError, match="cannot be had .it is old."):
        assembly.cut(config)


def test_second_derivatives_are_xlas(tiny, monkeypatch):
    fields = {"compute_dtype": "bfloat16", "method": "per_fedavg", "variants": ("per-fedavg",)}
    config = tiny(ROWS, fields | {"per_fedavg.hessian": "exact"})
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(assembly, "why_not_cudnn", lambda *args: "")
    assert assembly.cut(config).model.attention == "xla"
    config.per_fedavg.hessian = "none"
    assert assembly.cut(config).model.attention == "cudnn"
