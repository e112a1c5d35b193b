"""launch/scaling.py: the federations it makes, one that it plays, and what it makes of numbers known by hand."""

import importlib.util
import pathlib
import zlib

import numpy as np
import pytest

from tap_jax import config as configuration
from tap_jax.data import synthetic
from tap_jax.federation import client_table
from tap_jax.tasks import TASKS, find_task

SCRIPT = pathlib.Path(__file__).parents[1] / "launch" / "scaling.py"


@pytest.fixture(scope="module")
def scaling():
    """The script as a module; the tasks that it registers are gone afterwards."""
    spec = importlib.util.spec_from_file_location("scaling", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    before = {id(table): dict(table) for table in (TASKS, synthetic.RULES)}
    yield module
    for table in (TASKS, synthetic.RULES):
        table.clear()
        table.update(before[id(table)])


def test_every_pair_has_two_clients_a_decoder_and_a_domain_of_its_own(scaling):
    federation = client_table([row for number in range(3) for row in scaling.rows_of(number)])
    assert len(federation.tasks) == sum(len(task.modalities) for task in federation.tasks) == 12
    assert len({task.head for task in federation.tasks}) == len({task.domains for task in federation.tasks}) == 12
    assert federation.task_mask.sum(0).tolist() == [2] * 12
    kinds = [task.kind for task in federation.tasks]
    assert {kind: kinds.count(kind) for kind in kinds} == dict.fromkeys(kinds, 3)


@pytest.mark.parametrize("base", ["tiny_imagenet", "common_gen"])
def test_a_disguised_data_set_is_another_that_can_be_undone(scaling, base):
    name = scaling.disguised(base, 5)
    found = synthetic.load(find_task(name), "train", size=30, seed=3)
    again = synthetic.load(find_task(name), "train", size=30, seed=3)
    rng = np.random.default_rng([3, zlib.crc32(name.encode()), 0])
    plain = synthetic.RULES[base](find_task(name), "train", rng, 30)
    if base == "tiny_imagenet":
        assert (found.labels == plain.labels).all() and (found.images == again.images).all()
        assert not (found.images == plain.images).all()
        # The same shuffled pixel values in every picture, or their negatives.
        for one, other in zip(found.images, plain.images, strict=True):
            values = [np.sort(picture.reshape(-1)).tolist() for picture in (one, other, 255 - other)]
            assert values[0] in values[1:]
    else:
        assert found.inputs == again.inputs and found.targets != plain.targets
        words = {}
        for one, other in zip(found.targets, plain.targets, strict=True):
            for mine, theirs in zip(one.split(), other.split(), strict=True):
                assert words.setdefault(theirs, mine) == mine
        assert len(set(words.values())) == len(words) > 10
        assert all(reference[0] == target for reference, target in zip(found.references, found.targets, strict=True))


def test_a_federation_is_played_once(scaling, tiny, monkeypatch, tmp_path, capsys):
    """Two data sets of one kind, which take one program, with a tiny model; the second time nothing is trained."""
    (tmp_path / "tiny.json").write_text(configuration.to_json(tiny(({"ag_news": 1.0},), {"cohort_size": 1})))
    arguments = ["--config", str(tmp_path / "tiny.json"), "--pairs", "2", "--seeds", "41", "--rounds", "1"]
    arguments += ["--out", str(tmp_path / "out")]
    monkeypatch.setattr(scaling, "KINDS", {"caltech256": scaling.KINDS["caltech256"]})
    monkeypatch.setattr(scaling, "PATTERNS", (("caltech256",), ("caltech256",)))
    monkeypatch.setattr(scaling, "FIELDS", {"data.train_size": 40, "data.test_size": 10, "data.held_out": 0.2})
    monkeypatch.setattr(scaling.startup, "start_jax", lambda config: None)
    scaling.main(arguments)
    found = scaling.from_csv((tmp_path / "out" / "scaling.csv").read_text())
    assert {one.task for one in found} == {"caltech256", "caltech256_2"} and len({one.client for one in found}) == 4
    assert len(found) == 4 * 4 and all(np.isfinite(one.value) for one in found)
    losses = [one.value for one in found if one.metric == scaling.LOSS]
    assert len(losses) == len(set(losses)) == 4
    # Stage 2 of TAP begins elsewhere than post-training: with a decoder that nobody trains both would be the same.
    mse = {(one.variant, one.client): one.value for one in found if one.metric == "mse"}
    assert all(mse["tap", client] != mse["fedavg+post", client] for client in range(4))
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert len(before) == 3 and before["scaling.png"].startswith(b"\x89PNG")
    monkeypatch.setattr(scaling, "played", lambda *args: pytest.fail("played again"))
    scaling.main(arguments)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert "2 pairs: server's loss 1.000" in capsys.readouterr().out


def test_ratios_by_hand(scaling):
    def line(pairs, kind, loss, server, post, tap):
        common = (pairs, 41, 0, kind, kind)
        values = (
            ("fedavg", scaling.LOSS, loss),
            ("fedavg", "x", server),
            ("fedavg+post", "x", post),
            ("tap", "x", tap),
        )
        return [scaling.Value(*common, *value) for value in values]

    kinds = list(scaling.KINDS.values())
    found = [one for kind in kinds for one in line(4, kind, 2.0, 1.0, 4.0, 8.0)]
    found += [one for kind in kinds for one in line(8, kind, 3.0 if kind == kinds[0] else 2.0, 1.0, 4.0, 4.0)]
    first, second = (scaling.table(found, pairs) for pairs in (4, 8))
    assert scaling.server_loss(second, first).tolist() == [1.5, 1, 1, 1]
    assert scaling.overall(scaling.server_loss(second, first)) == pytest.approx(1.5**0.25)
    # Image reconstruction comes second, and less of its MSE is better.
    assert scaling.gain(first, first).tolist() == [2, 0.5, 2, 2] and scaling.gain(second, first).tolist() == [1] * 4
    assert scaling.interval(scaling.gain, first, first) == pytest.approx((2**0.5, 2**0.5))
    assert scaling.from_csv(scaling.as_csv(found)) == found


@pytest.mark.parametrize("pairs", ["6", "0", "4 10"])
def test_pairs_come_in_fours(scaling, pairs, tmp_path, capsys):
    with pytest.raises(SystemExit):
        scaling.main(["--pairs", *pairs.split(), "--out", str(tmp_path / "none")])
    assert "use multiples of 4" in capsys.readouterr().err and not (tmp_path / "none").exists()
