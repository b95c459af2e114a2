"""An optimizer step is made of the same samples, and is their mean, on any number of devices."""

import os
import re
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed

from cdc_mmpg.data.batch import UNKNOWN_LABEL
from cdc_mmpg.data.sampling import BatchPlan, EpochBatches, EpochDataModule, EpochOrder, plan_batches
from cdc_mmpg.errors import ConfigError
from cdc_mmpg.models.processes import average_over_processes, moments_over_processes
from cdc_mmpg.results import RESUME
from cdc_mmpg.training.cli import main
from communities import write_msrvtt_retrieval
from processes import finish, kill, recording, start, start_ranks, steps, until
from tolerances import assert_agree

PLANS = [BatchPlan(8, *rest) for rest in ((8, 1), (2, 1), (4, 2), (1, 2), (2, 4), (1, 8))]


class Samples(EpochDataModule):
    """As many samples as labels."""

    def __init__(self, labels: list[int], plan: BatchPlan, rank: int = 0, even: bool = False) -> None:
        super().__init__(plan.step, 3, plan.at_once)
        self._labels, self.even = torch.tensor(labels), even
        self.trainer = SimpleNamespace(world_size=plan.world, global_rank=rank, current_epoch=2)
        self._epoch = 2

    def __len__(self) -> int:
        return len(self._labels)

    def __getitems__(self, items: list[tuple[int, int]]) -> list[tuple[int, int]]:
        return items

    def labels(self, split: str) -> torch.Tensor:
        return self._labels

    def fingerprint(self, split: str, frames: bool) -> str:
        return ""


@pytest.mark.parametrize("size", [8, 16, 19, 21, 23, 24])
@pytest.mark.parametrize("plan", PLANS)
def test_every_step_has_the_same_samples_on_any_number_of_devices(plan, size):
    labels = np.random.default_rng(size).integers(3, size=size) - 1
    labels[labels < 0] = UNKNOWN_LABEL
    values = np.random.default_rng(0).standard_normal(size)
    order = EpochOrder(size, 3, True).draw(2)
    modules = [Samples(labels.tolist(), plan, rank) for rank in range(plan.world)]
    loaders = [list(module.batches(module, shuffle=True)) for module in modules]
    assert {len(batches) for batches in loaders} == {plan.count(size)}
    assert all(epoch == 2 for batches in loaders for batch in batches for epoch, _ in batch)
    for number in range(-(-size // plan.step)):
        step = order[number * plan.step : (number + 1) * plan.step]
        part = slice(number * plan.accumulated, (number + 1) * plan.accumulated)
        drawn, means = [], {False: 0.0, True: 0.0}
        for module, batches in zip(modules, loaders, strict=True):
            assert len(batches) == len(modules[0].batches(modules[0], shuffle=True))
            for place, batch in enumerate(batches[part], number * plan.accumulated):
                own = np.array([index for _, index in batch])
                assert 1 <= len(own) <= plan.at_once
                if module.weigh(place, known=False):
                    drawn += own.tolist()
                else:
                    assert own.tolist() == [step[0]]  # the stand-in
                for known in (False, True):
                    used = own[labels[own] != UNKNOWN_LABEL] if known else own
                    mean = values[used].mean() if len(used) else 0.0
                    # What Lightning and DDP do with the losses of a step.
                    means[known] += module.weigh(place, known) * mean / plan.accumulated / plan.world
        assert sorted(drawn) == sorted(step)
        assert means[False] == pytest.approx(values[step].mean())
        known = step[labels[step] != UNKNOWN_LABEL]
        assert means[True] == pytest.approx(values[known].mean() if len(known) else 0.0)


def test_weights_are_exactly_one_where_a_device_has_all_of_a_step():
    module = Samples([0, UNKNOWN_LABEL, 1, 1, UNKNOWN_LABEL, 2, 0], BatchPlan(4, 4, 1))
    list(module.batches(module, shuffle=True))
    assert [module.weigh(place, known) for place in range(2) for known in (False, True)] == [1.0] * 4


def test_a_step_in_which_no_answer_is_known_weighs_nothing():
    module = Samples([UNKNOWN_LABEL] * 4, BatchPlan(4, 1, 2))
    list(module.batches(module, shuffle=True))
    assert [module.weigh(place, known=True) for place in range(2)] == [0.0, 0.0]


def test_for_a_loss_over_a_whole_step_all_processes_have_as_many_samples():
    plan = BatchPlan(8, 2, 4)
    modules = [Samples([0] * 19, plan, rank, even=True) for rank in range(4)]
    drawn = [list(module.batches(module, shuffle=True)) for module in modules]
    for batches in zip(*drawn, strict=True):
        assert len({len(batch) for batch in batches}) == 1
    last = [index for batches in drawn for _, index in batches[-1]]
    order = EpochOrder(19, 3, True).draw(2)
    assert sorted(last) == sorted([*order[16:], order[16]])


def test_evaluation_counts_every_sample_once():
    for size in (7, 8, 13):
        for plan in PLANS[:4]:
            modules = [Samples([0] * size, plan, rank) for rank in range(plan.world)]
            loaders = [module.batches(module, shuffle=False) for module in modules]
            drawn = [list(loader) for loader in loaders]
            assert [len(loader) for loader in loaders] == [len(batches) for batches in drawn]
            assert sorted(index for batches in drawn for batch in batches for _, index in batch) == list(range(size))
            assert [[i for batch in batches for _, i in batch] for batches in drawn] == [
                list(range(rank, size, plan.world)) for rank in range(plan.world)
            ]
            assert all(len(batch) <= plan.at_once for batches in drawn for batch in batches)
    module = Samples([0] * 7, BatchPlan(8, 8, 1))
    assert [len(batch) for batch in module.batches(module, shuffle=False, at_once=3)] == [3, 3, 1]
    module = Samples([0, 0], BatchPlan(4, 1, 4))
    with pytest.raises(ConfigError, match="2 samples cannot be shared out to 4 processes"):
        module.batches(module, shuffle=False)


def test_the_order_follows_from_seed_and_epoch():
    orders = {tuple(EpochOrder(20, seed, True).draw(epoch).tolist()) for seed in (0, 1) for epoch in (0, 1)}
    assert len(orders) == 4
    assert all(sorted(order) == list(range(20)) for order in orders)
    order = EpochOrder(5, 0, False)
    order.set_epoch(3)
    assert (list(order), len(order)) == ([(3, index) for index in range(5)], 5)


def test_an_epoch_can_be_entered_behind_any_step_of_it():
    whole = list(EpochBatches(EpochOrder(19, 3, True), BatchPlan(8, 2, 2), 1))
    behind = EpochBatches(EpochOrder(19, 3, True), BatchPlan(8, 2, 2), 1, skip=1)
    assert list(behind) == whole[2:]
    assert list(behind) == whole
    assert len(behind) == len(whole) == 5


@pytest.mark.parametrize(
    ("arguments", "plan", "accumulated"),
    [
        ((256, None, 1), (256, 256, 1), 1),
        ((256, 64, 1), (256, 64, 1), 4),
        ((256, 64, 8), (256, 32, 8), 1),
        ((256, None, 8), (256, 32, 8), 1),
        ((32, 4, 2), (32, 4, 2), 4),
    ],
)
def test_the_per_device_batch_follows_from_step_and_devices(arguments, plan, accumulated):
    assert plan_batches(*arguments) == plan
    assert plan_batches(*arguments).accumulated == accumulated


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((256, None, 3), "256 questions.*to 3 devices: take 2 or 4 devices"),
        ((32, None, 64), "32 questions.*to 64 devices: take 32 devices"),
        ((256, 48, 1), "256 of 256 questions, does not divide into batches of 48.*take 32 or 64"),
        ((256, 100, 2), "128 of 256 questions, does not divide into batches of 100.*take 64 or 128"),
    ],
)
def test_indivisible_batches_are_refused_with_the_numbers_that_divide(arguments, said):
    with pytest.raises(ConfigError, match=said):
        plan_batches(*arguments)


FIXED = ["--model.init_args.encoder.dropout=0", "--model.init_args.encoder.drop_path=0", "--trainer.max_epochs=2",
         "--trainer.callbacks+=processes.Witness"]  # fmt: skip


def train(command: list[str], devices: int, folder: Path) -> dict[str, Any]:
    """Return what the first of so many processes writes down of a run."""
    (out,) = (part.partition("=")[2] for part in command if part.startswith("--trainer.default_root_dir"))
    if devices == 1:
        folder.mkdir()
        running = [start(folder / "log0", main, command)]
    else:
        running = start_ranks(folder, main, [*command, f"--trainer.devices={devices}"], world=devices)
    for rank, process in enumerate(running):
        assert finish(process) == 0, (folder / f"log{rank}").read_text()
    found: dict[str, Any] = torch.load(Path(out) / "witness.0.pt", weights_only=False)
    return found


def assert_same_run(ours: dict[str, Any], alone: dict[str, Any], last: bool = False) -> None:
    """Compare weights and all that was logged, or the `last` of it: its test alone."""
    assert ours["weights"].keys() == alone["weights"].keys()
    for name, value in alone["weights"].items():
        both = ours["weights"][name], value
        if name.endswith("attn.qkv.bias"):  # of the keys, which change nothing: their gradients are rounding errors
            both = tuple(torch.cat([part[:192], part[384:]]) for part in both)
        torch.testing.assert_close(*both, rtol=1e-3, atol=3e-5, msg=lambda text, name=name: f"{name}: {text}")
    part = slice(-1 if last else 0, None)
    for logged, expected in zip(ours["logged"][part], alone["logged"][part], strict=True):
        assert [name for name, _ in logged] == [name for name, _ in expected]
        assert dict(logged) == pytest.approx(dict(expected), rel=1e-3, abs=1e-4)


@pytest.mark.slow
def test_a_run_is_the_same_on_one_two_and_four_devices(fit, tmp_path):
    """Steps of eight and of four of twelve questions, in batches of eight, four, two and one."""
    found = {
        (devices, at_once): train(
            fit("fine_tuning", *FIXED, "--data.init_args.batch_size=8", f"--data.init_args.per_device={at_once}",
                out=tmp_path / f"{devices}-{at_once}"),
            devices, tmp_path / f"log{devices}-{at_once}",
        )
        for devices, at_once in ((1, 8), (1, 2), (2, 4), (2, 1), (4, 2))
    }  # fmt: skip
    alone = found.pop((1, 8))
    for ours in found.values():
        assert_same_run(ours, alone)


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [((2, 1), (1, 4)), ((1, 4), (2, 2))])
def test_a_run_goes_on_on_another_number_of_devices(before, after, fit, tmp_path):
    """It is stopped in the middle of an epoch of six steps, and ends as one that was not."""
    sizes = [*FIXED, "--data.init_args.batch_size=4", "--trainer.max_epochs=3"]
    alone = train(fit("fine_tuning", *sizes, out=tmp_path / "alone"), 1, tmp_path / "logs-alone")
    command = [*fit("fine_tuning", *sizes, out=tmp_path), *recording(tmp_path / "last.pt", pause=0.3)]
    slow = [*command, f"--data.init_args.per_device={before[1]}"]
    logs, folder = tmp_path / "logs", tmp_path / "msvd" / "fine_tuning" / "seed0"
    logs.mkdir()
    if before[0] == 1:
        running = [start(logs / "log0", main, slow)]
    else:
        running = start_ranks(logs, main, [*slow, f"--trainer.devices={before[0]}"], world=before[0])
    batches = 4 // before[0] // before[1] * before[0]  # of all processes, in a step
    until(lambda: steps(tmp_path / "last.pt") >= 4 * batches, running[0])  # the first of the second epoch
    kill(running[0], signal.SIGTERM)
    assert [finish(process) for process in running] == [143] * before[0], (logs / "log0").read_text()
    (state,) = (folder / RESUME).glob("stopped-step=*.ckpt")
    assert int(re.search(r"step=(\d+)", state.name)[1]) in (4, 5)
    more = [*command, f"--data.init_args.per_device={after[1]}"]
    assert_same_run(train(more, after[0], tmp_path / "logs-after"), alone, last=True)
    said = (tmp_path / "logs-after" / "log0").read_text()
    assert f"goes on as {after[0]} x {4 // after[0] // after[1]} x {after[1]}" in said
    assert "not the same to the last bit" in said


@pytest.mark.slow
def test_negatives_are_those_of_the_whole_step(tmp_path):
    root = write_msrvtt_retrieval(tmp_path / "clips")
    found = []
    for devices in (1, 2):
        out = tmp_path / str(devices)
        command = [
            "fit", "--config=experiments/methods/fine_tuning.yaml",
            "--config=experiments/datasets/msrvtt_retrieval.yaml",
            f"--trainer.default_root_dir={out / 'msrvtt_retrieval' / 'fine_tuning' / 'seed0'}",
            f"--data.init_args.root={root}", f"--data.init_args.cache_dir={tmp_path / 'data'}",
            f"--data.init_args.vocab={root / 'vocab.txt'}", "--data.init_args.image_size=32",
            "--data.init_args.num_workers=0", "--data.init_args.batch_size=4", "--model.init_args.encoder.depth=1",
            "--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu", *FIXED,
        ]  # fmt: skip
        found.append(train(command, devices, tmp_path / f"log{devices}"))
    assert_same_run(found[1], found[0])


def moments(path: str) -> int:
    """Write this process's mean, deviation and gradient of moments over two processes."""
    torch.distributed.init_process_group("gloo", rank=int(os.environ["LOCAL_RANK"]), world_size=2)
    rank = torch.distributed.get_rank()
    rows = torch.load(path)
    own = (rows[:2] if rank == 0 else rows[2:]).clone().requires_grad_()  # two rows, and three
    mean, std = moments_over_processes(own)
    (mean.square() * std).sum().backward()
    number = average_over_processes(own.detach().mean(), torch.tensor(float(own.numel())))
    torch.save((mean.detach(), std.detach(), own.grad / 2, number), f"{path}.{rank}")
    torch.distributed.destroy_process_group()
    return 0


def test_statistics_over_processes_are_those_of_all_rows(tmp_path):
    path = tmp_path / "rows"
    torch.save(torch.randn(5, 7), path)
    for process in start_ranks(tmp_path / "logs", moments, str(path)):
        assert finish(process) == 0, (tmp_path / "logs" / "log0").read_text()
    rows = torch.load(path).requires_grad_()
    std, mean = torch.std_mean(rows, dim=0, correction=0)
    (mean.square() * std).sum().backward()
    parts = [torch.load(f"{path}.{rank}") for rank in range(2)]
    for part in parts:
        assert_agree(part[0], mean.detach())
        assert_agree(part[1], std.detach())
    assert_agree(torch.cat([part[2] for part in parts]), rows.grad)
    assert float(sum(part[3] for part in parts)) / 2 == pytest.approx(float(rows.mean()), abs=1e-6)
