"""The server model in PyTorch, weight by weight: HF's own encoders, and the routed backbone as the specification says.

Weights come from our trees, whose layout is spelt out here once.
"""

import jax
import numpy as np
import torch
import torch.nn.functional as F
import transformers

from tests.oracle import routing_table

torch.set_num_threads(1)  # tiny tensors


def random_weights(shapes, rng):
    """Values for a tree of shapes such that nothing hides behind a 0 or a 1; matrices keep the signal's size."""
    import jax

    def draw(path, leaf):
        name = jax.tree_util.keystr(path)
        if "scale" in name:
            return (1 + 0.3 * rng.standard_normal(leaf.shape)).astype(np.float32)
        fan_in = leaf.shape[-2] if len(leaf.shape) > 1 else 10
        return (rng.standard_normal(leaf.shape) / np.sqrt(fan_in)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def variables(encoder, *example):
    """Random weights for all of an encoder's collections, on the host."""
    shapes = jax.eval_shape(lambda: encoder.init(jax.random.key(0), *example, deterministic=True))
    return jax.device_get(random_weights(shapes, np.random.default_rng(1)))


def close(ours, theirs, tolerance=1e-5) -> None:
    """Asserts equality to `tolerance` of the largest entry."""
    theirs = theirs.detach().numpy() if isinstance(theirs, torch.Tensor) else theirs
    assert ours.shape == theirs.shape
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * np.abs(theirs).max())


def tensor(x) -> torch.Tensor:
    """A torch copy; a tensor, which may want its gradient, is itself."""
    return x if isinstance(x, torch.Tensor) else torch.tensor(np.array(x))


def fill(parameter: torch.nn.Parameter, value) -> None:
    """Sets a parameter; shapes must agree."""
    value = tensor(value)
    assert parameter.shape == value.shape, (parameter.shape, value.shape)
    with torch.no_grad():
        parameter.copy_(value)


def fill_linear(linear: torch.nn.Linear, weights, layer=None) -> None:
    """Kernel [in, out] and bias of a dense layer."""
    at = (lambda x: x) if layer is None else (lambda x: x[layer])
    fill(linear.weight, at(weights["kernel"]).T)
    fill(linear.bias, at(weights["bias"]))


def fill_norm(norm: torch.nn.LayerNorm, weights, layer=None) -> None:
    """Scale and bias of a layer normalisation."""
    at = (lambda x: x) if layer is None else (lambda x: x[layer])
    fill(norm.weight, at(weights["scale"]))
    fill(norm.bias, at(weights["bias"]))


def fill_tower(tower, weights) -> None:
    """The layers and the final norm of a FLAVA tower; ours carry a leading layer axis."""
    fill_layers(tower.encoder.layer, weights["layers"])
    fill_norm(tower.layernorm, weights["norm"])


def fill_layers(layers, weights) -> None:
    """HF's layers of a tower or of the backbone; ours carry a leading layer axis."""
    if "query_value" in weights:
        pair = weights["query_value"]
        query, value = ({name: leaf[:, which] for name, leaf in pair.items()} for which in (0, 1))
        weights = weights | {"query": query, "value": value}
    for i, layer in enumerate(layers):
        fill_norm(layer.layernorm_before, weights["norm1"], i)
        fill_norm(layer.layernorm_after, weights["norm2"], i)
        attention = layer.attention.attention
        for linear, name in ((attention.query, "query"), (attention.key, "key"), (attention.value, "value")):
            fill_linear(linear, weights[name], i)
        fill_linear(layer.attention.output.dense, weights["out"], i)
        fill_linear(layer.intermediate.dense, weights["fc1"], i)
        fill_linear(layer.output.dense, weights["fc2"], i)


def add_bottlenecks(layers, adapters) -> None:
    """Puts adapters [L, ...] behind the feed-forward networks of HF's layers, before the residual addition."""
    for i, layer in enumerate(layers):
        layer.output.dense.register_forward_hook(lambda _, __, f, i=i: f + bottleneck(at(adapters, i), f))


def bottleneck(adapter, f: torch.Tensor) -> torch.Tensor:
    """A(f) = up · ReLU(down · f + b) + b'."""
    hidden = torch.relu(f @ tensor(adapter["down"]) + tensor(adapter["down_bias"]))
    return hidden @ tensor(adapter["up"]) + tensor(adapter["up_bias"])


def text_tower(c, weights) -> transformers.FlavaTextModel:
    """HF's text model with our frozen weights, no adapters."""
    config = transformers.FlavaTextConfig(
        vocab_size=c.vocab,
        hidden_size=c.width,
        num_hidden_layers=c.text_layers,
        num_attention_heads=c.heads,
        intermediate_size=c.mlp,
        max_position_embeddings=weights["positions"].shape[0],
        pad_token_id=0,
    )
    tower = transformers.FlavaTextModel(config, add_pooling_layer=False).eval()
    fill(tower.embeddings.word_embeddings.weight, weights["words"])
    fill(tower.embeddings.position_embeddings.weight, weights["positions"])
    fill(tower.embeddings.token_type_embeddings.weight, weights["types"])
    fill_norm(tower.embeddings.LayerNorm, weights["embedding_norm"])
    fill_tower(tower, weights)
    return tower


def image_tower(c, weights) -> transformers.FlavaImageModel:
    """HF's image model with our frozen weights, no adapters."""
    config = transformers.FlavaImageConfig(
        hidden_size=c.width,
        num_hidden_layers=c.image_layers,
        num_attention_heads=c.heads,
        intermediate_size=c.mlp,
        image_size=c.image_size,
        patch_size=c.patch,
    )
    tower = transformers.FlavaImageModel(config, add_pooling_layer=False).eval()
    embeddings = tower.embeddings
    fill(embeddings.cls_token, weights["cls"][None, None])
    fill(embeddings.position_embeddings, weights["positions"][None])
    kernel = np.asarray(weights["patch"]["kernel"])
    fill(embeddings.patch_embeddings.projection.weight, kernel.T.reshape(c.width, 3, c.patch, c.patch))
    fill(embeddings.patch_embeddings.projection.bias, weights["patch"]["bias"])
    fill_tower(tower, weights)
    return tower


def vilt_embeddings(c, frozen, blocks) -> transformers.models.vilt.modeling_vilt.ViltEmbeddings:
    """HF's ViLT embeddings with our weights, of both modalities, without adapters."""
    config = transformers.ViltConfig(
        hidden_size=c.width,
        num_attention_heads=c.heads,
        intermediate_size=c.mlp,
        num_hidden_layers=1,
        image_size=c.position_grid * c.patch,
        patch_size=c.patch,
        vocab_size=c.vocab,
        max_position_embeddings=c.text_rows,
    )
    embeddings = transformers.ViltModel(config, add_pooling_layer=False).embeddings.eval()
    image, text = frozen.get("encoder/image"), frozen.get("encoder/text")
    if image and "encoder/image" in blocks:
        kernel = np.asarray(image["patch"]["kernel"])
        fill(embeddings.patch_embeddings.projection.weight, kernel.T.reshape(c.width, 3, c.patch, c.patch))
        fill(embeddings.patch_embeddings.projection.bias, image["patch"]["bias"])
        fill(embeddings.cls_token, blocks["encoder/image"]["cls"][None, None])
        fill(embeddings.position_embeddings, blocks["encoder/image"]["positions"][None])
    if text:
        fill(embeddings.text_embeddings.word_embeddings.weight, text["words"])
        fill(embeddings.text_embeddings.position_embeddings.weight, text["positions"])
        fill(embeddings.text_embeddings.token_type_embeddings.weight, text["types"])
        fill_norm(embeddings.text_embeddings.LayerNorm, text["embedding_norm"])
    return embeddings


def visual_embed(embeddings, pixels: torch.Tensor) -> torch.Tensor:
    """HF's embeddings of images [B, 3, H, H] with the patches, which it shuffles, put back in raster order."""
    states, mask, (index, (_, columns)) = embeddings.visual_embed(pixels, torch.ones_like(pixels[:, 0]), -1)
    assert bool(mask.all())
    order = (index[..., 0] * columns + index[..., 1]).argsort(1)
    patches = torch.gather(states[:, 1:], 1, order[..., None].expand(-1, -1, states.shape[-1]))
    return torch.cat([states[:, :1], patches], 1)


def encode_vilt(c, frozen, blocks, modality: str, batch) -> torch.Tensor:
    """As `encode`: HF's embeddings, LoRA on the patch projection merged in."""
    embeddings = vilt_embeddings(c, frozen, blocks)
    adapters = blocks[f"encoder/{modality}"]
    embeddings.requires_grad_(False)
    if modality == "text":
        return output(adapters["output"], embeddings.text_embeddings(tensor(batch["tokens"]).long()))
    if not c.bottleneck:
        projection = embeddings.patch_embeddings.projection
        a, b = (tensor(adapters["patch"]["lora"][x]) for x in "ab")
        projection.weight += c.lora_alpha_ratio * (a @ b).T.reshape(projection.weight.shape)
    pixels = adaptor(c, adapters["adaptor"], tensor(batch["images"]).permute(0, 3, 1, 2))
    return output(adapters["output"], visual_embed(embeddings, pixels))


def merge_lora(tower, adapters, ratio: float) -> None:
    """Adds alpha / rank · A B to query and value of every layer."""
    for i, layer in enumerate(tower.encoder.layer):
        for name in ("query", "value"):
            a, b = (tensor(adapters["layers"][name]["lora"][x][i]) for x in "ab")
            with torch.no_grad():
                getattr(layer.attention.attention, name).weight += ratio * (a @ b).T


def adaptor(c, weights, images: torch.Tensor) -> torch.Tensor:
    """The trainable input adaptor, [B, 3, 64, 64] -> [B, 3, image_size, image_size]."""
    size = round(images.shape[-1] * c.upsample)
    x = F.interpolate(images, size=(size, size), mode="bilinear", align_corners=False)
    x = F.gelu(F.conv2d(x, tensor(weights["conv3"]).permute(3, 2, 0, 1), padding=1))
    x = F.interpolate(x, size=(c.image_size, c.image_size), mode="bilinear", align_corners=False)
    return F.conv2d(x, tensor(weights["conv1"]).T[:, :, None, None], tensor(weights["bias1"]))


def output(weights, x: torch.Tensor) -> torch.Tensor:
    """The trainable Linear + LayerNorm behind an encoder."""
    x = dense(weights["linear"], x)
    return F.layer_norm(x, x.shape[-1:], tensor(weights["scale"]), tensor(weights["bias"]), 1e-5)


def encode(c, frozen, blocks, modality: str, batch) -> torch.Tensor:
    """Encoder tokens [B, T, D], without padding in the batch: HF's tower, LoRA merged in or bottlenecks put in."""
    if c.name == "vilt":
        return encode_vilt(c, frozen, blocks, modality, batch)
    weights, adapters = frozen[f"encoder/{modality}"], blocks[f"encoder/{modality}"]
    if modality == "image":
        tower = image_tower(c, weights)
        images = adaptor(c, adapters["adaptor"], tensor(batch["images"]).permute(0, 3, 1, 2))
        inputs = {"pixel_values": images}
    else:
        tower = text_tower(c, weights)
        inputs = {"input_ids": tensor(batch["tokens"]).long()}
    tower.requires_grad_(False)
    if c.bottleneck:
        add_bottlenecks(tower.encoder.layer, blocks[f"encoder/{modality}/adapters"])
    else:
        merge_lora(tower, adapters, c.lora_alpha_ratio)
    return output(adapters["output"], tower(**inputs).last_hidden_state)


def dense(weights, x: torch.Tensor) -> torch.Tensor:
    """Kernel [in, out] and bias."""
    return x @ tensor(weights["kernel"]) + tensor(weights["bias"])


def represent(c, frozen, blocks, task, domain: str, batch) -> tuple[torch.Tensor, torch.Tensor]:
    """The specification's routing table, path by path, for one sample without padding.

    Returns:
      The mean of the path vectors [1, D], and each modality's latent [|modalities|, 1, D]: the token mean of the
      modality-task path behind the MoTE stage.
    """
    vectors, latents = [], []
    for m in task.modalities:
        x = encode(c, frozen, blocks, m, batch)
        s = dense(blocks["shared_proj"], x)
        for path, (mote, mote_expert, mome, mome_expert) in enumerate(routing_table(m, task.kind)):
            h = s if path < 2 else x
            depth = 0
            for stage, stack, (first, second), layers in (
                ("mote", mote, mote_expert, c.backbone_layers[0]),
                ("mome", mome, mome_expert, c.backbone_layers[1]),
            ):
                for i in range(layers):
                    h = layer(
                        c,
                        at(frozen["backbone"], depth),
                        at(blocks.get(f"{stage}/{stack}/attention", {}), i),
                        at(blocks[f"{stage}/{stack}/domain/{domain}"], i),
                        at(blocks[f"{stage}/{first}/expert/{second}"], i),
                        h,
                    )
                    depth += 1
                if (stage, mote_expert) == ("mote", (m, task.kind)):
                    latents.append(h.mean(1))
            vectors.append(h.mean(1))
    assert len(vectors) == 4 * len(task.modalities) and len(latents) == len(task.modalities)
    return sum(vectors) / len(vectors), torch.stack(latents)


def standard_layers(c, frozen) -> torch.nn.Module:
    """HF's encoder with the backbone's layers, no adapters: called with tokens [B, T, D] and `additive` of a mask."""
    sizes = dict(hidden_size=c.width, num_attention_heads=c.heads, intermediate_size=c.mlp)
    sizes |= dict(num_hidden_layers=sum(c.backbone_layers))
    if c.name == "flava":
        model = transformers.FlavaMultimodalModel(transformers.FlavaMultimodalConfig(**sizes), add_pooling_layer=False)
    else:
        model = transformers.ViltModel(transformers.ViltConfig(**sizes, image_size=8, patch_size=8, vocab_size=9))
    fill_layers(model.encoder.layer, frozen["backbone"])
    return model.encoder.eval().requires_grad_(False)


def additive(mask) -> torch.Tensor:
    """bool [B, T] -> what HF's attentions add to their scores, [B, 1, 1, T]."""
    return torch.where(torch.tensor(mask), 0.0, torch.finfo(torch.float32).min)[:, None, None]


def as_leaves(tree) -> dict:
    """The tree with torch tensors that collect gradients."""
    return jax.tree.map(lambda leaf: tensor(leaf).requires_grad_(True), tree)


def gradients(tree) -> dict:
    """What `as_leaves` collected; an error where nothing came."""
    return jax.tree.map(lambda leaf: leaf.grad.numpy(), tree)


def at(tree, i: int):
    """One layer of a tree whose leaves have a leading layer axis."""
    return {name: at(value, i) if isinstance(value, dict) else value[i] for name, value in tree.items()}


def layer(c, weights, adapters, domain, expert, x: torch.Tensor) -> torch.Tensor:
    """One layer of a stack.

    n = LN1(x);  q = Wq(n + E_q(n)), k = Wk n, v = Wv(n + E_v(n));  x += Wo attention(q, k, v);  x += Expert(LN2(x))
    """
    n = norm(c, weights["norm1"], x)
    e_q, e_v = (feed_forward(c, weights, at(domain, which), n) for which in (0, 1))
    q, v = (
        (n + e) @ adapted(c, at(weights["query_value"], which), at(adapters, which))
        + tensor(weights["query_value"]["bias"][which])
        for which, e in ((0, e_q), (1, e_v))
    )
    k = dense(weights["key"], n)
    q, k, v = (y.unflatten(-1, (c.heads, -1)).transpose(1, 2) for y in (q, k, v))
    attended = torch.softmax(q @ k.transpose(-1, -2) / np.sqrt(q.shape[-1]), -1) @ v
    x = x + dense(weights["out"], attended.transpose(1, 2).flatten(-2))
    return x + feed_forward(c, weights, expert, norm(c, weights["norm2"], x))


def norm(c, weights, x: torch.Tensor) -> torch.Tensor:
    """Frozen layer normalisation."""
    return F.layer_norm(x, x.shape[-1:], tensor(weights["scale"]), tensor(weights["bias"]), 1e-12)


def adapted(c, weights, adapter) -> torch.Tensor:
    """W (+ alpha / rank · A B) (+ delta), [in, out]."""
    w = tensor(weights["kernel"])
    if "a" in adapter:
        w = w + c.lora_alpha_ratio * tensor(adapter["a"]) @ tensor(adapter["b"])
    return w + tensor(adapter["delta"]) if "delta" in adapter else w


def feed_forward(c, weights, adapter, x: torch.Tensor) -> torch.Tensor:
    """The pre-trained FFN with an expert's LoRA on both linears, or its bottleneck behind; exact GELU."""
    if "down" in adapter:
        f = feed_forward(c, weights, {"fc1": {}, "fc2": {}}, x)
        return f + bottleneck(adapter, f)
    x = F.gelu(x @ adapted(c, weights["fc1"], adapter["fc1"]) + tensor(weights["fc1"]["bias"]))
    return x @ adapted(c, weights["fc2"], adapter["fc2"]) + tensor(weights["fc2"]["bias"])
