"""Losses of factored logits, block by block, against the same of whole logits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tap_jax.methods import losses
from tap_jax.methods.losses import distillation_loss, task_loss, token_cross_entropy, token_divergence
from tap_jax.planning.flops import count
from tap_jax.token_logits import TokenLogits

D, V = 12, 37


def factors(seed, *shape, dtype=np.float32):
    rng = np.random.default_rng(seed)
    hidden = jnp.asarray(rng.standard_normal((*shape, D)), dtype)
    return TokenLogits(hidden, jnp.asarray(rng.standard_normal((D, V)), jnp.float32))


def close(found, expected, tolerance):
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, atol=tolerance * np.abs(other).max())


@pytest.fixture(params=[8, 16, 24, 40, 64], ids=lambda size: f"blocks_of_{size}")
def size(request, monkeypatch):
    monkeypatch.setattr(losses, "TOKENS_PER_BLOCK", request.param)
    return request.param


@pytest.mark.usefixtures("size")
@pytest.mark.parametrize("shape", [(5, 9), (2, 3, 7), (45,)])
def test_any_number_of_blocks_gives_the_same_losses_and_gradients(shape):
    student, teacher = factors(0, *shape), factors(1, *shape)
    targets = np.random.default_rng(2).integers(0, V, shape).astype(np.int32)
    weights = np.random.default_rng(3).standard_normal(shape).astype(np.float32)

    def blocks(student):
        kl = token_divergence(teacher, student, temperature=1.7)
        assert kl.shape == shape
        return (weights * token_cross_entropy(student, targets)).sum() + (weights * kl).sum()

    def plain(student):
        z, t = student.hidden @ student.projection, teacher.hidden @ teacher.projection
        log_t, log_s = (jax.nn.log_softmax(x / 1.7) for x in (t, z))
        kl = (jnp.exp(log_t) * (log_t - log_s)).sum(-1)
        return (weights * (optax.softmax_cross_entropy_with_integer_labels(z, targets) + kl)).sum()

    close(jax.jit(jax.value_and_grad(blocks))(student), jax.jit(jax.value_and_grad(plain))(student), 1e-6)


@pytest.mark.usefixtures("size")
def test_losses_of_samples_are_those_of_whole_logits():
    """Also where rows lie side by side, and where a gradient is differentiated forwards (exact Per-FedAvg)."""
    student, teacher = factors(0, 3, 4, 6), factors(1, 3, 4, 6)
    answers = np.random.default_rng(2).integers(1, V, (3, 4, 7)) * (np.arange(7) < [[3], [7], [5], [1]])
    batch = {"answers": answers.astype(np.int32)}

    def total(student, teacher, batch):
        kl = distillation_loss("text_generation", teacher, student, batch, temperature=2.0, power=2.0)
        return (task_loss("text_generation", student, batch) + kl) @ jnp.arange(1.0, 5)

    def over_rows(hidden, read):
        row = lambda h, t, b: total(read(student._replace(hidden=h)), read(teacher._replace(hidden=t)), b)  # noqa: E731
        return jax.vmap(row)(hidden, teacher.hidden, batch).sum()

    blocks, whole = (functools.partial(over_rows, read=read) for read in (lambda z: z, TokenLogits.whole))
    hidden = student.hidden
    close(jax.value_and_grad(blocks)(hidden), jax.value_and_grad(whole)(hidden), 1e-6)
    close(*(jax.jvp(jax.grad(one), (hidden,), (teacher.hidden,))[1] for one in (blocks, whole)), 1e-5)


def test_one_block_is_the_same_program_as_whole_logits():
    student, batch = factors(0, 3, 6), {"answers": np.ones((3, 7), np.int32)}
    program = lambda read: str(jax.make_jaxpr(lambda z: task_loss("text_generation", read(z), batch))(student))  # noqa: E731
    assert program(lambda z: z) == program(TokenLogits.whole)


def test_neither_pass_holds_more_logits_than_a_block(monkeypatch):
    """What is kept between the passes is smaller than one block of float32 logits; in bfloat16, products are too."""
    monkeypatch.setattr(losses, "TOKENS_PER_BLOCK", 16)
    student, teacher = factors(0, 8, 32, dtype=jnp.bfloat16), factors(1, 8, 32, dtype=jnp.bfloat16)
    targets = np.ones((8, 32), np.int32)

    def total(student):
        return (token_cross_entropy(student, targets) + token_divergence(teacher, student)).sum()

    _, pullback = jax.vjp(total, student)
    assert max(x.size for x in jax.tree.leaves(pullback) if x.dtype == jnp.float32) <= max(16 * V, D * V)
    program = jax.jit(jax.grad(total)).lower(student).as_text()
    products = [line for line in program.splitlines() if "dot_general" in line]
    assert products and not any("f32" in line.split(":")[-1].split("->")[0] for line in products)


def test_what_blocks_compute_again_is_counted(monkeypatch):
    product = 2 * 45 * D * V
    student, targets = factors(0, 45), np.ones(45, np.int32)
    total = lambda z: token_cross_entropy(z, targets).sum()  # noqa: E731
    assert count(total, student).forward == product and count(total, student).recomputed == 0
    monkeypatch.setattr(losses, "TOKENS_PER_BLOCK", 15)
    found = count(lambda z: total(z), student)  # a new function, which no cache knows
    padded = 2 * 48 * D * V
    assert (found.forward, found.backward, found.recomputed) == (padded, 2 * padded, padded)
