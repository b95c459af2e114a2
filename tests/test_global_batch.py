"""Optimizer steps on any number of devices: the same samples, and their mean."""

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
from cdc_mmpg.models.processes import average_over_processes, compute_moments_over_processes
from cdc_mmpg.results import RESUME
from cdc_mmpg.training.cli import main
from communities import write_msrvtt_retrieval
from processes import build_recorder_arguments, count_steps, finish, kill, start, start_ranks, wait_until
from tolerances import assert_agree

PLANS = [BatchPlan(8, *rest) for rest in ((8, 1), (2, 1), (4, 2), (1, 2), (2, 4), (1, 8))]


class Samples(EpochDataModule):
    """Dataset with one sample per label."""

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
                indices = np.array([index for _, index in batch])
                assert 1 <= len(indices) <= plan.at_once
                if module.weigh(place, known=False):
                    drawn += indices.tolist()
                else:
                    assert indices.tolist() == [step[0]]  # a placeholder sample
                for known in (False, True):
                    used = indices[labels[indices] != UNKNOWN_LABEL] if known else indices
                    mean = values[used].mean() if len(used) else 0.0
                    # Lightning and DDP combine the losses of a step like this.
                    means[known] += module.weigh(place, known) * mean / plan.accumulated / plan.world
        assert sorted(drawn) == sorted(step)
        assert means[False] == pytest.approx(values[step].mean())
        known = step[labels[step] != UNKNOWN_LABEL]
        assert means[True] == pytest.approx(values[known].mean() if len(known) else 0.0)


def test_weights_are_exactly_one_on_a_single_device():
    module = Samples([0, UNKNOWN_LABEL, 1, 1, UNKNOWN_LABEL, 2, 0], BatchPlan(4, 4, 1))
    list(module.batches(module, shuffle=True))
    assert [module.weigh(place, known) for place in range(2) for known in (False, True)] == [1.0] * 4


def test_a_step_without_known_answers_has_zero_weight():
    module = Samples([UNKNOWN_LABEL] * 4, BatchPlan(4, 1, 2))
    list(module.batches(module, shuffle=True))
    assert [module.weigh(place, known=True) for place in range(2)] == [0.0, 0.0]


def test_even_batches_give_all_processes_equally_many_samples():
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
    with pytest.raises(ConfigError, match="2 samples cannot be divided among 4 processes"):
        module.batches(module, shuffle=False)


def test_the_order_follows_from_seed_and_epoch():
    orders = {tuple(EpochOrder(20, seed, True).draw(epoch).tolist()) for seed in (0, 1) for epoch in (0, 1)}
    assert len(orders) == 4
    assert all(sorted(order) == list(range(20)) for order in orders)
    order = EpochOrder(5, 0, False)
    order.set_epoch(3)
    assert (list(order), len(order)) == ([(3, index) for index in range(5)], 5)


def test_an_epoch_can_be_resumed_after_any_step():
    batches = list(EpochBatches(EpochOrder(19, 3, True), BatchPlan(8, 2, 2), 1))
    resumed = EpochBatches(EpochOrder(19, 3, True), BatchPlan(8, 2, 2), 1, skip=1)
    assert list(resumed) == batches[2:]
    assert list(resumed) == batches
    assert len(resumed) == len(batches) == 5


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
    ("arguments", "message"),
    [
        ((256, None, 3), "256 questions.*among 3 devices: use 2 or 4 devices"),
        ((32, None, 64), "32 questions.*among 64 devices: use 32 devices"),
        ((256, 48, 1), "256 of 256 questions, cannot be divided into batches of 48.*use 32 or 64"),
        ((256, 100, 2), "128 of 256 questions, cannot be divided into batches of 100.*use 64 or 128"),
    ],
)
def test_indivisible_batches_are_refused_with_the_numbers_that_divide(arguments, message):
    with pytest.raises(ConfigError, match=message):
        plan_batches(*arguments)


FIXED = ["--model.init_args.encoder.dropout=0", "--model.init_args.encoder.drop_path=0", "--trainer.max_epochs=2",
         "--trainer.callbacks+=processes.Witness"]  # fmt: skip


def train(command: list[str], devices: int, folder: Path) -> dict[str, Any]:
    """Train on a number of devices; return the first process's record of the run."""
    (out,) = (part.partition("=")[2] for part in command if part.startswith("--trainer.default_root_dir"))
    if devices == 1:
        folder.mkdir()
        running = [start(folder / "log0", main, command)]
    else:
        running = start_ranks(folder, main, [*command, f"--trainer.devices={devices}"], world=devices)
    for rank, process in enumerate(running):
        assert finish(process) == 0, (folder / f"log{rank}").read_text()
    record: dict[str, Any] = torch.load(Path(out) / "witness.0.pt", weights_only=False)
    return record


def assert_same_run(ours: dict[str, Any], reference: dict[str, Any], last: bool = False) -> None:
    """Compare the weights and all logged values, or with `last` only those of the test."""
    assert ours["weights"].keys() == reference["weights"].keys()
    for name, value in reference["weights"].items():
        both = ours["weights"][name], value
        if name.endswith("attn.qkv.bias"):  # without the keys' bias, whose gradient is rounding error only
            both = tuple(torch.cat([part[:192], part[384:]]) for part in both)
        torch.testing.assert_close(*both, rtol=1e-3, atol=3e-5, msg=lambda text, name=name: f"{name}: {text}")
    part = slice(-1 if last else 0, None)
    for logged, expected in zip(ours["logged"][part], reference["logged"][part], strict=True):
        assert [name for name, _ in logged] == [name for name, _ in expected]
        assert dict(logged) == pytest.approx(dict(expected), rel=1e-3, abs=1e-4)


@pytest.mark.slow
def test_a_run_is_the_same_on_one_two_and_four_devices(fit, tmp_path):
    """Twelve questions make a step of eight and one of four, in batches of eight, four, two and one."""
    records = {
        (devices, at_once): train(
            fit("fine_tuning", *FIXED, "--data.init_args.batch_size=8", f"--data.init_args.per_device={at_once}",
                out=tmp_path / f"{devices}-{at_once}"),
            devices, tmp_path / f"log{devices}-{at_once}",
        )
        for devices, at_once in ((1, 8), (1, 2), (2, 4), (2, 1), (4, 2))
    }  # fmt: skip
    reference = records.pop((1, 8))
    for ours in records.values():
        assert_same_run(ours, reference)


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [((2, 1), (1, 4)), ((1, 4), (2, 2))])
def test_a_stopped_run_resumes_on_another_number_of_devices(before, after, fit, tmp_path):
    """The run is stopped within an epoch of six steps, and ends like an uninterrupted one."""
    sizes = [*FIXED, "--data.init_args.batch_size=4", "--trainer.max_epochs=3"]
    reference = train(fit("fine_tuning", *sizes, out=tmp_path / "alone"), 1, tmp_path / "logs-alone")
    command = [*fit("fine_tuning", *sizes, out=tmp_path), *build_recorder_arguments(tmp_path / "last.pt", pause=0.3)]
    slow = [*command, f"--data.init_args.per_device={before[1]}"]
    logs, folder = tmp_path / "logs", tmp_path / "msvd" / "fine_tuning" / "seed0"
    logs.mkdir()
    if before[0] == 1:
        running = [start(logs / "log0", main, slow)]
    else:
        running = start_ranks(logs, main, [*slow, f"--trainer.devices={before[0]}"], world=before[0])
    batches = 4 // before[0] // before[1] * before[0]  # per step, of all processes
    wait_until(lambda: count_steps(tmp_path / "last.pt") >= 4 * batches, running[0])  # in the second epoch
    kill(running[0], signal.SIGTERM)
    assert [finish(process) for process in running] == [143] * before[0], (logs / "log0").read_text()
    (state,) = (folder / RESUME).glob("stopped-step=*.ckpt")
    assert int(re.search(r"step=(\d+)", state.name)[1]) in (4, 5)
    resumed = [*command, f"--data.init_args.per_device={after[1]}"]
    assert_same_run(train(resumed, after[0], tmp_path / "logs-after"), reference, last=True)
    log = (tmp_path / "logs-after" / "log0").read_text()
    assert f"resumes as {after[0]} x {4 // after[0] // after[1]} x {after[1]}" in log
    assert "not bit-identical" in log


@pytest.mark.slow
def test_retrieval_negatives_come_from_the_complete_step(tmp_path):
    root = write_msrvtt_retrieval(tmp_path / "clips")
    records = []
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
        records.append(train(command, devices, tmp_path / f"log{devices}"))
    assert_same_run(records[1], records[0])


def save_moments(path: str) -> int:
    """Write this process's mean, deviation and gradient from moments over two processes."""
    torch.distributed.init_process_group("gloo", rank=int(os.environ["LOCAL_RANK"]), world_size=2)
    rank = torch.distributed.get_rank()
    rows = torch.load(path)
    local_rows = (rows[:2] if rank == 0 else rows[2:]).clone().requires_grad_()  # two rows, and three
    mean, std = compute_moments_over_processes(local_rows)
    (mean.square() * std).sum().backward()
    number = average_over_processes(local_rows.detach().mean(), torch.tensor(float(local_rows.numel())))
    torch.save((mean.detach(), std.detach(), local_rows.grad / 2, number), f"{path}.{rank}")
    torch.distributed.destroy_process_group()
    return 0


def test_statistics_over_processes_are_those_of_all_rows(tmp_path):
    path = tmp_path / "rows"
    torch.save(torch.randn(5, 7), path)
    for process in start_ranks(tmp_path / "logs", save_moments, str(path)):
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
