"""Decoders against PyTorch and transformers: values, gradients, decoding, parameter counts."""

import functools

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
    """Random parameters, biases and LayerNorms included, so that no term hides behind a 0 or a 1."""
    shapes = jax.eval_shape(lambda: head.init(jax.random.key(0), *args, **kwargs))["params"]
    leaves, tree = jax.tree.flatten(shapes)
    return jax.tree.unflatten(tree, [jnp.asarray(0.4 * normal(i, *x.shape)) for i, x in enumerate(leaves)])


@functools.partial(jax.jit, static_argnums=0)
def value_and_pullback(f, params, x, upstream):
    y, pullback = jax.vjp(f, params, x)
    return y, *pullback(upstream)


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
    y, grads, grad_x = value_and_pullback(lambda p, x: conv.apply({"params": p}, x), params, x, upstream)

    twin = torch.nn.ConvTranspose2d(4, 3, kernel_size=4, stride=2, padding=1)
    fill_deconv(twin, params)
    x_torch = torch.tensor(x.transpose(0, 3, 1, 2), requires_grad=True)
    expected = twin(x_torch)
    expected.backward(torch.tensor(upstream.transpose(0, 3, 1, 2)))

    close = {"rtol": 1e-5, "atol": 1e-5}
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

    logits, grads, grad_vectors = value_and_pullback(forward, params, vectors, upstream)

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
    forward = jax.jit(lambda ids: head.apply({"params": params}, vectors, ids, deterministic=True))
    one, two = forward(ids), forward(changed)
    np.testing.assert_array_equal(one[:, :3], two[:, :3])
    assert not np.allclose(one[:, 3:], two[:, 3:])


def naive_decoding(head, params, vectors, *, length, start_id, stop_id, pad_id):
    """Reruns the whole prefix for every token of every row, in a buffer wide enough for the longest."""
    forward = jax.jit(lambda ids: head.apply({"params": params}, vectors, ids, deterministic=True))
    ids = np.full((len(vectors), length + 1), start_id, np.int32)
    for t in range(length):
        ids[:, t + 1] = forward(ids[:, :length])[:, t].argmax(-1)
    answers = np.full((len(vectors), length), pad_id)
    for answer, row in zip(answers, ids[:, 1:], strict=True):
        stops = np.flatnonzero(row == stop_id)
        end = stops[0] + 1 if len(stops) else length
        answer[:end] = row[:end]
    return answers


def decoding_case(seed, **changes):
    head = text_head(**changes)
    vectors = 3 * normal(seed, 6, P, D)
    params = initialise(head, vectors, np.ones((6, 2), np.int32), deterministic=True)
    return head, params, vectors


def decode(head, params, vectors, **ids):
    return jax.jit(lambda p, v: head.apply({"params": p}, v, method="generate", **ids))(params, vectors)


@pytest.mark.parametrize("condition", heads.CONDITIONS)
def test_generate_equals_naive_decoding(condition):
    head, params, vectors = decoding_case(4, condition=condition)
    ids = {"length": MAX_LENGTH, "start_id": 1, "stop_id": -1, "pad_id": 0}
    free = naive_decoding(head, params, vectors, **ids)
    got = decode(head, params, vectors, **ids)
    assert got.dtype == jnp.int32
    np.testing.assert_array_equal(got, free)
    assert len({tuple(row) for row in free}) > 1  # the condition vectors matter

    # Now stop at a token that one row first produces midway and another never; and be shorter than the maximum.
    lacks = [stop for stop in free[:, 2] if not (free[:, :7] == stop).any(axis=1).all()]
    ids |= {"length": 7, "stop_id": int(lacks[0]), "pad_id": V}
    expected = naive_decoding(head, params, vectors, **ids)
    np.testing.assert_array_equal(decode(head, params, vectors, **ids), expected)
    padding = (expected == V).sum(axis=1)
    assert padding.min() == 0 and padding.max() >= 4


def test_generate_stops_early(monkeypatch):
    head, params, vectors = decoding_case(4)
    steps = []
    forward = heads.GPT2Block.__call__

    def counted(self, *args, **kwargs):
        jax.debug.callback(lambda: steps.append(1))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(heads.GPT2Block, "__call__", counted)
    ids = {"length": MAX_LENGTH, "start_id": 1, "pad_id": 0}
    row = vectors[:1]
    free = decode(head, params, row, stop_id=-1, **ids)
    jax.effects_barrier()
    assert len(steps) == MAX_LENGTH  # one position per token, never the prefix again
    steps.clear()
    stop_id = int(free[0, 1])
    decode(head, params, row, stop_id=stop_id, **ids)
    jax.effects_barrier()
    assert len(steps) == list(free[0]).index(stop_id) + 1


def test_generate_under_vmap_equals_a_loop_and_does_not_copy_the_cache():
    head, one, _ = decoding_case(4)
    params = jax.tree.map(lambda x: jnp.stack([x, 0.8 * x, 1.3 * x]), one)
    vectors = 3 * normal(5, 3, 4, P, D)

    def generate(params, vectors):
        return decode(head, params, vectors, length=MAX_LENGTH, start_id=1, stop_id=2, pad_id=0)

    got = jax.vmap(generate)(params, vectors)
    for k in range(3):
        np.testing.assert_array_equal(got[k], generate(jax.tree.map(lambda x, k=k: x[k], params), vectors[k]))
    program = str(jax.make_jaxpr(jax.vmap(generate))(params, vectors))
    cache = f"f32[3,4,{MAX_LENGTH},4,4]"
    assert cache in program and f"{cache} = select_n" not in program


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


def test_initial_distributions_are_those_of_torch_and_gpt2():
    torch.manual_seed(0)
    text = heads.TextHead(vocab=50, max_length=40, width=64)

    @jax.jit
    def init(key):
        x, ids = jnp.ones((1, 1, 64)), jnp.ones((1, 2), jnp.int32)
        linear = FLAVA.init(key, jnp.ones((1, 900)), deterministic=True)["params"]["hidden_0"]
        deconv = heads.TransposedConv(20).init(key, jnp.ones((1, 1, 1, 30)))["params"]
        return text.init(key, x, ids, deterministic=True)["params"], linear, deconv

    params, linear, deconv = init(jax.random.key(0))
    torch_linear, torch_deconv = torch.nn.Linear(900, D // 2), torch.nn.ConvTranspose2d(30, 20, 4, 2, 1)
    attention = torch.nn.MultiheadAttention(64, 8)
    gpt2 = transformers.GPT2Model(transformers.GPT2Config(vocab_size=50, n_embd=64, n_layer=1, n_head=4, n_inner=128))
    block, torch_block = params["block"], gpt2.h[0]
    for ours, theirs in (
        (params["wte"], gpt2.wte.weight),
        (params["position"], gpt2.wpe.weight),
        (params["wpe"], gpt2.wpe.weight),
        (params["conditioning"]["in_proj_kernel"], attention.in_proj_weight),
        (params["conditioning"]["out_proj"]["kernel"], attention.out_proj.weight),
        (block["attn_c_attn"]["kernel"], torch_block.attn.c_attn.weight),
        (block["attn_c_proj"]["kernel"], torch_block.attn.c_proj.weight),
        (block["mlp_c_fc"]["kernel"], torch_block.mlp.c_fc.weight),
        (block["mlp_c_proj"]["kernel"], torch_block.mlp.c_proj.weight),
        (params["output"], torch.nn.Linear(64, 50).weight),
        (linear["kernel"], torch_linear.weight),
        (deconv["kernel"], torch_deconv.weight),
    ):
        np.testing.assert_allclose(np.std(ours), theirs.std().item(), rtol=0.05)
    for ours, theirs in ((linear["bias"], torch_linear.bias), (deconv["bias"], torch_deconv.bias)):
        np.testing.assert_allclose(np.abs(ours).max(), theirs.abs().max().item(), rtol=0.3)


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

    step = jax.jit(jax.value_and_grad(loss))
    values, grads = jax.vmap(step)(params, *x)
    for k in range(2):
        value, grad = step(jax.tree.map(lambda a, k=k: a[k], params), *(a[k] for a in x))
        np.testing.assert_allclose(values[k], value, rtol=1e-5)
        jax.tree.map(lambda a, b, k=k: np.testing.assert_allclose(a[k], b, rtol=1e-4, atol=1e-5), grads, grad)
    assert "conv_general_dilated" not in str(jax.make_jaxpr(jax.vmap(jax.grad(loss)))(params, *x))


@pytest.mark.parametrize("head", [FLAVA, VILT, text_head()], ids=["flava", "vilt", "text"])
def test_dropout(head):
    x = (normal(1, B, P, D), np.ones((B, A), np.int32)) if isinstance(head, heads.TextHead) else (normal(1, B, D),)
    params = initialise(head, *x, deterministic=True)

    @jax.jit
    def noisy(seed):
        return head.apply({"params": params}, *x, deterministic=False, rngs={"dropout": jax.random.key(seed)})

    # Without dropout there is no key to depend on: a missing one is no error.
    clean = jax.jit(lambda: head.apply({"params": params}, *x, deterministic=True))
    np.testing.assert_array_equal(clean(), clean())
    np.testing.assert_array_equal(noisy(1), noisy(1))
    assert not np.allclose(noisy(1), noisy(2)) and not np.allclose(noisy(1), clean())


@pytest.mark.parametrize("kind", ["classification", "image", "text"])
def test_half_precision_trains_with_float32_parameters_and_outputs(kind):
    head, x = {
        "classification": (VILT.clone(dtype=jnp.bfloat16), (normal(1, B, D),)),
        "image": (heads.ImageHead(channels=(6, 4), seed_size=2, dtype=jnp.bfloat16), (normal(1, B, D),)),
        "text": (text_head(condition="paths", dtype=jnp.bfloat16), (normal(1, B, P, D), np.ones((B, A), np.int32))),
    }[kind]
    params = initialise(head, *x, deterministic=True)

    @functools.partial(jax.jit, static_argnums=1)
    def outputs(params, head=head):
        return head.apply({"params": params}, *x, deterministic=True)

    full = outputs(params, head.clone(dtype=jnp.float32))
    assert outputs(params).dtype == jnp.float32
    np.testing.assert_allclose(outputs(params), full, atol=0.05 * np.abs(full).max())
    grads = jax.jit(jax.grad(lambda p: jnp.square(outputs(p)).mean()))(params)
    assert all(g.dtype == jnp.float32 and np.isfinite(g).all() for g in jax.tree.leaves(grads))
    if kind == "text":
        assert decode(head, params, x[0], length=4, start_id=1, stop_id=2, pad_id=0).shape == (B, 4)


@pytest.mark.parametrize(
    "head, message",
    [
        (text_head(condition="tokens"), "model.condition: unknown 'tokens'; use one of pooled, paths"),
        (text_head(heads=3), f"model.text_heads: 3 does not divide model.width {D}; use one that does"),
        (text_head(cond_heads=5), "model.text_cond_heads: 5 does not divide"),
        (heads.TextHead(vocab=V, max_length=A - 1, width=D), "model.max_answer: 5, too few for answers of 6 tokens"),
    ],
)
def test_text_head_rejects(head, message):
    with pytest.raises(UserError, match=message):
        count(head, normal(1, B, 1, D), np.ones((B, A), np.int32), deterministic=True)


def test_classification_rejects_unknown_activation():
    with pytest.raises(UserError, match="model.head_activation: unknown 'swish'; use one of relu, gelu"):
        count(VILT.clone(activation="swish"), normal(1, B, D), deterministic=True)
