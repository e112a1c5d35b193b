"""A client's model in PyTorch: the twin of the JAX model that an exported folder was made from.

This file needs torch and safetensors and nothing else: copy it next to your code.

    model = load("exports/client3")                            # in eval mode
    logits = model("ag_news", tokens=tokens)                   # tokens int [B, T], padded with 0
    picture = model("fashion_mnist", images=standardise(pixels))
    ids = model.generate("mmlu", domain="law", tokens=tokens)  # greedy
    optimizer = torch.optim.AdamW(model.trainable_parameters())

`model.frozen` holds the pre-trained weights, one copy of each; `model.blocks` the trained ones by the names of the
federation's blocks ("encoder/text", "mote/shared/expert/image_generation", "head/ag_news", ...), adapters unmerged.
All stacks and experts of a backbone layer are adapters on that layer's one frozen set of weights; the standard backbone
is one stack of these layers.

Letters: B samples, T tokens, D width, P path vectors, A answer tokens, V vocabulary, C classes, r bottleneck.
"""

import json
import os
import pathlib
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

FORMAT = "tap_jax.torch/1"
MEAN, STD = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)  # of images, per channel


def load(folder: str | os.PathLike, device: str | torch.device = "cpu") -> "Model":
    """The model of an exported folder (config.json, model.safetensors), in eval mode.

    Args:
      device: where its weights go.

    Raises:
      OSError: a file is missing.
      ValueError: config.json is not of such a folder.
      RuntimeError: weights that are missing, left over or of another shape; all are named.
      safetensors.SafetensorError: model.safetensors is damaged.
    """
    folder = pathlib.Path(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config.get("format") != FORMAT:
        raise ValueError(f"{folder}: format is {config.get('format')!r}, not '{FORMAT}'")
    with torch.device("meta"):
        model = Model(config)
    model.load_state_dict(load_file(folder / "model.safetensors", device=str(device)), assign=True)
    return model.eval()


def standardise(pixels: Tensor) -> Tensor:
    """uint8 [..., 3] -> float32 in the standardised units that the model reads and writes."""
    mean, std = (torch.tensor(values, device=pixels.device) for values in (MEAN, STD))
    return (pixels.float() / 255 - mean) / std


class Model(nn.Module):
    """Encoders, routed or standard backbone, and decoders of some tasks.

    Args:
      config: "model" (sizes), "tasks" (name -> kind, modalities, domains, head, classes, class_names, and the templates
        `text` and `answer`), "routes" (kind -> modality -> four paths; none through a standard backbone), "blocks"
        (their names), "tokens" (ids of start and stop).

    Attributes:
      config: as given. sizes: its "model".
      frozen, blocks: modules by name, see the top of this file; `load` gives the parameters their values.
    """

    def __init__(self, config: dict):
        super().__init__()
        self.config = config
        c = self.sizes = SimpleNamespace(**{"backbone": "routed", "bottleneck": 0} | config["model"])
        depth = sum(c.backbone_layers)
        self.frozen = nn.ModuleDict({"backbone": nn.ModuleList(FrozenLayer(c) for _ in range(depth))})
        for modality, frozen in (("image", FrozenImage), ("text", FrozenText)):
            if f"encoder/{modality}" in config["blocks"]:
                self.frozen[f"encoder/{modality}"] = frozen(c)
        self.frozen.requires_grad_(False)
        heads = {task["head"]: task for task in config["tasks"].values()}
        self.blocks = nn.ModuleDict({name: _block(c, heads, name) for name in config["blocks"]})
        self.bare = AttentionAdapters(c) if c.bottleneck else None  # of all stacks: without a parameter

    def trainable_parameters(self) -> list[nn.Parameter]:
        """The parameters of all blocks, for an optimizer; those of `frozen` take no gradient."""
        return [parameter for parameter in self.blocks.parameters() if parameter.requires_grad]

    def forward(
        self,
        task: str,
        *,
        domain: str | None = None,
        images: Tensor | None = None,
        tokens: Tensor | None = None,
        answers: Tensor | None = None,
    ) -> Tensor:
        """Outputs of one task: logits [B, C]; images [B, 64, 64, 3] in standardised units; or logits [B, A-1, V].

        Args:
          task: one of config["tasks"].
          domain: of all samples of the batch; may be left out where the task has only one.
          images: float [B, 64, 64, 3], see `standardise`. tokens: int [B, T], 0-padded.
          answers: int [B, A], for text generation: position t of the output predicts answers[:, t + 1].

        Raises:
          ValueError: an unknown task or domain, an input that is missing, or a text or answer that is too long.
        """
        vectors = self.represent(task, domain=domain, images=images, tokens=tokens)
        spec = self.config["tasks"][task]
        head = self.blocks[f"head/{spec['head']}"]
        if spec["kind"] == "text_generation":
            return head(self._condition(vectors), _given(answers, "answers", task)[:, :-1])
        return head(vectors.mean(1))

    @torch.no_grad()
    def generate(
        self,
        task: str,
        *,
        length: int | None = None,
        domain: str | None = None,
        images: Tensor | None = None,
        tokens: Tensor | None = None,
    ) -> Tensor:
        """Greedy answers int64 [B, length], without dropout and gradient.

        Each ends with the stop token, behind which it is 0, or is cut off at `length`.

        Args:
          task: one of text generation.
          length: tokens to produce, by default as many as the model has positions for.
          domain, images, tokens: see `forward`.

        Raises:
          ValueError: as `forward`, or a task of another kind.
        """
        spec, ids, training = self._spec(task), self.config["tokens"], self.training
        if spec["kind"] != "text_generation":
            raise ValueError(f"{task}: is {spec['kind']}; generate is for text_generation")
        self.eval()
        try:
            vectors = self._condition(self.represent(task, domain=domain, images=images, tokens=tokens))
            length = self.sizes.max_answer if length is None else length
            return self.blocks[f"head/{spec['head']}"].generate(vectors, length, ids["start"], ids["stop"])
        finally:
            self.train(training)

    def represent(
        self, task: str, *, domain: str | None = None, images: Tensor | None = None, tokens: Tensor | None = None
    ) -> Tensor:
        """Path vectors [B, 4 · modalities, D] (standard backbone: one each): the mean over each path's real tokens.

        Args and Raises: see `forward`.
        """
        spec = self._spec(task)
        if domain is None and len(spec["domains"]) == 1:
            domain = spec["domains"][0]
        if domain not in spec["domains"]:
            raise ValueError(f"{task}: domain is {domain!r}; use one of {', '.join(spec['domains'])}")
        vectors = []
        for modality in spec["modalities"]:
            inputs = _given(images, "images", task) if modality == "image" else _given(tokens, "tokens", task)
            mask = None if modality == "image" else inputs != 0
            name = f"encoder/{modality}"
            adapters = self.blocks[f"{name}/adapters"] if f"{name}/adapters" in self.blocks else None
            x = self.blocks[name](self.frozen[name], inputs, mask, adapters)
            if self.sizes.backbone == "standard":
                for layer, adapter in zip(self.frozen["backbone"], self.blocks["backbone"], strict=True):
                    x = adapter(layer, x, mask)
                vectors.append(_pool(x, mask))
                continue
            shared, entered = self.blocks["shared_proj"](x), {}
            for route in self.config["routes"][spec["kind"]][modality]:
                start = shared if route["source"] == "shared" else x
                vectors.append(_pool(self._path(route, domain, start, mask, entered), mask))
        return torch.stack(vectors, 1)

    def _path(self, route: dict, domain: str, x: Tensor, mask: Tensor | None, entered: dict) -> Tensor:
        """One path through both stages, [B, T, D] -> [B, T, D]."""
        mote, mome = self.sizes.backbone_layers
        stages = [("mote", i) for i in range(mote)] + [("mome", i) for i in range(mome)]
        for depth, (layer, (stage, i)) in enumerate(zip(self.frozen["backbone"], stages, strict=True)):
            stack = f"{stage}/{route[f'{stage}_stack']}"
            attention = self.bare or self.blocks[f"{stack}/attention"][i]
            experts = self.blocks[f"{stack}/domain/{domain}"][i]
            # Paths that enter one stack with one input share its first attention, and in training its dropout.
            done = {} if depth else entered
            at = (route["source"], stack)
            if at not in done:
                done[at] = x + attention(layer, experts, layer.norm1(x), mask)
            n = layer.norm2(done[at])
            x = done[at] + self.blocks[route[f"{stage}_expert"]][i](layer, n, layer.fc1(n))
        return x

    def _condition(self, vectors: Tensor) -> Tensor:
        return vectors if self.sizes.condition == "paths" else vectors.mean(1, keepdim=True)

    def _spec(self, task: str) -> dict:
        if task not in self.config["tasks"]:
            raise ValueError(f"{task}: unknown task; this model has {', '.join(self.config['tasks'])}")
        return self.config["tasks"][task]


def _keys(mask: Tensor | None) -> Tensor | None:
    """Which keys are real, bool [B, T], as `attend` wants it."""
    return None if mask is None else mask[:, None, None]


def _given(value: Tensor | None, name: str, task: str) -> Tensor:
    if value is None:
        raise ValueError(f"{task}: {name}= is missing")
    return value


def _pool(x: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return x.mean(1)
    weight = mask.to(x.dtype)
    return torch.einsum("btd,bt->bd", x, weight / weight.sum(-1, keepdim=True).clamp(min=1))


def _block(c: SimpleNamespace, heads: dict, name: str) -> nn.Module:
    """The module of one block, by its name."""
    kind, *rest = name.split("/")
    if kind == "encoder" and rest[1:]:
        return nn.ModuleList(PlainLayer(c) for _ in range(c.image_layers if rest[0] == "image" else c.text_layers))
    if kind == "encoder":
        return {"image": ImageEncoder, "text": TextEncoder}[rest[0]](c)
    if kind == "shared_proj":
        return nn.Linear(c.width, c.width)
    if kind == "backbone":
        return nn.ModuleList(PlainLayer(c) for _ in range(sum(c.backbone_layers)))
    if kind == "head":
        return _head(c, heads["/".join(rest)])
    module = {"attention": AttentionAdapters, "domain": QueryValueExperts, "expert": Expert}[rest[1]]
    return nn.ModuleList(module(c) for _ in range(c.backbone_layers[0 if kind == "mote" else 1]))


def _head(c: SimpleNamespace, task: dict) -> nn.Module:
    if task["kind"].endswith("classification"):
        return ClassificationHead(c, task["classes"])
    return ImageHead(c) if task["kind"] == "image_generation" else TextHead(c)


# --- adapters and layers -------------------------------------------------------------------------------------------


class LowRank(nn.Module):
    """LoRA: alpha / rank · B A dropout(x); added to a frozen linear map of x. A [rank, inputs], B [outputs, rank]."""

    def __init__(self, c: SimpleNamespace, inputs: int, outputs: int, rank: int):
        super().__init__()
        self.lora_A = nn.Parameter(torch.empty(rank, inputs))
        self.lora_B = nn.Parameter(torch.empty(outputs, rank))
        self.scale, self.rate = c.lora_alpha_ratio, c.lora_dropout

    def forward(self, x: Tensor) -> Tensor:
        """What is added: [..., inputs] -> [..., outputs]."""
        return F.linear(F.linear(F.dropout(x, self.rate, self.training), self.lora_A), self.lora_B) * self.scale

    def project(self, frozen: nn.Linear, x: Tensor) -> Tensor:
        """The frozen map with the adapter: [..., inputs] -> [..., outputs]."""
        return frozen(x) + self(x)


class FrozenLayer(nn.Module):
    """Pre-trained weights of a pre-LN transformer layer."""

    def __init__(self, c: SimpleNamespace):
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(c.width, eps=c.layer_norm_eps) for _ in range(2))
        self.query, self.key, self.value, self.out = (nn.Linear(c.width, c.width) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(c.width, c.mlp), nn.Linear(c.mlp, c.width)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, heads: int, dropout: float = 0.0) -> Tensor:
    """Multi-head attention of q [B, A, D] on k, v [B, T, D]: [B, A, D].

    `mask` is bool, broadcastable to [B, heads, A, T], true where a key is read; None where all are. `dropout` is the
    rate on the attention weights.
    """
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    if mask is not None:  # as a finite bias, so that a text without a single token still gives numbers
        mask = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill(~mask, torch.finfo(q.dtype).min)
    return F.scaled_dot_product_attention(q, k, v, mask, dropout).transpose(1, 2).flatten(-2)


class Expert(nn.Module):
    """A feed-forward expert: LoRA on both linears of a layer's frozen feed-forward, or a bottleneck behind it.

    With a bottleneck: f + up · ReLU(down · f + b) + b', f the output of the frozen feed-forward.
    """

    def __init__(self, c: SimpleNamespace):
        super().__init__()
        self.bottleneck = c.bottleneck
        if c.bottleneck:
            self.down, self.up = nn.Linear(c.width, c.bottleneck), nn.Linear(c.bottleneck, c.width)
            return
        self.fc1, self.fc2 = LowRank(c, c.width, c.mlp, c.expert_rank), LowRank(c, c.mlp, c.width, c.expert_rank)

    def forward(self, layer: FrozenLayer, x: Tensor, hidden: Tensor) -> Tensor:
        """The expert's output [B, T, D] of x [B, T, D]; hidden = layer.fc1(x), which experts on equal input share."""
        if self.bottleneck:
            f = layer.fc2(F.gelu(hidden))
            return f + self.up(F.relu(self.down(f)))
        hidden = F.gelu(hidden + self.fc1(x))
        return layer.fc2(hidden) + self.fc2(hidden)


class QueryValueExperts(nn.Module):
    """E_q and E_v of one domain in one layer of a stack."""

    def __init__(self, c: SimpleNamespace):
        super().__init__()
        self.query, self.value = Expert(c), Expert(c)


class Adapter(LowRank):
    """LoRA on the query or value projection, with a full delta of the weight where the model has one."""

    def __init__(self, c: SimpleNamespace):
        super().__init__(c, c.width, c.width, c.attention_rank)
        self.delta = nn.Parameter(torch.empty(c.width, c.width)) if c.qv_delta else None

    def project(self, frozen: nn.Linear, x: Tensor) -> Tensor:
        """The frozen projection with delta and adapter: [..., D] -> [..., D]."""
        weight = frozen.weight if self.delta is None else frozen.weight + self.delta
        return F.linear(x, weight, frozen.bias) + self(x)


class AttentionAdapters(nn.Module):
    """The attention of one layer of a stack; with bottlenecks nothing of it is trained."""

    def __init__(self, c: SimpleNamespace):
        super().__init__()
        self.query, self.value = (None, None) if c.bottleneck else (Adapter(c), Adapter(c))
        self.heads = c.heads

    def forward(self, layer: FrozenLayer, experts: QueryValueExperts, n: Tensor, mask: Tensor | None) -> Tensor:
        """Wo attention(Wq (n + E_q(n)), Wk n, Wv (n + E_v(n))), [B, T, D], of the normalised tokens n [B, T, D].

        `mask` is bool [B, T], None where every token is real.
        """
        hidden = layer.fc1(n)
        q = _project(self.query, layer.query, n + experts.query(layer, n, hidden))
        v = _project(self.value, layer.value, n + experts.value(layer, n, hidden))
        return layer.out(attend(q, layer.key(n), v, _keys(mask), self.heads))


def _project(adapter: LowRank | None, frozen: nn.Linear, x: Tensor) -> Tensor:
    return frozen(x) if adapter is None else adapter.project(frozen, x)


class PlainLayer(Expert):
    """A layer of a plain stack: its feed-forward's adapters and, where they are LoRA, those of query and value.

    The standard backbone is of such layers; FLAVA's encoders are where they have bottlenecks.
    """

    def __init__(self, c: SimpleNamespace):
        super().__init__(c)
        self.query, self.value = (
            None if c.bottleneck else LowRank(c, c.width, c.width, c.attention_rank) for _ in range(2)
        )
        self.heads = c.heads

    def forward(self, layer: FrozenLayer, x: Tensor, mask: Tensor | None) -> Tensor:
        """The whole layer, [B, T, D] -> [B, T, D]; mask bool [B, T], None where every token is real."""
        n = layer.norm1(x)
        q, v = _project(self.query, layer.query, n), _project(self.value, layer.value, n)
        x = x + layer.out(attend(q, layer.key(n), v, _keys(mask), self.heads))
        n = layer.norm2(x)
        return x + super().forward(layer, n, layer.fc1(n))


# --- encoders ------------------------------------------------------------------------------------------------------


class FrozenImage(nn.Module):
    """Pre-trained weights of the image encoder: FLAVA's whole tower, of ViLT the patch projection."""

    def __init__(self, c: SimpleNamespace):
        super().__init__()
        self.patch = nn.Linear(3 * c.patch**2, c.width)  # a convolution with stride = kernel, as a product
        if c.name == "flava":
            self.cls = nn.Parameter(torch.empty(c.width))
            self.positions = nn.Parameter(torch.empty(1 + (c.image_size // c.patch) ** 2, c.width))
            self.layers = nn.ModuleList(FrozenLayer(c) for _ in range(c.image_layers))
            self.norm = nn.LayerNorm(c.width, eps=c.layer_norm_eps)


class FrozenText(nn.Module):
    """Pre-trained weights of the text encoder: embeddings, and FLAVA's layers."""

    def __init__(self, c: SimpleNamespace):
        super().__init__()
        self.words = nn.Parameter(torch.empty(c.vocab, c.width))
        self.positions = nn.Parameter(torch.empty(c.text_positions, c.width))
        self.types = nn.Parameter(torch.empty(2, c.width))
        self.embedding_norm = nn.LayerNorm(c.width, eps=c.layer_norm_eps)
        if c.name == "flava":
            self.layers = nn.ModuleList(FrozenLayer(c) for _ in range(c.text_layers))
            self.norm = nn.LayerNorm(c.width, eps=c.layer_norm_eps)


class EncoderLayer(nn.Module):
    """LoRA on query and value of a layer of FLAVA's encoders."""

    def __init__(self, c: SimpleNamespace):
        super().__init__()
        self.query, self.value = (LowRank(c, c.width, c.width, c.encoder_rank) for _ in range(2))
        self.heads = c.heads

    def forward(self, layer: FrozenLayer, x: Tensor, mask: Tensor | None) -> Tensor:
        """The whole layer, [B, T, D] -> [B, T, D]; mask bool [B, T], None where every token is real."""
        n = layer.norm1(x)
        q, v = self.query.project(layer.query, n), self.value.project(layer.value, n)
        x = x + layer.out(attend(q, layer.key(n), v, _keys(mask), self.heads))
        return x + layer.fc2(F.gelu(layer.fc1(layer.norm2(x))))


class InputAdaptor(nn.Module):
    """Images [B, 64, 64, 3] -> [B, 3, image_size, image_size]: ×upsample, conv 3×3, GELU, resize, conv 1×1."""

    def __init__(self, c: SimpleNamespace):
        super().__init__()
        self.conv3 = nn.Conv2d(3, 3, 3, padding=1, bias=False)
        self.conv1 = nn.Linear(3, 3)  # over channels
        self.upsample, self.size = c.upsample, c.image_size

    def forward(self, images: Tensor) -> Tensor:
        """Standardised images [B, 64, 64, 3] -> [B, 3, image_size, image_size]."""
        x = images.permute(0, 3, 1, 2)
        x = F.gelu(self.conv3(_resize(x, round(images.shape[1] * self.upsample))))
        return self.conv1(_resize(x, self.size).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class OutputProjection(nn.LayerNorm):
    """The trained Linear + LayerNorm behind each encoder."""

    def __init__(self, c: SimpleNamespace):
        super().__init__(c.width)
        self.linear = nn.Linear(c.width, c.width)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return super().forward(self.linear(x))


class ImageEncoder(nn.Module):
    """Images [B, 64, 64, 3], standardised -> tokens [B, 1 + patches, D]; what of the image encoder is trained."""

    def __init__(self, c: SimpleNamespace):
        super().__init__()
        self.sizes = c
        self.adaptor = InputAdaptor(c)
        if c.name == "flava":
            self.layers = nn.ModuleList(EncoderLayer(c) for _ in range(0 if c.bottleneck else c.image_layers))
        else:
            self.patch = None if c.bottleneck else LowRank(c, 3 * c.patch**2, c.width, c.encoder_rank)
            self.cls = nn.Parameter(torch.empty(c.width))
            self.positions = nn.Parameter(torch.empty(1 + c.position_grid**2, c.width))
        self.output = OutputProjection(c)

    def forward(self, frozen: FrozenImage, images: Tensor, mask: None, adapters: nn.ModuleList | None) -> Tensor:
        """See the class; `adapters` are the encoder's bottlenecks, where it has them."""
        c = self.sizes
        patches = F.unfold(self.adaptor(images), c.patch, stride=c.patch).transpose(1, 2)
        x = _project(self.patch if c.name == "vilt" else None, frozen.patch, patches)
        if c.name == "vilt":
            x = _with_cls(self.cls, x) + self._position_table()
            return self.output(x)
        x = _with_cls(frozen.cls, x) + frozen.positions
        for layer, adapter in zip(frozen.layers, adapters or self.layers, strict=True):
            x = adapter(layer, x, None)
        return self.output(frozen.norm(x))

    def _position_table(self) -> Tensor:
        """ViLT's pre-trained grid, interpolated to the grid in use or cut to its corner: [1 + grid², D]."""
        c, grid = self.sizes, self.sizes.image_size // self.sizes.patch
        cells = self.positions[1:].T.reshape(1, c.width, c.position_grid, c.position_grid)
        if c.position == "interpolate":  # corners stay corners
            cells = F.interpolate(cells, size=(grid, grid), mode="bilinear", align_corners=True)
        else:
            cells = cells[..., :grid, :grid]
        return torch.cat([self.positions[:1], cells.reshape(c.width, -1).T])


class TextEncoder(nn.Module):
    """Tokens int [B, T] and where they are real -> [B, T, D]; what of the text encoder is trained.

    Raises:
      ValueError: T is above the number of positions.
    """

    def __init__(self, c: SimpleNamespace):
        super().__init__()
        adapted = c.name == "flava" and not c.bottleneck
        self.layers = nn.ModuleList(EncoderLayer(c) for _ in range(c.text_layers if adapted else 0))
        self.output = OutputProjection(c)

    def forward(self, frozen: FrozenText, tokens: Tensor, mask: Tensor, adapters: nn.ModuleList | None) -> Tensor:
        """See the class; mask bool [B, T]; `adapters` are the encoder's bottlenecks, where it has them."""
        if tokens.shape[1] > len(frozen.positions):
            raise ValueError(f"tokens: {tokens.shape[1]} in a text, the model has {len(frozen.positions)} positions")
        x = F.embedding(tokens, frozen.words) + frozen.positions[: tokens.shape[1]] + frozen.types[0]
        x = frozen.embedding_norm(x)
        if hasattr(frozen, "layers"):
            for layer, adapter in zip(frozen.layers, adapters or self.layers, strict=True):
                x = adapter(layer, x, mask)
            x = frozen.norm(x)
        return self.output(x)


def _with_cls(cls: Tensor, x: Tensor) -> Tensor:
    return torch.cat([cls.expand(len(x), 1, -1), x], 1)


def _resize(x: Tensor, size: int) -> Tensor:
    return F.interpolate(x, size=(size, size), mode="bilinear", align_corners=False)


# --- decoders ------------------------------------------------------------------------------------------------------


class ClassificationHead(nn.Module):
    """Pooled vectors [B, D] -> logits [B, C]; dropout and LayerNorm on the first hidden layer alone."""

    def __init__(self, c: SimpleNamespace, classes: int):
        super().__init__()
        widths = (c.width, *c.head_hidden)
        self.depth, self.rate = len(c.head_hidden), c.head_dropout
        for i in range(self.depth):
            self.add_module(f"hidden_{i}", nn.Linear(widths[i], widths[i + 1]))
        self.layer_norm = nn.LayerNorm(widths[1]) if c.head_layer_norm and self.depth else None
        self.activation = {"relu": F.relu, "gelu": F.gelu}[c.head_activation]
        self.output = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        """[B, D] -> [B, C]."""
        for i in range(self.depth):
            x = getattr(self, f"hidden_{i}")(x)
            x = self.activation(self.layer_norm(x) if i == 0 and self.layer_norm else x)
            x = F.dropout(x, self.rate, self.training) if i == 0 else x
        return self.output(x)


class ImageHead(nn.Module):
    """Pooled vectors [B, D] -> standardised images [B, 64, 64, 3]."""

    def __init__(self, c: SimpleNamespace):
        super().__init__()
        channels = (*c.image_channels, 3)
        self.seed, self.depth = nn.Linear(c.width, channels[0] * 64), len(c.image_channels)
        for i in range(self.depth):
            self.add_module(f"deconv_{i}", nn.ConvTranspose2d(channels[i], channels[i + 1], 4, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        """[B, D] -> [B, 64, 64, 3]."""
        x = self.seed(x).unflatten(-1, (-1, 8, 8))
        for i in range(self.depth):
            x = getattr(self, f"deconv_{i}")(F.relu(x) if i else x)
        return x.permute(0, 2, 3, 1)


class ConditioningAttention(nn.Module):
    """nn.MultiheadAttention, without dropout, from answer positions [A, D] to the condition vectors [B, P, D]."""

    def __init__(self, c: SimpleNamespace):
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.empty(3 * c.width, c.width))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * c.width))
        self.out_proj, self.heads = nn.Linear(c.width, c.width), c.text_cond_heads

    def forward(self, queries: Tensor, vectors: Tensor) -> Tensor:
        """[A, D] and [B, P, D] -> [B, A, D]; where P is 1, all positions get the same: [B, 1, D]."""
        wq, wk, wv = self.in_proj_weight.chunk(3)
        bq, bk, bv = self.in_proj_bias.chunk(3)
        values = F.linear(vectors, wv, bv)
        if vectors.shape[1] == 1:  # the softmax over one key is 1
            return self.out_proj(values)
        q = F.linear(queries, wq, bq).expand(len(vectors), -1, -1)
        return self.out_proj(attend(q, F.linear(vectors, wk, bk), values, None, self.heads))


class GPT2Block(nn.Module):
    """One layer of GPT-2, with its dropouts."""

    def __init__(self, c: SimpleNamespace):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(c.width), nn.LayerNorm(c.width)
        self.attn_c_attn, self.attn_c_proj = nn.Linear(c.width, 3 * c.width), nn.Linear(c.width, c.width)
        self.mlp_c_fc, self.mlp_c_proj = nn.Linear(c.width, c.text_inner), nn.Linear(c.text_inner, c.width)
        self.heads, self.rate = c.text_heads, c.text_dropout

    def forward(self, x: Tensor, cache: list[Tensor] | None = None) -> Tensor:
        """x [B, A, D], causal; with a cache [keys, values] x is the next token, and the cache grows by it."""
        q, k, v = self.attn_c_attn(self.ln_1(x)).chunk(3, -1)
        if cache is None:
            mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
        else:
            k, v = cache[:] = [torch.cat(pair, 1) for pair in zip(cache, (k, v), strict=True)]
            mask = None
        rate = self.rate if self.training else 0.0
        x = x + F.dropout(self.attn_c_proj(attend(q, k, v, mask, self.heads, rate)), rate)
        n = F.gelu(self.mlp_c_fc(self.ln_2(x)), approximate="tanh")
        return x + F.dropout(self.mlp_c_proj(n), rate)


class TextHead(nn.Module):
    """Autoregressive decoder: one GPT-2 layer whose input also reads the condition vectors [B, P, D].

    Raises:
      ValueError: an answer is longer than the model has positions for.
    """

    def __init__(self, c: SimpleNamespace):
        super().__init__()
        self.wte = nn.Parameter(torch.empty(c.vocab, c.width))
        self.position = nn.Parameter(torch.empty(c.max_answer, c.width))
        self.wpe = nn.Parameter(torch.empty(c.max_answer, c.width))
        self.conditioning, self.block, self.ln_f = ConditioningAttention(c), GPT2Block(c), nn.LayerNorm(c.width)
        self.output, self.rate = nn.Linear(c.width, c.vocab, bias=False), c.text_dropout

    def forward(self, vectors: Tensor, ids: Tensor) -> Tensor:
        """Logits [B, A, V] of the token after each of ids [B, A]."""
        x = F.embedding(ids, self.wte) + self._context(vectors, ids.shape[1])
        return self.output(self.ln_f(self.block(F.dropout(x, self.rate, self.training))))

    def generate(self, vectors: Tensor, length: int, start: int, stop: int) -> Tensor:
        """Greedy ids int64 [B, length], one position of work per token; after `stop` follow zeros."""
        context = self._context(vectors, length)
        token = torch.full((len(vectors),), start, device=vectors.device)
        done = torch.zeros_like(token, dtype=torch.bool)
        answer = torch.zeros(len(vectors), length, dtype=torch.long, device=vectors.device)
        cache = [vectors.new_empty(len(vectors), 0, vectors.shape[-1])] * 2
        for t in range(length):
            x = F.embedding(token, self.wte)[:, None] + context[:, t : t + 1]
            token = self.output(self.ln_f(self.block(x, cache)))[:, 0].argmax(-1).masked_fill(done, 0)
            answer[:, t] = token
            done |= token == stop
            if done.all():
                break
        return answer

    def _context(self, vectors: Tensor, length: int) -> Tensor:
        """What is added to the token embeddings of the first `length` positions, [B, length, D]."""
        if length > len(self.position):
            raise ValueError(f"length: answers of {length} tokens, the model has {len(self.position)} positions")
        position = self.position[:length]
        added = self.conditioning(position, vectors) + (position + self.wpe[:length])
        return added.expand(-1, length, -1)
