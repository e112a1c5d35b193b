"""`tap_jax.config`: the defaults are the paper's, and every mistake is one clear line."""

import dataclasses
import json
import re
import subprocess
import sys

import pytest

from tap_jax.config import (
    NEUTRAL_FIELDS,
    config_hash,
    default_config,
    differences,
    from_json,
    load_config,
    margins_of,
    override,
    table_federation,
    to_json,
    validate,
    value_of,
    variants_of,
)
from tap_jax.config.defaults import FLAVA_POSITIONS, IMAGE_SIDE
from tap_jax.config.files import names
from tap_jax.data import examples
from tap_jax.errors import UserError
from tap_jax.models.layers import ModelConfig
from tap_jax.registry import METHODS
from tap_jax.tasks import KINDS, find_task

FLAVA, VILT = "configs/flava.py", "configs/vilt.py"

# Typed from the paper, and from the specification where the paper is silent: field -> (FLAVA, ViLT).
PAPER = {
    # Tables 21 and 22; of ViLT's tasks none is image classification.
    "cohort_size": (2, 2),
    "batch_size": (128, 128),
    "model.encoder_rank": (8, 4),
    "model.attention_rank": (16, 8),
    "model.expert_rank": (4, 8),
    "model.lora_dropout": (0.3, 0.3),
    "distillation.temperature": (1, 1),
    "distillation.weights.image_generation": (2e-3, 2e-3),
    "distillation.weights.text_generation": (1, 1),
    "distillation.weights.image_classification": (2e-3, 2e-3),
    "distillation.weights.text_classification": (2e-3, 2e-3),
    "optimizer.learning_rate_initial": (1e-4, 1e-4),
    "optimizer.learning_rate": (3e-4, 4e-4),
    "optimizer.weight_decay": (0.01, 0.01),
    "optimizer.warmup_rounds": (20, 20),
    "local_steps": (20, 30),
    "post_steps": (50, 50),
    "rounds": (200, 200),
    "margins.image_generation": (0.005, 0.01),
    "margins.text_classification": (0.005, 0.01),
    "margins.text_generation": (0.01, 0.02),
    "feddat.bottleneck": (32, 16),
    "feddat.weight": (2e-3, 2e-3),
    "disentafl.weight": (0.5, 0.5),
    "per_fedavg.inner_scale": (1, 1),  # inner updates have the rates of the outer ones
    # Tables 18 to 20.
    "model.head_hidden": ((384,), (3072, 768)),
    "model.head_activation": ("relu", "gelu"),
    "model.head_dropout": (0.3, 0.1),
    "model.head_layer_norm": (False, True),
    "model.image_channels": ((64, 32, 16), (64, 32, 16)),
    "model.text_cond_heads": (8, 8),
    "model.text_heads": (4, 4),
    "model.text_inner": (1536, 1536),
    # The model of the specification.
    "model.width": (768, 768),
    "model.heads": (12, 12),
    "model.mlp": (3072, 3072),
    "model.image_size": (224, 224),
    "model.patch": (16, 32),
    "model.upsample": (2, 2),
    "model.vocab": (30522, 30522),
    "model.max_text": (256, 40),
    "model.max_answer": (256, 40),
    "model.backbone": ("routed", "routed"),
    "model.backbone_layers": ((1, 1), (4, 4)),
    "model.lora_alpha_ratio": (2, 2),
    "model.qv_delta": (True, True),
    "model.text_dropout": (0.1, 0.1),
    "model.condition": ("pooled", "pooled"),
    # Training, data and metrics of the specification.
    "seed": (41, 41),
    "optimizer.post_learning_rate": (1e-4, 1e-4),
    "optimizer.clip_norm": (1.0, 1.0),
    "optimizer.state": ("fresh", "fresh"),
    "aggregation": ("samples", "samples"),
    "replacement.history": ("plain", "plain"),
    "replacement.scope": ("task", "task"),
    "replacement.first": ("replace", "replace"),
    "distillation.temperature_power": (-2, -2),
    "distillation.image_loss": ("kl", "kl"),
    "per_fedavg.hessian": ("none", "none"),
    "federation.groups": (3, 3),
    "federation.split": ("share", "share"),
    "data.test_split": ("common", "common"),
    "metrics.bertscore_layer": (9, 9),
}
# Of one model only.
FLAVA_ONLY = {"margins.image_classification": 0.01, "model.image_layers": 12, "model.text_layers": 12}
VILT_ONLY = {"model.position": "interpolate", "model.position_grid": 12}

# Section 4 of the specification: task -> percent of the group's third, pattern by pattern.
CLIENTS = {
    "configs/flava.py": (
        {"tiny_imagenet": 100},
        {"ag_news": 33},
        {"ag_news": 33},
        {"caltech256": 50},
        {"vqa": 50},
        {"vqa": 50},
        {"mmlu": 100},
        {"cifar100": 100, "ag_news": 34},
        {"common_gen": 50, "fashion_mnist": 100},
        {"common_gen": 50, "caltech256": 50},
    ),
    "configs/vilt.py": (
        {"fashion_mnist": 33},
        {"ag_news": 33},
        {"ag_news": 33},
        {"caltech256": 50},
        {"vqa": 50},
        {"vqa": 50},
        {"mmlu": 100},
        {"fashion_mnist": 33, "ag_news": 34},
        {"common_gen": 50, "fashion_mnist": 34},
        {"common_gen": 50, "caltech256": 50},
    ),
}
# Section 1: task -> kind, modalities, domains, head, classes.
TASK_TABLE = {
    "tiny_imagenet": ("image_classification", ("image",), ("fine_grained",), "tiny_imagenet", 200),
    "cifar100": ("image_classification", ("image",), ("fine_grained",), "cifar100", 100),
    "fashion_mnist": ("image_generation", ("image",), ("general_object",), "image_generation", 0),
    "caltech256": ("image_generation", ("image",), ("general_object",), "image_generation", 0),
    "ag_news": ("text_classification", ("text",), ("news",), "ag_news", 4),
    "mmlu": ("text_generation", ("text",), ("law", "medicine", "moral"), "text_generation", 0),
    "vqa": ("text_generation", ("image", "text"), ("visual_answering",), "text_generation", 0),
    "common_gen": ("text_generation", ("text",), ("common_sense",), "text_generation", 0),
}


def get(config, field):
    for key in field.split("."):
        config = config[key]
    return config


def error_of(**fields):
    """The message `validate` raises with these fields (`__` for the dot) set in a default config."""
    config = default_config()
    with config.ignore_type():
        for field, value in fields.items():
            *sections, leaf = field.split("__")
            section = config
            for key in sections:
                section = section[key]
            section[leaf] = value
    with pytest.raises(UserError) as caught:
        validate(config)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("field", PAPER)
def test_paper_configs_hold_the_paper_s_values(field):
    flava, vilt = PAPER[field]
    assert get(load_config(FLAVA), field) == flava
    assert get(load_config(VILT), field) == vilt


def test_paper_configs_hold_what_only_one_model_has():
    for path, expected in ((FLAVA, FLAVA_ONLY), (VILT, VILT_ONLY)):
        config = load_config(path)
        assert {field: get(config, field) for field in expected} == expected


def test_sizes_that_are_typed_twice_agree():
    assert IMAGE_SIDE == examples.IMAGE_SIDE
    wide = ModelConfig(max_text=FLAVA_POSITIONS)
    assert wide.text_rows == FLAVA_POSITIONS
    config = default_config().model
    for field in dataclasses.fields(ModelConfig):
        assert field.name in ("attention", "bottleneck", "dtype", "remat") or config[field.name] == field.default


def test_paper_configs_describe_30_clients():
    for path, tasks in ((FLAVA, 8), (VILT, 6)):
        federation = table_federation(load_config(path))
        assert (len(federation.clients), len(federation.tasks)) == (30, tasks)
        found = [
            (c.group, c.pattern, {task: round(100 * share, 9) for task, share in c.shares.items()})
            for c in federation.clients
        ]
        assert found == [(group, n, row) for group in range(3) for n, row in enumerate(CLIENTS[path])]


def test_the_registry_holds_the_paper_s_tasks():
    found = {task.name: dataclasses.astuple(task)[1:6] for task in map(find_task, TASK_TABLE)}
    assert found == TASK_TABLE


def test_default_config_is_valid_and_fresh_each_time():
    validate(default_config())
    default_config().margins.text_generation = 5.0
    assert default_config().margins.text_generation == 0.01


def test_argument_and_overrides_change_fields(tmp_path):
    config = load_config(f"{FLAVA}:rounds=5,model.backbone_layers=(2, 3),method=fedavg,variants=()", {"seed": 7})
    assert (config.rounds, config.model.backbone_layers, config.method, config.seed) == (5, (2, 3), "fedavg", 7)
    assert load_config(FLAVA, {"model": {"width": 24}, "model.heads": 3, "model.text_cond_heads": 2}).model.width == 24
    assert config.is_locked
    path = tmp_path / "mine.py"
    path.write_text("from tap_jax.config import default_config as get_config\n")
    assert load_config(path).to_dict() == default_config().to_dict()
    with pytest.raises(UserError, match="takes no argument"):
        load_config(f"{path}:rounds=5")


def test_a_name_is_a_file_of_the_package_from_any_folder(tmp_path, monkeypatch):
    files = {name: load_config(f"configs/{name}.py").to_dict() for name in names()}
    assert {"demo", "flava", "vilt", "checks/margins"} <= set(files)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()  # a folder is no configuration
    assert files == {name: load_config(name).to_dict() for name in names()}
    assert load_config("checks/margins:rounds=5,seed=7", {"batch_size": 3}).to_dict() == files["checks/margins"] | {
        "rounds": 5,
        "seed": 7,
        "batch_size": 3,
    }


@pytest.mark.parametrize(
    ("path", "overrides", "message"),
    [
        ("configs/none.py", {}, "no file 'configs/none.py'; name a Python file, or a configuration: checks/.*, demo,"),
        ("dmo", {}, "no file 'dmo'; .* configuration: checks/distillation, .*, demo, demo_vilt, flava, mini, .*vilt$"),
        ("tests/test_config.py", {}, "has no function get_config"),
        (FLAVA, {"optimizer.learning_rat": 1.0}, "did you mean 'optimizer.learning_rate'.*optimizer has: .*clip_norm"),
        (FLAVA, {"learning_rate": 1.0}, "learning_rate: unknown field; did you mean 'optimizer.learning_rate'"),
        (FLAVA, {"rounds.x": 1}, "rounds: has no field 'x'"),
        (FLAVA, {"nowhere.x": 1}, "nowhere: unknown field; config has: aggregation"),
        (FLAVA, {"rounds": "5"}, "rounds: '5' is of type str; use a int"),
        (FLAVA, {"rounds": True}, "rounds: True is of type bool"),
        (FLAVA, {"rounds": 5.5}, "rounds: 5.5 is of type float"),
        (FLAVA, {"model": 3}, "model: is a section, not a value; model has: attention_rank, .*, width$"),
        (FLAVA, {"model": "vilt"}, "model: is a section, not a value; did you mean model.name=vilt[?]$"),
        (FLAVA + ":engine=auto", {}, "engine: is a section, not a value; did you mean engine.packing=auto or engine."),
        (FLAVA + ":rounds", {}, "'rounds' is no key=value"),
    ],
)
def test_loading_names_the_mistake(path, overrides, message):
    with pytest.raises(UserError, match=message):
        load_config(path, overrides)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "fedprox"}, "method: unknown 'fedprox'; use one of tap, fedavg, local"),
        ({"method": "disentafl", "model__backbone": "standard"}, "model.backbone: 'disentafl' .*; use 'routed'"),
        ({"replacement__criterion": "held_out"}, "data.held_out: 0, but replacement.criterion .*; use a part"),
        ({"replacement__criterion": "gradient", "replacement__margin": "relative"}, "replacement.margin: 'relative'"),
        ({"distillation__patience": 2}, "data.held_out: 0, but distillation.patience looks at held-out samples"),
        ({"model__name": "clip"}, "model.name: unknown 'clip'; use one of flava, vilt"),
        ({"variants": ("feddat",)}, "variants: 'feddat' does not come out of method 'tap'; use tap, tap-no-kd"),
        (
            {"method": "fedavg", "variants": ("fedavg", "fedavg+post", "fedavg")},
            "variants: fedavg, fedavg[+]post, fedavg; name each once",
        ),
        ({"cohort_size": 31}, "cohort_size: 31 of 30 clients; use at most 30"),
        ({"cohort_size": 0}, "cohort_size: 0; use more than 0"),
        ({"local_steps": -1}, "local_steps: -1; use more than 0"),
        ({"model__lora_dropout": 1.0}, "model.lora_dropout: 1.0; use at least 0 and less than 1"),
        ({"optimizer__clip_norm": -1.0}, "optimizer.clip_norm: -1.0; use at least 0"),
        ({"optimizer__learning_rate": float("nan")}, "optimizer.learning_rate: nan; use a finite number"),
        ({"margins__text_generation": -0.1}, "margins.text_generation: -0.1"),
        ({"margins": (0.1, (0.1, -0.2))}, r"margins: \(0.1, -0.2\); use finite numbers of at least 0"),
        ({"margins": (0.1, (0.1, 0.2, 0.3))}, r"margins: \(0.1, 0.2, 0.3\); use numbers, pairs"),
        ({"margins": (0.1, 0.2, 0.2)}, "margins: 0.2 is there twice; drop one"),
        ({"margins": "low"}, "margins: 'low'; use numbers"),
        ({"model__heads": 7}, "model.heads: 7 does not divide model.width 768"),
        ({"model__patch": 15}, "model.patch: 15 does not divide"),
        ({"model__upsample": 0.3}, "model.upsample: 0.3 makes 19.2 pixels of 64; use a factor that gives a whole"),
        ({"model__max_text": 513}, "model.max_text: 513, but FLAVA's text encoder has 512 positions; use at most 512"),
        ({"model__max_answer": 2}, r"model.max_answer: 2 leaves no room between \[CLS\] and \[SEP\]; use at least 3"),
        (
            {"model__name": "vilt", "model__position": "slice"},
            "model.position: 'slice' has 12x12 positions, too few for 224 pixels in patches of 16",
        ),
        ({"model__backbone_layers": (1,)}, "model.backbone_layers"),
        ({"model__head_hidden": (1.5,)}, "model.head_hidden: .*whole numbers"),
        ({"federation__table": "custom"}, "federation.rows: goes with federation.table='custom'"),
        (
            {"federation__groups": 99_999_999_999},
            "federation.groups: 99999999999 of 10 clients each are 999,999,999,990; use at most 1,000,000 clients",
        ),
        ({"federation__groups": 100_001}, "federation.groups: 100001 of 10 clients each are 1,000,010; use at most"),
        ({"federation__parts": 3, "federation__split": "iid"}, "federation.parts: goes with federation.split='share'"),
        ({"federation__parts": 4}, "federation.parts: 4 for 3 groups leaves data without a client; use at most 3"),
        ({"federation__rows": ({"ag_news": 1.0},)}, "federation.rows: goes with federation.table='custom'"),
        ({"federation__table": "custom", "federation__rows": ({"agnews": 1.0},)}, "unknown task 'agnews'; known"),
        ({"federation__table": "custom", "federation__rows": ("ag_news",)}, "federation.rows: 'ag_news'; use a dict"),
        ({"federation__table": "custom", "federation__rows": ({"vqa": 0.7}, {"vqa": 0.7})}, "hands out 1.40 of vqa"),
        ({"data__root": ""}, "data.root: empty"),
        ({"mesh__data": -1}, "mesh.data: -1; use at least 0"),
        ({"mesh__parallel": "xmap"}, "mesh.parallel: unknown 'xmap'; use one of .*shard_map"),
        ({"optimizer__momentum": 0.9}, "optimizer.momentum: unknown field; optimizer has: "),
        ({"batchsize": 1}, "batchsize: unknown field; did you mean 'batch_size'"),
    ],
)
def test_validate_names_field_and_remedy(fields, message):
    assert re.search(message, error_of(**fields))


def test_a_missing_field_is_named():
    config = default_config()
    del config.optimizer.clip_norm
    with pytest.raises(UserError, match="optimizer.clip_norm: missing"):
        validate(config)


def test_margins_are_a_number_or_one_per_kind():
    assert margins_of(load_config(VILT))[""]["text_generation"] == 0.02
    config = load_config(FLAVA, {"margins": 0})
    validate(config)
    assert margins_of(config) == {"": dict.fromkeys(KINDS, 0.0)}
    assert config_hash(config) == config_hash(load_config(FLAVA, {"margins": 0.0}))
    with pytest.raises(UserError, match="margins: -1; use finite numbers of at least 0"):
        load_config(FLAVA, {"margins": -1})


def test_a_list_of_margins_makes_a_variant_of_each():
    table22 = default_config().margins.to_dict()
    config = load_config(FLAVA, {"margins": [table22, (0.01, 0.04), 0.05], "variants": ("tap", "local")})
    found = margins_of(config)
    assert variants_of(config) == ("tap", "local", "tap@0.01-0.04", "tap@0.05")
    assert found[""] == table22 and found["@0.05"] == dict.fromkeys(KINDS, 0.05)
    # Tables 11 to 13: the lower one for image generation and text classification.
    low = {kind for kind, margin in found["@0.01-0.04"].items() if margin == 0.01}
    assert low == {"image_generation", "text_classification"} and set(found["@0.01-0.04"].values()) == {0.01, 0.04}
    again = from_json(to_json(config))
    validate(again)
    assert margins_of(again) == found and config_hash(again) == config_hash(config)
    # What "tap" is does not depend on what is trained beside it; the run as a whole does.
    assert config_hash(config) != config_hash(load_config(FLAVA, {"variants": ("tap", "local")}))


def test_variants_of_different_margins_have_different_names():
    one = dict(image_classification=0.01, image_generation=0.02, text_classification=0.02, text_generation=0.01)
    other = one | dict(text_classification=0.01, text_generation=0.02)
    entries = [0.5, one, other, (0.01, 0.02), (0.02, 0.02), 1e-5, 0.1000001, 0.1, 1e6]
    names = list(margins_of(load_config(FLAVA, {"margins": entries})))
    assert names[1:4] == ["@0.02-0.01", "@0.01-0.02-0.01-0.02", "@0.01-0.02"]
    assert names[4:] == ["@0.02", "@1e-05", "@0.1000001", "@0.1", "@1000000"]
    with pytest.raises(UserError, match="is there twice"):
        load_config(FLAVA, {"margins": [0.5, one, (0.02, 0.01)]})


def test_centralised_is_one_client_with_all_the_data():
    federation = table_federation(load_config(FLAVA, {"method": "centralised", "variants": ()}))
    assert len(federation.clients) == 1
    whole = pytest.approx({task.name: 1.0 for task in federation.tasks}, abs=0.011)
    assert federation.clients[0].shares == whole, "ag_news: the paper's thirds are 33, 33 and 34 %"


def test_value_of_a_field():
    config = default_config()
    assert value_of(config, "optimizer.clip_norm") == 1.0
    assert value_of(config, "mesh") is config.mesh
    with pytest.raises(UserError, match="did you mean 'mesh.clients'"):
        value_of(config, "mesh.client")


def test_custom_federation():
    rows = ({"ag_news": 0.5}, {"ag_news": 0.5, "vqa": 1})
    config = load_config(FLAVA, {"federation": {"table": "custom", "rows": rows, "groups": 2}})
    federation = table_federation(config)
    assert [client.group for client in federation.clients] == [0, 0, 1, 1]
    assert [task.name for task in federation.tasks] == ["ag_news", "vqa"]


def test_variants_default_to_the_method():
    for method in METHODS:
        assert variants_of(override(default_config(), {"method": method})) == (method.replace("_", "-"),)
    assert "fedavg+2p" in variants_of(load_config(FLAVA))


@pytest.mark.parametrize("path", [FLAVA, VILT])
def test_json_round_trip(path):
    rows = ({"ag_news": 0.5},)
    config = load_config(
        path, {"margins": 0.1, "federation.table": "custom", "federation.rows": rows, "cohort_size": 1}
    )
    again = from_json(to_json(config))
    validate(again)
    assert again.to_dict() == config.to_dict()
    assert config_hash(again) == config_hash(config)


def test_json_file_can_be_loaded_and_may_lack_newer_fields(tmp_path):
    values = json.loads(to_json(load_config(VILT)))
    del values["engine"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert load_config(tmp_path / "config.json").to_dict() == load_config(VILT).to_dict()
    for text, message in (("{", "not valid JSON"), ("[]", "not a JSON object"), ('{"x": 1}', "x: unknown field")):
        with pytest.raises(UserError, match=message):
            from_json(text)


def test_hash_ignores_exactly_the_neutral_fields():
    standard, reference = default_config(), config_hash(default_config())
    other = {"str": "other", "int": 3, "float": 0.123, "bool": True, "tuple": (1, 2, 3)}

    def fields(section, prefix=""):
        for key in section:
            if hasattr(section[key], "items"):
                yield from fields(section[key], f"{prefix}{key}.")
            else:
                yield prefix + key

    for field in fields(standard):
        if field in ("method", "variants"):
            continue
        value = get(standard, field)
        new = (not value) if isinstance(value, bool) else other[type(value).__name__]
        new = value + 1 if new == value else new
        changed = config_hash(override(default_config(), {field: new})) != reference
        assert changed == (field not in NEUTRAL_FIELDS), field
    assert config_hash(override(default_config(), "method=fedavg")) != reference
    assert config_hash(override(default_config(), "variants=tap")) == reference
    assert config_hash(override(default_config(), "seed=42")) != reference


def test_what_tells_two_configurations_apart():
    one = default_config()
    assert differences(one, override(default_config(), "checkpoint_every=1")) == ""
    other = override(default_config(), {"rounds": 5, "margins": 0.01, "model.weights": "w" * 200})
    found = differences(one, other, limit=9)
    assert "rounds: 200, now 5" in found and "margins.image_generation: 0.005, now 0.01" in found
    assert len(found) < 300 and "model.weights: '', now 'wwww" in found
    several = override(default_config(), {"margins": (one.margins.to_dict(), 0.2)})
    assert differences(one, several, limit=1) == "margins@0.2.image_classification: none, now 0.2; and 4 more"


def test_hash_does_not_depend_on_the_process():
    code = "from tap_jax.config import *; print(config_hash(default_config()))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == config_hash(default_config())


def test_the_config_of_an_older_run_is_read():
    """Fields have been renamed, dropped and given words since."""
    values = json.loads(to_json(default_config()))
    values["data"] |= {"folders": {"vqa": "", "mine": "there"}}
    values["engine"] |= {"clients_per_pass": 3, "pipeline_rounds": True, "rows_per_chunk": 8, "remat": True}
    del values["engine"]["clients_at_once"]
    found = from_json(json.dumps(values)).engine
    assert (found.clients_at_once, found.remat) == (3, "layer")
