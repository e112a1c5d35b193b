"""`tap-jax describe`: Table 7 to the unit, sums that add up, and nothing allocated."""

import gc
import re

import jax
import numpy as np
import pytest

from tap_jax.config import load_config
from tap_jax.experiment import build
from tap_jax.planning.describe import describe
from tap_jax.planning.headline import evaluation_headline, headline
from tap_jax.planning.outline import outline
from tap_jax.planning.planned_memory import MIB, plan, plan_of

TABLE7 = {  # typed from the paper
    "flava": "avg total 310,559,996.4 · avg trainable 36,862,998.0 · 10.3347 % · with TAP 347,422,994.4 · 18.1086 %",
    "vilt": "avg total 585,627,611.8 · avg trainable 60,668,968.6 · 9.9788 % · with TAP 646,296,580.4 · 18.0053 %",
}
PATTERNS = {  # total and trainable of patterns 0..9 in millions, from the authors' counts
    "flava": "178.67/7.26 201.69/7.18 201.69/7.18 181.49/10.08 375.15/63.55 375.15/63.55 331.81/61.74 382.04/11.41 "
    "438.97/68.34 438.97/68.34",
    "vilt": "370.14/27.70 395.15/29.11 395.15/29.11 370.14/27.70 576.62/85.43 576.62/85.43 750.62/82.35 774.41/47.08 "
    "823.72/96.39 823.72/96.39",
}


def number(text):
    return float(text.replace(",", ""))


def section(text, title):
    """The lines of a section, without its title."""
    return next(part for part in text.split("\n\n") if part.startswith(title)).splitlines()[1:]


@pytest.fixture(scope="module", params=["flava", "vilt"])
def paper(request):
    """(name, text) of the paper's two settings."""
    gc.collect()  # what earlier tests left behind must not vanish in between
    before = len(jax.live_arrays())
    text = describe(outline(load_config(f"configs/{request.param}.py")))
    assert len(jax.live_arrays()) == before
    return request.param, text


def test_table7(paper):
    name, text = paper
    assert TABLE7[name] in text


def test_patterns(paper):
    name, text = paper
    rows = [line.split() for line in section(text, "The same per client pattern")[1:]]
    assert [f"{number(row[2]) / 1e6:.2f}/{number(row[3]) / 1e6:.2f}" for row in rows] == PATTERNS[name].split()
    assert [row[1] for row in rows[:2]] == ["0,10,20", "1,11,21"]


def test_stored_and_counted_add_up(paper):
    _, text = paper
    lines = section(text, "Stored and counted")[:-1]
    values = {line.rsplit(None, 1)[0].strip(): number(line.rsplit(None, 1)[1]) for line in lines}
    total, stored = values.pop("= avg total"), values.pop("= stored")
    assert sum(values.values()) == pytest.approx(total, abs=0.5)
    assert sum(value for name, value in values.items() if "not stored" not in name) == pytest.approx(stored, abs=0.1)
    assert f"{total:,.1f}" in text.split("·")[0]


def test_map_shows_who_owns_what(paper):
    name, text = paper
    found = outline(load_config(f"configs/{name}.py"))
    lines = section(text, "Blocks x client patterns")
    assert lines[0].split()[-1] == "0123456789"
    for block, line in zip(found.partition.names, lines[1:], strict=True):
        shown, _, marks = line.split()
        owners = found.partition.owned[:10, found.partition.names.index(block)]
        assert shown == block
        assert marks == "".join("#" if owns else "." for owns in owners)


def test_the_backbone_and_its_adapters_are_named(paper):
    name, text = paper
    ranks = {"flava": "8 in the encoders, in the backbone 16", "vilt": "4 in the encoders, in the backbone 8"}[name]
    assert f"backbone: routed; adapters: LoRA of rank {ranks} on query and value" in text
    assert "full weights on query and value" in text


@pytest.mark.parametrize("name", ["flava", "vilt"])
@pytest.mark.parametrize(
    ("fields", "shown"),
    [
        ({"method": "fedavg", "model.backbone": "standard"}, "backbone: standard; adapters: LoRA of rank 3 in"),
        ({"method": "feddat", "feddat.bottleneck": 5}, "backbone: routed; adapters: bottlenecks of 5 behind"),
        (
            {"method": "feddat", "feddat.bottleneck": 5, "model.backbone": "standard"},
            "backbone: standard; adapters: bottlenecks of 5 behind",
        ),
    ],
    ids=["standard", "bottlenecks", "both"],
)
def test_models_that_the_paper_does_not_count(tiny, name, fields, shown):
    """What is stored, and no line about TAP or about copies that are not there."""
    rows = ({"ag_news": 0.5}, {"fashion_mnist": 0.5, "ag_news": 0.5})
    fields = fields | {"model.name": name, "model.backbone_layers": (1, 2), "variants": ()}
    config = tiny(rows, fields | ({"model.position_grid": 2} if name == "vilt" else {}))
    found = outline(config)
    text = describe(found)
    assert shown in text.splitlines()[2]
    for word in ("Table 7", "with TAP", "not stored", "qv_delta", "full weights"):
        assert word not in text
    # Client 0 by hand: the text encoder, the backbone and its head.
    c = config.model
    d, low_rank = c.width, lambda inputs, outputs, rank: rank * (inputs + outputs)
    one = 2 * d * 5 + 5 + d  # a bottleneck
    layer = 4 * (d * d + d) + 4 * d + 2 * d * c.mlp + c.mlp + d  # a pre-trained one
    tower = c.text_layers * layer + 2 * d if name == "flava" else 0
    frozen = 3 * layer + tower + (c.vocab + 16 + 2) * d + 2 * d
    glue, head = d * d + d + 2 * d, d * 6 + 6 + 6 * 4 + 4
    bottlenecks, routed = "feddat.bottleneck" in fields, "model.backbone" not in fields
    towers = 0 if name == "vilt" else c.text_layers * (one if bottlenecks else 2 * low_rank(d, d, 3))
    if routed:  # each stage: four experts, and two domain experts of two
        backbone = 3 * one * (4 + 2 * 2) + d * d + d
    else:
        backbone = 3 * (one if bottlenecks else 2 * low_rank(d, d, 2) + 2 * low_rank(d, c.mlp, 2))
    trainable = towers + glue + backbone + head
    (row, _) = [line.split() for line in section(text, "The same per client pattern")[1:]]
    assert row == ["0", "0", f"{frozen + trainable:,}", f"{trainable:,}", row[4], "ag_news"]
    assert number(row[4]) == pytest.approx(100 * trainable / (frozen + trainable), abs=1e-4)
    assert len(section(text, "Blocks x client patterns")) == 1 + len(found.partition.names)


def test_memory_plan_of_a_federation_counted_by_hand(tiny):
    rows = ({"ag_news": 0.5}, {"cifar100": 0.5}, {"ag_news": 0.5, "cifar100": 0.5})
    config = tiny(rows, {"model.width": 64, "model.mlp": 128, "data.train_size": 500, "data.test_size": 100})
    found = outline(config)
    text = describe(found)
    plan = {
        line.rsplit(None, 1)[0].strip(): number(line.rsplit(None, 1)[1])
        for line in section(text, "Memory per device")
        if re.search(r"[\d,]+\.\d$", line)
    }
    like = jax.eval_shape(found.model.init, jax.random.key(0))[1]
    sizes = np.array([sum(leaf.size for leaf in jax.tree.leaves(like[name])) for name in found.partition.names])
    mine = found.partition.owned @ sizes
    assert plan["server's blocks"] == pytest.approx(4 * sizes.sum() / MIB, abs=0.06)
    # The two most demanding clients; a group's slots are bounded on their own, so the plan may be a little above.
    cohort = 4 * np.sort(mine)[-2:].sum() / MIB
    assert cohort - 0.06 <= plan["round, 2 clients: blocks in training"] <= 1.3 * cohort + 0.06
    assert plan["round, 2 clients: AdamW's two moments"] == pytest.approx(
        2 * plan["round, 2 clients: blocks in training"], abs=0.11
    )
    parts = [value for name, value in plan.items() if name.startswith("round,")]
    fixed = sum(plan[name] for name in ("frozen weights (float32)", "server's blocks"))
    data = plan["training and test data, at most"]
    assert plan["= round, without activations"] == pytest.approx(sum(parts) + fixed + data, abs=0.5)
    assert data == pytest.approx(600 * (64 * 64 * 3 + 4 + 4 * 16 + 4) / MIB, abs=0.06)
    assert plan["personal blocks of all clients, only those they own"] == pytest.approx(4 * mine.sum() / MIB, abs=0.06)


def test_more_devices_share_the_cohort(tiny):
    rows = ({"ag_news": 0.5}, {"ag_news": 0.5})
    for clients, shown in ((1, "round, 2 clients"), (2, "round, 1 clients"), (16, "16 x cpu (mesh of 16 x 1)")):
        assert shown in describe(outline(tiny(rows, {"mesh.clients": clients})))  # 16: more than there are here
    for fields, shown in (
        ({"mesh.clients": 0, "mesh.data": 16}, "16 x cpu (mesh of 1 x 16)"),
        ({"mesh.clients": 4, "mesh.data": 4}, "16 x cpu (mesh of 4 x 4)"),
    ):
        assert shown in describe(outline(tiny(rows, fields)))


@pytest.mark.parametrize(
    ("fields", "mesh"),
    [
        ({"mesh.clients": 0}, (2, 4)),  # of the 8 devices of the tests
        ({"mesh.clients": 0, "mesh.data": 2}, (4, 2)),
        ({"mesh.clients": 0, "mesh.parallel": "vmap"}, (1, 1)),
    ],
)
def test_a_run_has_the_devices_and_the_memory_that_are_described(tiny, fields, mesh):
    config = tiny(({"ag_news": 0.5}, {"ag_news": 0.5}), fields)
    run = build(config)
    devices = run.engine.devices
    assert (devices.shards, devices.per_shard) == mesh
    shown = f"{devices.size} x cpu" + (f" (mesh of {mesh[0]} x {mesh[1]})" if devices.size > 1 else "")
    assert f"Memory per device in MiB, {shown}\n" in describe(outline(config))
    where, _, _, parameters, memory = headline(run)
    assert where == f"{shown}, float32"
    # The same but for the data, which now are known, and for weights of a vocabulary that is.
    bound, found = plan(outline(config)), plan_of(run)
    assert found.devices == bound.devices == devices.size
    assert {name: phase.clients for name, phase in found.phases.items()} == {
        name: phase.clients for name, phase in bound.phases.items()
    }
    for name in found.phases:
        assert found.on_device(name) <= bound.on_device(name) <= 1.5 * found.on_device(name)
    own = sum(leaf.size for leaf in jax.tree.leaves(run.initial_blocks))
    assert f"the server's model: {own:,};" in parameters
    most = max(found.together(name) for name in found.phases) / MIB
    assert f"{most:,.3g} MiB with the host" in memory


def test_an_evaluation_says_what_it_is(tiny):
    run = build(tiny(({"ag_news": 1.0},), {"cohort_size": 1, "method": "fedavg"}))
    assert evaluation_headline(run) == [
        "1 x cpu, float32",
        "fedavg: 3 rounds, finished",
        "tasks: ag_news; data: synthetic, 48 to 48 samples a client",
    ]


def test_unknown_sizes_are_said_to_be_unknown(tiny):
    text = describe(outline(tiny(({"ag_news": 1.0},), {"cohort_size": 1, "data.root": "hub", "data.train_size": 0})))
    assert "Neither are the data" in text
    assert "an upper bound: the tokenizer is trained on the data" in text


def test_local_needs_no_teacher_and_no_federated_blocks(tiny):
    text = describe(outline(tiny(({"ag_news": 1.0},), {"cohort_size": 1, "method": "local"})))
    assert "teacher" not in text
    assert "federated blocks" not in text
    assert "after the last, " not in text


def test_flops_of_a_sample_counted_by_hand(tiny):
    """ViLT's text side through the standard backbone: embeddings, projection, three layers, mean, head."""
    fields = {"model.name": "vilt", "model.position_grid": 2, "model.backbone": "standard", "method": "fedavg"}
    config = tiny(({"ag_news": 1.0},), fields | {"model.backbone_layers": (1, 2), "cohort_size": 1})
    t, d, f, r, layers = 16, 8, 12, 2, 3
    projection, mean, head = t * d * d, t * d, d * 6 + 6 * 4
    frozen = 4 * t * d * d + 2 * t * d * f
    adapters = 2 * (t * d * r + t * r * d) + 2 * (t * d * r + t * r * f)
    attention = 2 * t * t * d  # scores and values
    forward = projection + layers * (frozen + adapters + attention) + mean + head
    # Embeddings are frozen, and so are most of the layers' weights: there is one gradient, not two.
    backward = projection + layers * (frozen + 2 * adapters + 2 * attention) + mean + 2 * head
    values = [2 * forward, 2 * backward, 2 * (forward + backward)]
    _, row, note = section(describe(outline(config)), "FLOPs per sample")
    assert row.split() == ["ag_news", *(f"{value / 1e9:,.4g}" for value in values)]
    assert f"A minibatch of 8: {8 * values[2] / 1e12:,.3g} to" in note
    twice = describe(outline(tiny(({"ag_news": 1.0},), {"method": "per_fedavg", "cohort_size": 1})))
    assert "as long as the model takes them, twice a step." in twice


def test_flops_of_the_paper(paper):
    name, text = paper
    rows = {line.split()[0]: line.split()[1:] for line in section(text, "FLOPs per sample")[1:-1]}
    assert len(rows) == {"flava": 8, "vilt": 6}[name]
    forward, backward, both = map(float, rows["fashion_mnist"])
    assert forward + backward == pytest.approx(both, rel=1e-3)
    # Without gradients of frozen weights, the backward pass costs hardly more than the forward pass.
    assert 1 < backward / forward < 1.2
