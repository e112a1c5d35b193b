"""The exported PyTorch model against the JAX model, by itself and away from JAX."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from tap_jax.export import torch_model
from tap_jax.export.folder import random_batch
from tap_jax.models import accounting
from tests.export.conftest import CONFIGS, TASKS

torch.set_num_threads(1)  # tiny tensors


def tensors(batch):
    return {name: torch.from_numpy(value) for name, value in batch.items()}


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
@pytest.mark.parametrize("name", CONFIGS)
def test_outputs_and_generated_ids_are_those_of_jax(exported, tokenizer, name, task):
    made = exported(name)
    twin = torch_model.load(made.folder)
    tokens = {"start": tokenizer.cls_id, "stop": tokenizer.sep_id}
    stream = task.streams[-1]  # mmlu: another domain than the first
    batch = random_batch(made.model, stream, np.random.default_rng(5))
    ours, our_ids = made.outputs(made.model, task, tokens)(made.frozen, made.model.collect(made.blocks, stream), batch)
    with torch.no_grad():
        theirs = twin(task.name, domain=stream.domain, **tensors(batch)).numpy()
    assert theirs.shape == ours.shape and theirs.dtype == np.float32
    np.testing.assert_allclose(theirs, ours, rtol=0, atol=1e-4 * np.abs(ours).max())
    assert np.abs(ours).max() > 0.1
    if our_ids is not None:
        del batch["answers"]
        ids = twin.generate(task.name, domain=stream.domain, **tensors(batch)).numpy()
        assert np.array_equal(ids, our_ids)
        assert len(np.unique(ids)) > 1


def test_generation_stops_at_the_stop_token_and_answers_do_not_depend_on_each_other(exported):
    twin = torch_model.load(exported("flava").folder)
    batch = tensors(random_batch(exported("flava").model, TASKS[-1].streams[0], np.random.default_rng(6)))
    del batch["answers"]
    free = twin.generate("vqa", **batch)
    stop = int(free[0, 1])
    twin.config["tokens"]["stop"] = stop
    stopped = twin.generate("vqa", **batch)
    for row, whole in zip(stopped.tolist(), free.tolist(), strict=True):
        end = whole.index(stop) + 1 if stop in whole else len(whole)
        assert row == whole[:end] + [0] * (len(whole) - end)
    for n in range(3):
        alone = twin.generate("vqa", **{name: value[n : n + 1] for name, value in batch.items()})
        assert torch.equal(alone[0], stopped[n])
    assert torch.equal(twin.generate("vqa", length=2, **batch), stopped[:, :2])


@pytest.mark.parametrize("name", CONFIGS)
def test_weights_are_stored_once_and_only_blocks_are_trained(exported, name):
    made = exported(name)
    twin = torch_model.load(made.folder)
    frozen, blocks = accounting.shapes(made.model)
    trained = twin.trainable_parameters()
    assert sum(p.numel() for p in trained) == accounting.count(blocks)
    assert sum(p.numel() for p in twin.parameters()) == accounting.count(blocks) + accounting.count(frozen)
    assert all(p.requires_grad for p in trained)
    assert not any(p.requires_grad for p in twin.frozen.parameters())
    assert set(twin.blocks) == set(made.model.block_names)
    assert not list(twin.buffers())


@pytest.mark.parametrize("name", ["flava", "vilt, other choices", "flava, standard", "flava, bottlenecks"])
def test_every_block_of_a_task_gets_a_gradient_and_no_other(exported, name):
    made = exported(name)
    for task in TASKS:
        twin, stream = torch_model.load(made.folder), task.streams[0]
        batch = tensors(random_batch(made.model, stream, np.random.default_rng(7)))
        twin(task.name, domain=stream.domain, **batch).square().sum().backward()
        reached = {b for b, module in twin.blocks.items() if any(p.grad is not None for p in module.parameters())}
        assert reached == set(made.model.blocks_of(stream))
        assert all(p.grad is None for p in twin.frozen.parameters())


def test_dropout_is_on_in_training_only_and_everywhere(exported):
    made = exported("flava")
    twin = torch_model.load(made.folder)
    batch = tensors(random_batch(made.model, TASKS[3].streams[0], np.random.default_rng(8)))
    run = lambda: twin("mmlu", domain="law", **batch)  # noqa: E731
    assert torch.equal(run(), run())
    twin.train()
    assert not torch.equal(run(), run())
    del batch["answers"]
    assert torch.equal(*(twin.generate("mmlu", domain="law", **batch) for _ in range(2)))
    assert twin.training
    for rate in ("lora_dropout", "head_dropout", "text_dropout"):
        config = json.loads((made.folder / "config.json").read_text())
        for other in ("lora_dropout", "head_dropout", "text_dropout"):
            config["model"][other] = 0.5 if other == rate else 0.0
        twin = torch_model.Model(config)
        twin.load_state_dict(torch_model.load(made.folder).state_dict())
        twin.train()
        task, domain = (TASKS[2], "news") if rate == "head_dropout" else (TASKS[3], "law")
        batch = tensors(random_batch(made.model, task.streams[0], np.random.default_rng(8)))
        outputs = [twin(task.name, domain=domain, **batch) for _ in range(2)]
        assert not torch.equal(*outputs)


def test_works_where_there_is_no_jax(exported, tokenizer, tmp_path):
    """A process in which JAX and this package cannot be imported, with a copy of one file."""
    made, vqa = exported("vilt"), TASKS[-1]
    shutil.copytree(made.folder, tmp_path / "model")
    shutil.move(tmp_path / "model" / "torch_model.py", tmp_path / "torch_model.py")
    batch = random_batch(made.model, vqa.streams[0], np.random.default_rng(9))
    save_file(batch, tmp_path / "batch.safetensors")
    code = """if True:
        import sys

        class Blocked:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in ("jax", "jaxlib", "flax", "orbax", "tap_jax", "transformers"):
                    raise ImportError(name + " is not here")

        sys.meta_path.insert(0, Blocked())
        sys.path.insert(0, "")
        try:
            import jax
        except ImportError:
            pass
        else:
            raise SystemExit("jax is here")
        from safetensors.torch import load_file, save_file
        from torch_model import load

        model, batch = load("model"), load_file("batch.safetensors")
        answers = batch.pop("answers")
        outputs = {
            "logits": model("vqa", answers=answers, **batch).detach(),
            "ids": model.generate("vqa", **batch),
            "picture": model("fashion_mnist", images=batch["images"]).detach().contiguous(),
        }
        save_file(outputs, "outputs.safetensors")
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = load_file(tmp_path / "outputs.safetensors")
    tokens = {"start": tokenizer.cls_id, "stop": tokenizer.sep_id}
    ours, ids = made.outputs(made.model, vqa, tokens)(
        made.frozen, made.model.collect(made.blocks, vqa.streams[0]), batch
    )
    np.testing.assert_allclose(found["logits"], ours, rtol=0, atol=1e-4 * np.abs(ours).max())
    assert np.array_equal(found["ids"], ids)
    assert found["picture"].shape == (3, 64, 64, 3)


def test_wrong_calls_are_named(exported, tmp_path):
    twin = torch_model.load(exported("flava").folder)
    tokens = torch.ones(1, 4, dtype=torch.long)
    for call, message in (
        (lambda: twin("agnews", tokens=tokens), "agnews: unknown task; this model has cifar100, .*"),
        (lambda: twin("mmlu", tokens=tokens), "mmlu: domain is None; use one of law, medicine, moral"),
        (lambda: twin("mmlu", domain="sport", tokens=tokens), "mmlu: domain is 'sport'; use one of"),
        (lambda: twin("vqa", tokens=tokens), "vqa: images= is missing"),
        (lambda: twin("mmlu", domain="law", tokens=tokens), "mmlu: answers= is missing"),
        (lambda: twin("ag_news", tokens=tokens.repeat(1, 3)), "tokens: 12 in a text, the model has 9 positions"),
        (lambda: twin.generate("ag_news", tokens=tokens), "ag_news: is text_classification; generate is for"),
        (lambda: twin.generate("mmlu", domain="law", tokens=tokens, length=7), "length: answers of 7 tokens, .* 6"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"format is None, not 'tap_jax.torch/1'"):
        torch_model.load(tmp_path)


def test_pixels_are_standardised_as_in_training():
    from tap_jax.data.device_data import standardise

    pixels = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3), dtype=np.uint8)
    np.testing.assert_allclose(torch_model.standardise(torch.from_numpy(pixels)), standardise(pixels), atol=1e-6)
