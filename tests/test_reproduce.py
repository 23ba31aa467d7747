"""The full-size experiments at a size of seconds: what they leave behind."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from devices import DEVICES
from recorded import assert_record
from torch.nn.functional import cross_entropy

from benchmarks import reproduce
from normlib import models

TINY = {
    "seeds": 1,
    "vgg": reproduce.QUICK["vgg"] | {"steps": 3, "batch_size": 8},
    "deep-linear": reproduce.QUICK["deep-linear"] | {"steps": 3, "depth": 4},
    "learning-rates": reproduce.QUICK["learning-rates"]
    | {"steps": 3, "batch_size": 8, "lr": [0.1, 1e9]},
    "batch-sizes": reproduce.QUICK["batch-sizes"]
    | {"images": 16, "batch_size": [8, 4]},
}


IMAGES = reproduce.synthetic(40, 16)


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Run the command, tiny; return its record."""
    monkeypatch.setattr(reproduce, "QUICK", TINY)
    monkeypatch.setattr(reproduce, "synthetic", lambda: IMAGES)

    def run(*options):
        told = ["reproduce", "--device", "cpu", "--quick", "--out"]
        told += [str(tmp_path / "records"), *options]
        monkeypatch.setattr(sys, "argv", told)
        reproduce.main()
        (file,) = (tmp_path / "records").glob("*")
        assert file.name.startswith("reproduce-cpu-")
        return json.loads(file.read_text())

    threads = torch.get_num_threads()
    yield run
    torch.set_num_threads(threads)


def titles(record):
    fields = reproduce.Run._fields
    return [
        reproduce.Run(*(run[key] for key in fields)).title
        for run in record["runs"]
    ]


def test_a_trial_leaves_a_complete_record(command, capsys):
    record = command()
    assert_record(record)
    wanted = [run.title for run in reproduce.runs(TINY)]
    assert titles(record) == wanted
    assert len(set(wanted)) == len(wanted)
    assert record["settings"]["quick"]
    assert record["settings"]["data"]["name"] == "synthetic"
    shown = capsys.readouterr().out
    assert all(title in shown for title in wanted)
    for run in record["runs"]:
        huge = run["settings"]["lr"] == 1e9
        assert (run["diverged_at"] is not None) == huge, run


def test_what_is_done_is_not_done_again(command, monkeypatch, capsys):
    first = command("--only", "batch-sizes")
    assert len(first["runs"]) == 4
    second = command("--only", "batch")
    assert second["runs"][:4] == first["runs"]
    assert len(second["runs"]) > 4
    monkeypatch.setattr(reproduce, "perform", None)
    assert command("--only", "batch-sizes") == second
    assert "4 of 4 runs are done" in capsys.readouterr().out


def test_a_run_that_is_broken_off_costs_itself_only(command, monkeypatch):
    perform, made = reproduce.perform, []

    def break_off(run, lab):
        made.append(run)
        if len(made) == 2:
            raise KeyboardInterrupt
        return perform(run, lab)

    monkeypatch.setattr(reproduce, "perform", break_off)
    with pytest.raises(KeyboardInterrupt):
        command("--only", "batch 4")
    monkeypatch.setattr(reproduce, "perform", perform)
    record = command("--only", "batch 4")
    assert_record(record)
    assert titles(record) == [run.title for run in made]


def test_no_run_begins_that_would_outlast_the_budget(command, capsys):
    assert len(command("--only", "batch 4")["runs"]) == 2
    record = command("--budget", "0", "--only", "batch 8")
    assert len(record["runs"]) == 2
    shown = capsys.readouterr().out
    assert "next is batch-sizes: batch norm, batch 8, seed 0" in shown
    run = next(reproduce.runs(TINY))
    longest = max(found["seconds"] for found in record["runs"])
    assert reproduce.expected(run, record) == pytest.approx(1.1 * longest)


def test_runs_of_another_commit_are_not_mixed(command, monkeypatch):
    command("--only", "batch 4")
    about = reproduce.provenance

    def changed(*args):
        return about(*args) | {"commit": "0" * 40}

    monkeypatch.setattr(reproduce, "provenance", changed)
    with pytest.raises(SystemExit, match="another commit"):
        command("--only", "batch 4")


def test_the_comparison_with_the_plain_network_comes_first():
    first = [
        (run.experiment, run.variant, run.seed)
        for run in list(reproduce.runs(reproduce.FULL))[:9]
    ]
    norms = ("none", "batch norm", "noisy batch norm")
    assert first == [("vgg", n, seed) for seed in range(3) for n in norms]


def test_without_data_the_full_size_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["reproduce", "--device", "cpu"])
    with pytest.raises(SystemExit, match=r"curl -L .*cifar-10-binary"):
        reproduce.main()


def test_a_trial_uses_a_part_of_the_data_that_is_there(monkeypatch):
    whole = reproduce.synthetic(2_100, 600)
    monkeypatch.setattr(reproduce.data, "cifar10", lambda folder: whole)
    split, name = reproduce.load("somewhere", quick=True)
    assert name == "CIFAR-10"
    assert [len(part) for part in split] == [2_000, 2_000, 500, 500]
    split, _ = reproduce.load("somewhere", quick=False)
    assert split is whole


def test_each_epoch_has_each_example_once():
    order = reproduce.shuffled(10, 3, 7, seed=1)
    assert order.shape == (7, 3)
    for epoch in order.split(3):
        assert len(set(epoch.flatten().tolist())) == epoch.numel()
    assert order.max() == 9
    again, other = (reproduce.shuffled(10, 3, 7, seed=s) for s in (1, 2))
    assert torch.equal(order, again)
    assert not torch.equal(order, other)


def test_looks_are_denser_at_the_start_and_include_the_end():
    assert reproduce.marks(100, 5) == [0, 4, 16, 36, 64, 100]
    assert reproduce.marks(2, 30) == [0, 1, 2]


def test_a_curve_is_made_of_means():
    assert reproduce.curve([1.0, 3.0, 5.0, 6.0, 7.0], points=3) == {
        "every": 2,
        "mean": [2.0, 5.5, 7.0],
    }


def test_json_has_no_infinity():
    told = {"a": [1.234567, float("nan")], "b": (float("inf"), 3, None, True)}
    assert reproduce.plain(told) == {
        "a": [1.235, None],
        "b": [None, 3, None, True],
    }


def lab(device="cpu", dtype=torch.float32, graph=False):
    images = reproduce.on_device(IMAGES, device)
    return reproduce.Lab(*images, device, dtype, graph)


def test_images_have_mean_zero_and_variance_one_in_each_color():
    x = lab().train.batch(torch.arange(40)).double()
    assert x.mean((0, 2, 3)).abs().max() < 1e-5
    assert (x.std((0, 2, 3)) - 1).abs().max() < 1e-5
    assert x.is_contiguous(memory_format=torch.channels_last)


def test_a_run_follows_its_seed_noise_included():
    settings = TINY["vgg"]
    made = [
        reproduce.perform(
            reproduce.Run("vgg", "noisy batch norm", seed, settings), lab()
        )
        for seed in (0, 0, 1)
    ]
    assert made[0]["loss"] == made[1]["loss"] != made[2]["loss"]
    assert made[0]["marks"] == made[1]["marks"] != made[2]["marks"]


def test_looking_does_not_change_the_training():
    losses = [
        reproduce.perform(
            reproduce.Run(
                "vgg", "noisy batch norm", 0, TINY["vgg"] | {"marks": m}
            ),
            lab(),
        )["loss"]
        for m in (1, 3)
    ]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("variant", reproduce.NORMS)
def test_every_variant_trains_in_bfloat16(variant):
    run = reproduce.Run("one look less", variant, 0, TINY["vgg"])
    found = reproduce.perform(run, lab(dtype=torch.bfloat16))
    assert found["diverged_at"] is None
    exact = reproduce.perform(run, lab())
    assert found["loss"] != exact["loss"]
    first = [f["loss"]["mean"][0] for f in (found, exact)]
    assert first[0] == pytest.approx(first[1], rel=0.1)


def test_where_no_graph_can_be_recorded_a_new_process_goes_on_without(
    command, monkeypatch, capsys
):
    """In this one, CUDA's generator of random numbers is broken by then."""

    class Broken:
        def __init__(self, *args):
            raise RuntimeError("not permitted when stream is capturing")

    lab, commands = reproduce.Lab, []

    def ran(command):
        commands.append(command)
        return subprocess.CompletedProcess(command, 3)

    monkeypatch.setattr(reproduce, "Graph", Broken)
    monkeypatch.setattr(reproduce, "Lab", lambda *a: lab(*a[:-1], graph=True))
    monkeypatch.setattr(reproduce, "subprocess", SimpleNamespace(run=ran))
    monkeypatch.setattr(reproduce, "expected", lambda *args: 0)
    with pytest.raises(SystemExit) as end:
        command("--only", "batch 4", "--budget", "500")
    assert end.value.code == 3
    assert "no CUDA graph: not permitted" in capsys.readouterr().out
    (again,) = commands
    monkeypatch.setattr(sys, "argv", again[2:])
    told = reproduce.asked(reproduce.parser())
    assert told.eager
    assert told.only == "batch 4"
    assert 400 < told.budget <= 500


def small_vgg(variant, bench):
    """A network, and its loss of a batch's index."""
    model = models.vgg("small", norm=reproduce.NORMS[variant])
    model.to(bench.device, memory_format=torch.channels_last)

    def loss_of(index):
        scores = model(bench.train.batch(index))
        return cross_entropy(scores, bench.train.y[index])

    return model, loss_of


@pytest.mark.parametrize("variant", reproduce.NORMS)
def test_a_step_asks_for_no_value_and_stays_on_its_device(variant):
    """Or it could not be a graph. The device "meta" has no values."""
    model, loss_of = small_vgg(variant, lab("meta"))
    index = torch.zeros(8, dtype=torch.int64, device="meta")
    reproduce.Eager(model, loss_of, 0.1)(index)
    devices = {t.device.type for t in (*model.parameters(), *model.buffers())}
    assert devices == {"meta"}


@pytest.mark.parametrize("device", DEVICES[1:])
@pytest.mark.parametrize("variant", reproduce.NORMS)
def test_a_graph_takes_the_same_steps(variant, device):
    losses = []
    for graph in (False, True):
        model, loss_of = small_vgg(variant, lab(device))
        order = reproduce.shuffled(40, 8, 20, 0).to(device)
        step = reproduce.stepper(model, loss_of, 0.1, order[0], graph)
        assert isinstance(step, reproduce.Graph) == graph
        torch.manual_seed(0)
        losses.append([step(index).item() for index in order])
    # The noise is drawn from other places of the generator's sequence.
    far = 0.5 if variant == "noisy batch norm" else 0.01
    assert losses[1] == pytest.approx(losses[0], rel=far, abs=far)
