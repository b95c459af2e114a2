"""Check for non-finite losses, which runs one step behind training and before any checkpoint is saved."""

from typing import Any

import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader

from cdc_mmpg.data.batch import FeatureBatch
from cdc_mmpg.errors import DivergedError
from cdc_mmpg.methods.step_check import StepCheck

STEPS = 6


class Losses(LightningModule):
    """Module with a given loss per batch, which records the logged loss by step."""

    learning_rate = 0.25

    def __init__(self, losses: list[float]) -> None:
        super().__init__()
        self.losses, self.weight = losses, nn.Parameter(torch.zeros(()))
        self.logged: dict[int, float] = {}

    def training_step(self, batch: FeatureBatch, batch_idx: int) -> torch.Tensor:
        return self.weight * 0 + self.losses[batch_idx]

    def on_train_batch_start(self, batch: FeatureBatch, batch_idx: int) -> None:
        if "train/loss" in (metrics := self.trainer.callback_metrics):
            self.logged[batch_idx] = float(metrics["train/loss"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Saver(Callback):
    """Callback that saves a checkpoint after one given batch."""

    def __init__(self, path: Any, after_batch: int) -> None:
        self.path, self.after_batch = path, after_batch

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, out: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == self.after_batch:
            trainer.save_checkpoint(self.path)


def fit(losses: list[float], *callbacks: Callback, accumulated: int = 1) -> Losses:
    module = Losses(losses)
    batches: Any = [
        FeatureBatch(torch.zeros(2), torch.zeros(2), torch.tensor([2 * number, 2 * number + 1]))
        for number in range(STEPS)
    ]
    Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, accumulate_grad_batches=accumulated, callbacks=list(callbacks),
    ).fit(module, DataLoader(batches, batch_size=None))  # fmt: skip
    return module


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("step", [0, 2, STEPS - 1])
def test_non_finite_loss_stops_the_run_and_names_its_samples(step, value):
    losses = [1.0] * STEPS
    losses[step] = value
    samples = rf"\[{2 * step}, {2 * step + 1}\]"
    message = rf"loss is {value} in epoch 1, step {step}, on training samples {samples} .*now 0\.25\)"
    with pytest.raises(DivergedError, match=message):
        fit(losses, StepCheck())


def test_non_finite_loss_of_an_accumulated_batch_names_that_batch():
    with pytest.raises(DivergedError, match=r"loss is nan in epoch 1, step 1, on training samples \[8, 9\]"):
        fit([1.0] * 4 + [float("nan"), 1.0], StepCheck(), accumulated=3)


def test_checkpoint_is_saved_only_after_its_step_was_checked(tmp_path):
    losses = [1.0, float("nan"), *[1.0] * 4]
    with pytest.raises(DivergedError, match="step 1"):
        fit(losses, StepCheck(), Saver(tmp_path / "after.ckpt", after_batch=1))
    assert not (tmp_path / "after.ckpt").exists()
    fit([1.0] * STEPS, StepCheck(), Saver(tmp_path / "good.ckpt", after_batch=1))
    assert (tmp_path / "good.ckpt").exists()


def test_the_mean_loss_of_a_step_is_logged_when_the_next_one_has_ended():
    module = fit([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], StepCheck())
    assert module.logged == {2: 1.0, 3: 2.0, 4: 3.0, 5: 4.0}
    module = fit([1.0, 2.0, 3.0, 5.0, 6.0, 7.0], StepCheck(), accumulated=2)
    assert module.logged == {4: 1.5, 5: 1.5}
