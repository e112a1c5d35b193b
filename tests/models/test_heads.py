"""Decoders against PyTorch and transformers: values, gradients, decoding, parameter counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from tap_jax.errors import UserError
from tap_jax.models import heads

B, P, A, D, V = 3, 5, 6, 16, 29
MAX_LENGTH = 9


@pytest.fixture(autouse=True)
def strict():
    """Full float32 products; nothing is promoted silently."""
    with (
        jax.default_matmul_precision("highest"),
        jax.numpy_dtype_promotion("strict"),
        jax.numpy_rank_promotion("raise"),
    ):
        yield


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def initialise(head, *args, **kwargs):
    """Random parameters, biases and LayerNorms included, so that no term is hidden behind a 0 or a 1."""
    params = head.init(jax.random.key(0), *args, **kwargs)["params"]
    leaves, tree = jax.tree.flatten(params)
    return jax.tree.unflatten(tree, [x + 0.1 * normal(i, *x.shape) for i, x in enumerate(leaves)])


def count(head, *args, **kwargs):
    shapes = jax.eval_shape(lambda: head.init(jax.random.key(0), *args, **kwargs))
    return sum(x.size for x in jax.tree.leaves(shapes["params"]))


def fill(parameter, value):
    with torch.no_grad():
        assert parameter.shape == value.shape
        parameter.copy_(torch.tensor(np.asarray(value)))


def fill_linear(layer, params):
    fill(layer.weight, params["kernel"].T)
    fill(layer.bias, params["bias"])


def fill_norm(layer, params):
    fill(layer.weight, params["scale"])
    fill(layer.bias, params["bias"])


def fill_deconv(layer, params):
    fill(layer.weight, params["kernel"].transpose(0, 3, 1, 2))
    fill(layer.bias, params["bias"])


FLAVA = heads.ClassificationHead(7, hidden=(D // 2,), activation="relu", dropout=0.3, layer_norm=False)
VILT = heads.ClassificationHead(7, hidden=(4 * D, D + 2), activation="gelu", dropout=0.1, layer_norm=True)


def torch_classification(head, params):
    first, last = torch.nn.Linear(D, head.hidden[0]), torch.nn.Linear(head.hidden[-1], 7)
    fill_linear(first, params["hidden_0"])
    fill_linear(last, params["output"])
    if head is FLAVA:
        return torch.nn.Sequential(first, torch.nn.ReLU(), torch.nn.Dropout(0.3), last).eval()
    norm, second = torch.nn.LayerNorm(head.hidden[0]), torch.nn.Linear(*head.hidden)
    fill_norm(norm, params["layer_norm"])
    fill_linear(second, params["hidden_1"])
    gelu = torch.nn.GELU()
    return torch.nn.Sequential(first, norm, gelu, torch.nn.Dropout(0.1), second, gelu, last).eval()


@pytest.mark.parametrize("head", [FLAVA, VILT], ids=["flava", "vilt"])
def test_classification_equals_torch(head):
    pooled = normal(1, B, D)
    params = initialise(head, pooled, deterministic=True)
    logits = head.apply({"params": params}, pooled, deterministic=True)
    with torch.no_grad():
        expected = torch_classification(head, params)(torch.tensor(pooled)).numpy()
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)


def test_transposed_conv_equals_torch_with_gradients():
    x, upstream = normal(1, 2, 3, 5, 4), normal(2, 2, 6, 10, 3)
    conv = heads.TransposedConv(3)
    params = initialise(conv, x)
    y, pullback = jax.vjp(lambda p, x: conv.apply({"params": p}, x), params, x)
    grads, grad_x = pullback(jnp.asarray(upstream))

    twin = torch.nn.ConvTranspose2d(4, 3, kernel_size=4, stride=2, padding=1)
    fill_deconv(twin, params)
    x_torch = torch.tensor(x.transpose(0, 3, 1, 2), requires_grad=True)
    expected = twin(x_torch)
    expected.backward(torch.tensor(upstream.transpose(0, 3, 1, 2)))

    close = dict(rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(y.transpose(0, 3, 1, 2), expected.detach(), **close)
    np.testing.assert_allclose(grad_x.transpose(0, 3, 1, 2), x_torch.grad, **close)
    np.testing.assert_allclose(grads["kernel"].transpose(0, 3, 1, 2), twin.weight.grad, **close)
    np.testing.assert_allclose(grads["bias"], twin.bias.grad, **close)


def test_image_head_equals_torch():
    pooled = normal(1, B, D)
    head = heads.ImageHead(channels=(6, 5, 4), seed_size=2)
    params = initialise(head, pooled)
    seed = torch.nn.Linear(D, 6 * 2 * 2)
    fill_linear(seed, params["seed"])
    deconvs = [torch.nn.ConvTranspose2d(i, o, 4, 2, 1) for i, o in ((6, 5), (5, 4), (4, 3))]
    for index, deconv in enumerate(deconvs):
        fill_deconv(deconv, params[f"deconv_{index}"])
    with torch.no_grad():
        x = seed(torch.tensor(pooled)).view(B, 6, 2, 2)
        x = deconvs[2](deconvs[1](deconvs[0](x).relu()).relu())
    images = head.apply({"params": params}, pooled)
    assert images.shape == (B, 16, 16, 3) and images.dtype == jnp.float32
    np.testing.assert_allclose(images, x.permute(0, 2, 3, 1), rtol=1e-5, atol=1e-5)


def text_head(**changes):
    return heads.TextHead(vocab=V, max_length=MAX_LENGTH, width=D, inner=24, **changes)


class TorchText(torch.nn.Module):
    """The text head out of parts of PyTorch and transformers."""

    def __init__(self):
        super().__init__()
        config = transformers.GPT2Config(
            vocab_size=1, n_positions=MAX_LENGTH, n_embd=D, n_layer=1, n_head=4, n_inner=24, attn_implementation="eager"
        )
        self.wte, self.position = torch.nn.Embedding(V, D), torch.nn.Embedding(MAX_LENGTH, D)
        self.conditioning = torch.nn.MultiheadAttention(D, 8, batch_first=True)
        self.gpt2 = transformers.GPT2Model(config)
        self.output = torch.nn.Linear(D, V, bias=False)

    def table(self, params):
        """(parameter, the same in JAX), for values as for gradients."""
        block, h, attention = params["block"], self.gpt2.h[0], params["conditioning"]
        yield self.wte.weight, params["wte"]
        yield self.position.weight, params["position"]
        yield self.gpt2.wpe.weight, params["wpe"]
        yield self.output.weight, params["output"].T
        yield self.conditioning.in_proj_weight, attention["in_proj_kernel"].T
        yield self.conditioning.in_proj_bias, attention["in_proj_bias"]
        yield self.conditioning.out_proj.weight, attention["out_proj"]["kernel"].T
        yield self.conditioning.out_proj.bias, attention["out_proj"]["bias"]
        norms = (h.ln_1, block["ln_1"]), (h.ln_2, block["ln_2"]), (self.gpt2.ln_f, params["ln_f"])
        for norm, ours in norms:
            yield norm.weight, ours["scale"]
            yield norm.bias, ours["bias"]
        for part, name in (("attn", "c_attn"), ("attn", "c_proj"), ("mlp", "c_fc"), ("mlp", "c_proj")):
            conv1d = getattr(getattr(h, part), name)
            yield conv1d.weight, block[f"{part}_{name}"]["kernel"]
            yield conv1d.bias, block[f"{part}_{name}"]["bias"]

    def forward(self, vectors, ids):
        position = self.position.weight[: ids.shape[1]].expand(len(ids), -1, -1)
        condition, _ = self.conditioning(position, vectors, vectors)
        return self.output(self.gpt2(inputs_embeds=self.wte(ids) + position + condition).last_hidden_state)


@pytest.mark.parametrize("paths, condition", [(1, "pooled"), (P, "pooled"), (1, "paths"), (P, "paths")])
def test_text_head_equals_torch_with_gradients(paths, condition):
    vectors, upstream = normal(1, B, paths, D), normal(2, B, A, V)
    ids = np.random.default_rng(3).integers(0, V, size=(B, A)).astype(np.int32)
    head = text_head(condition=condition)
    params = initialise(head, vectors, ids, deterministic=True)

    def forward(params, vectors):
        return head.apply({"params": params}, vectors, ids, deterministic=True)

    logits, pullback = jax.vjp(forward, params, vectors)
    grads, grad_vectors = pullback(jnp.asarray(upstream))

    twin = TorchText().eval()
    for parameter, value in twin.table(params):
        fill(parameter, value)
    vectors_torch = torch.tensor(vectors, requires_grad=True)
    keys = vectors_torch.mean(1, keepdim=True) if condition == "pooled" else vectors_torch
    expected = twin(keys, torch.tensor(ids, dtype=torch.long))
    expected.backward(torch.tensor(upstream))

    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, expected.detach(), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(grad_vectors, vectors_torch.grad, rtol=1e-4, atol=1e-4)
    pairs = list(twin.table(grads))
    assert len(pairs) == len(jax.tree.leaves(params))
    for parameter, gradient in pairs:
        np.testing.assert_allclose(gradient, parameter.grad, rtol=1e-4, atol=1e-4)


def test_text_head_is_causal():
    vectors, ids = normal(1, B, 1, D), np.ones((B, A), np.int32)
    head = text_head()
    params = initialise(head, vectors, ids, deterministic=True)
    changed = ids.copy()
    changed[:, 3:] = 2
    one, two = (head.apply({"params": params}, vectors, x, deterministic=True) for x in (ids, changed))
    np.testing.assert_array_equal(one[:, :3], two[:, :3])
    assert not np.allclose(one[:, 3:], two[:, 3:])


def naive_decoding(head, params, vectors, *, length, start_id, stop_id, pad_id):
    """Reruns the whole prefix for every token."""
    answers = []
    for row in vectors:
        prefix = [start_id]
        while len(prefix) <= length and prefix[-1] != stop_id or len(prefix) == 1:
            ids = jnp.asarray([prefix], jnp.int32)
            logits = head.apply({"params": params}, row[None], ids, deterministic=True)
            prefix.append(int(logits[0, -1].argmax()))
        answers.append(prefix[1:] + [pad_id] * (length + 1 - len(prefix)))
    return np.array(answers)


def decoding_case(seed, **changes):
    head = text_head(**changes)
    vectors = 3 * normal(seed, 4, P, D)
    params = initialise(head, vectors, np.ones((4, 2), np.int32), deterministic=True)
    return head, params, vectors


@pytest.mark.parametrize("condition", heads.CONDITIONS)
def test_generate_equals_naive_decoding(condition):
    head, params, vectors = decoding_case(4, condition=condition)
    free = naive_decoding(head, params, vectors, length=MAX_LENGTH, start_id=1, stop_id=-1, pad_id=0)
    assert len({tuple(row) for row in free}) > 1  # the conditioning matters
    # A token that some row produces midway as stop token: rows end at different times, or never.
    stop = int(free[0, 2])
    for stop_id in (-1, stop):
        ids = dict(length=MAX_LENGTH, start_id=1, stop_id=stop_id, pad_id=0)
        expected = naive_decoding(head, params, vectors, **ids)
        got = head.apply({"params": params}, vectors, method="generate", **ids)
        assert got.dtype == jnp.int32
        np.testing.assert_array_equal(got, expected)
    assert (expected[0, 3:] == 0).all() and (expected[:, -1] != 0).any()


def test_generate_shorter_than_the_maximum():
    head, params, vectors = decoding_case(4)
    ids = dict(start_id=1, stop_id=-1, pad_id=0)
    long = head.apply({"params": params}, vectors, method="generate", length=MAX_LENGTH, **ids)
    short = head.apply({"params": params}, vectors, method="generate", length=4, **ids)
    np.testing.assert_array_equal(short, long[:, :4])


def test_generate_stops_early(monkeypatch):
    head, params, vectors = decoding_case(4)
    steps = []
    forward = heads.GPT2Block.__call__

    def counted(self, *args, **kwargs):
        jax.debug.callback(lambda: steps.append(1))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(heads.GPT2Block, "__call__", counted)
    ids = dict(length=MAX_LENGTH, start_id=1, pad_id=0)
    row = vectors[:1]
    free = jax.block_until_ready(head.apply({"params": params}, row, method="generate", stop_id=-1, **ids))
    jax.effects_barrier()
    assert len(steps) == MAX_LENGTH  # one position per token, never the prefix again
    steps.clear()
    stop_id = int(free[0, 1])
    jax.block_until_ready(head.apply({"params": params}, row, method="generate", stop_id=stop_id, **ids))
    jax.effects_barrier()
    assert len(steps) == list(free[0]).index(stop_id) + 1


def test_generate_under_vmap_equals_a_loop_and_keeps_slice_updates():
    head, _, _ = decoding_case(4)
    cases = [decoding_case(seed) for seed in (4, 5, 6)]
    params = jax.tree.map(
        lambda *x: jnp.stack(x), *(jax.tree.map(lambda x: x * s, cases[0][1]) for s in (1.0, 0.8, 1.3))
    )
    vectors = jnp.stack([case[2] for case in cases])

    def generate(params, vectors):
        ids = dict(length=MAX_LENGTH, start_id=1, stop_id=2, pad_id=0)
        return head.apply({"params": params}, vectors, method="generate", **ids)

    got = jax.vmap(generate)(params, vectors)
    for k in range(3):
        np.testing.assert_array_equal(got[k], generate(jax.tree.map(lambda x, k=k: x[k], params), vectors[k]))
    program = str(jax.make_jaxpr(jax.vmap(generate))(params, vectors))
    assert "dynamic_update_slice" in program and "scatter" not in program


def test_base_size_parameter_counts():
    pooled, ids = jnp.zeros((1, 768)), jnp.zeros((1, 2), jnp.int32)
    flava = heads.ClassificationHead(100, hidden=(384,), activation="relu", dropout=0.3, layer_norm=False)
    vilt = heads.ClassificationHead(4, hidden=(3072, 768), activation="gelu", dropout=0.1, layer_norm=True)
    vilt_head = 768 * 3072 + 3072 + 2 * 3072 + 3072 * 768 + 768 + 768 * 4 + 4
    image_head = 768 * 4096 + 4096 + (64 * 32 * 16 + 32) + (32 * 16 * 16 + 16) + (16 * 3 * 16 + 3)
    assert count(flava, pooled, deterministic=True) == 768 * 384 + 384 + 384 * 100 + 100
    assert count(vilt, pooled, deterministic=True) == vilt_head
    assert count(heads.ImageHead(), pooled) == image_head
    for condition in heads.CONDITIONS:
        text = heads.TextHead(vocab=30522, max_length=256, width=768, condition=condition)
        text_size = 2 * 30522 * 768 + 2 * 256 * 768 + 4_727_040 + 1_536 + 2_362_368
        assert count(text, pooled[:, None], ids, deterministic=True) == text_size


@pytest.mark.parametrize("kind", ["classification", "image", "text"])
def test_vmap_over_clients_equals_a_loop(kind):
    head, x = {
        "classification": (VILT, (normal(1, 2, B, D),)),
        "image": (heads.ImageHead(channels=(6, 4), seed_size=2), (normal(1, 2, B, D),)),
        "text": (text_head(condition="paths"), (normal(1, 2, B, P, D), np.ones((2, B, A), np.int32))),
    }[kind]
    one = initialise(head, *(a[0] for a in x), deterministic=True)
    params = jax.tree.map(lambda a: jnp.stack([a, 0.7 * a]), one)

    def loss(params, *x):
        return jnp.square(head.apply({"params": params}, *x, deterministic=True)).mean()

    values, grads = jax.vmap(jax.value_and_grad(loss))(params, *x)
    for k in range(2):
        value, grad = jax.value_and_grad(loss)(jax.tree.map(lambda a, k=k: a[k], params), *(a[k] for a in x))
        np.testing.assert_allclose(values[k], value, rtol=1e-5)
        jax.tree.map(lambda a, b, k=k: np.testing.assert_allclose(a[k], b, rtol=1e-4, atol=1e-5), grads, grad)
    assert "conv_general_dilated" not in str(jax.make_jaxpr(jax.vmap(jax.grad(loss)))(params, *x))


@pytest.mark.parametrize("head", [FLAVA, VILT, text_head()], ids=["flava", "vilt", "text"])
def test_dropout(head):
    x = (normal(1, B, P, D), np.ones((B, A), np.int32)) if isinstance(head, heads.TextHead) else (normal(1, B, D),)
    params = initialise(head, *x, deterministic=True)

    def apply(seed=None):
        rngs = None if seed is None else {"dropout": jax.random.key(seed)}
        return np.asarray(head.apply({"params": params}, *x, deterministic=seed is None, rngs=rngs))

    np.testing.assert_array_equal(apply(), apply())
    np.testing.assert_array_equal(apply(1), apply(1))
    assert not np.allclose(apply(1), apply(2)) and not np.allclose(apply(1), apply())


@pytest.mark.parametrize("kind", ["classification", "image", "text"])
def test_half_precision_trains_with_float32_parameters_and_outputs(kind):
    head, x = {
        "classification": (VILT.clone(dtype=jnp.bfloat16), (normal(1, B, D),)),
        "image": (heads.ImageHead(channels=(6, 4), seed_size=2, dtype=jnp.bfloat16), (normal(1, B, D),)),
        "text": (text_head(condition="paths", dtype=jnp.bfloat16), (normal(1, B, P, D), np.ones((B, A), np.int32))),
    }[kind]
    params = initialise(head, *x, deterministic=True)

    def outputs(params, head=head):
        return head.apply({"params": params}, *x, deterministic=True)

    full = outputs(params, head.clone(dtype=jnp.float32))
    assert outputs(params).dtype == jnp.float32
    np.testing.assert_allclose(outputs(params), full, atol=0.05 * np.abs(full).max())
    grads = jax.grad(lambda p: jnp.square(outputs(p)).mean())(params)
    assert all(g.dtype == jnp.float32 and np.isfinite(g).all() for g in jax.tree.leaves(grads))
    if kind == "text":
        ids = head.apply({"params": params}, x[0], method="generate", length=4, start_id=1, stop_id=2, pad_id=0)
        assert ids.shape == (B, 4)


@pytest.mark.parametrize(
    "head, message",
    [
        (text_head(condition="tokens"), "condition: unknown 'tokens'"),
        (text_head(heads=3), "heads: 3 does not divide"),
        (text_head(cond_heads=5), "cond_heads: 5 does not divide"),
        (heads.TextHead(vocab=V, max_length=A - 1, width=D), "max_length: answers of 6 tokens exceed 5"),
    ],
)
def test_text_head_rejects(head, message):
    with pytest.raises(UserError, match=message):
        head.init(jax.random.key(0), normal(1, B, 1, D), np.ones((B, A), np.int32), deterministic=True)


def test_classification_rejects_unknown_activation():
    with pytest.raises(UserError, match="activation: unknown 'swish'"):
        VILT.clone(activation="swish").init(jax.random.key(0), normal(1, B, D), deterministic=True)
