"""Pretraining of a small encoder on captioned clips: masked words first, then questions about the clips."""

from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cdc_mmpg.data.batch import CaptionBatch, FeatureBatch, Split, View, normalise
from cdc_mmpg.data.sampling import EpochDataModule
from cdc_mmpg.dimensions import FEATURE_DIM
from cdc_mmpg.errors import ConfigError
from cdc_mmpg.methods.base import Averages, Method, ParameterCounts, Traffic, count
from cdc_mmpg.models.all_in_one import AllInOne
from cdc_mmpg.models.fda import StaticLayer
from cdc_mmpg.models.heads import Head
from cdc_mmpg.models.processes import average_over_processes
from cdc_mmpg.models.reading import Reading
from cdc_mmpg.models.weights import save_safetensors


class Turn(NamedTuple):
    """Plan of a training step, equal on all processes."""

    captions: bool  # whether the step trains on captions, not on questions
    frames: Tensor | None  # (B,) the single frame used of each clip; None uses all frames
    counts: bool  # whether the batch has samples that count, see `EpochBatches`


class EncoderPretraining(Method):
    """Pretraining on captions for some epochs, then on questions and captions in turn; writes encoder and reading.

    The paper's encoder comes from All-in-One's pretraining on millions of clips; this method is for encoders small
    enough to train from random weights. Half of the words of a caption are masked, and all words in a fifth of the
    captions; the answers to questions are words of the full vocabulary. Nearly all batches use a single frame per clip,
    which costs a third and teaches frame content equally well; the last epochs use all frames. In addition, a quarter
    of each batch is encoded like anchors (one frame, a neutral prompt), and the words of the caption are predicted
    from the anchor feature. The learning rate warms up over `WARM_UP_STEPS` steps.

    Args:
        encoder, head, learning_rate, weight_decay, seed: see `Method`; the head is that of the questions.
        caption_epochs: number of initial epochs with captions only.
        question_share: share of question batches after these epochs.
        whole_epochs: number of final epochs that use all frames of every clip.
        anchor_weight: weight of the loss of predicting words from anchors, which is a mean over the full vocabulary, of
            which a caption has few words; 0 disables it.
    """

    reads: ClassVar[View] = "captions"
    trains_in_turn: ClassVar[bool] = True
    averages: Averages = "step"
    needs_whole_step = "the loss is averaged over all masked words of a step"
    monitor = "val/loss"
    monitor_mode: ClassVar[Literal["min", "max"]] = "min"

    MASKED_SHARE = 0.5  # share of masked words
    FULLY_MASKED_SHARE = 0.2  # share of captions with all words masked
    SINGLE_FRAME_RATE = 0.95  # share of batches with a single frame per clip
    ANCHOR_SHARE = 0.25  # share of a batch that is also encoded like anchors
    WARM_UP_STEPS = 100
    CLIPS_AT_ONCE = 64

    def __init__(
        self,
        encoder: AllInOne,
        head: Head,
        caption_epochs: int = 4,
        question_share: float = 0.75,
        whole_epochs: int = 2,
        anchor_weight: float = 10.0,
        learning_rate: float = 7e-4,
        weight_decay: float = 0.01,
        seed: int = 0,
    ) -> None:
        super().__init__(encoder, head, True, learning_rate, weight_decay, seed)
        least = min(caption_epochs, whole_epochs)
        if least < 0 or not 0 <= anchor_weight < float("inf") or not 0 <= question_share <= 1:
            raise ConfigError(
                f"caption_epochs {caption_epochs}, whole_epochs {whole_epochs} and anchor_weight {anchor_weight} must "
                f"be at least 0 and finite, and question_share {question_share} from 0 to 1"
            )
        self.caption_epochs, self.question_share, self.whole_epochs = caption_epochs, question_share, whole_epochs
        self.anchor_weight = anchor_weight
        self._turn = Turn(captions=True, frames=None, counts=True)
        self.layer = StaticLayer(head.inputs, encoder.text_embeddings.word_embeddings.num_embeddings)
        self.word_head = nn.Sequential(nn.Linear(FEATURE_DIM, FEATURE_DIM), nn.GELU(), nn.LayerNorm(FEATURE_DIM))
        self.anchor_head = nn.Linear(FEATURE_DIM, encoder.text_embeddings.word_embeddings.num_embeddings)
        self.word_bias = nn.Parameter(torch.zeros(encoder.text_embeddings.word_embeddings.num_embeddings))

    def mask_words(self, batch: CaptionBatch, training: bool) -> Tensor:
        """Draw which words of the captions are masked, (B, L): half of them or all, but at least one.

        Outside training the draws depend only on the caption's place in the split, so that they are equal in every
        epoch and batch.
        """
        rows, length = batch.caption_ids.shape
        device = batch.labels.device
        if training:
            words, captions = torch.rand(rows, length, device=device), torch.rand(rows, 1, device=device)
        else:
            drawn = [np.random.default_rng((self.seed, i)).random(1 + length) for i in batch.indices.tolist()]
            captions, words = torch.from_numpy(np.stack(drawn)).to(device).split([1, length], dim=1)
        masked = (words < self.MASKED_SHARE) | (captions < self.FULLY_MASKED_SHARE)
        cls, sep = batch.neutral[0], batch.neutral[-1]
        is_word = (batch.caption_mask == 1) & (batch.caption_ids != cls) & (batch.caption_ids != sep)
        masked &= is_word
        masked[:, 1] |= is_word[:, 1]
        return masked

    def captions_loss(self, batch: CaptionBatch, training: bool) -> tuple[Tensor, Tensor]:
        """Return the cross-entropy of the masked words and the share predicted correctly, both scalars.

        The means are over words in training, else over captions, so that they do not depend on the batches.
        """
        masked = self.mask_words(batch, training)
        places = masked.flatten().nonzero().squeeze(1)  # synchronises with the GPU: all shapes depend on it
        ids = batch.caption_ids.masked_fill(masked, batch.neutral[1])
        words = self.encoder.encode_words(normalise(batch.frames), ids, batch.caption_mask)
        words = words.flatten(0, 1).index_select(0, places)
        with self.float32():
            scores = F.linear(
                self.word_head(words), self.encoder.text_embeddings.word_embeddings.weight, self.word_bias
            )
            targets = batch.caption_ids.flatten()[places]
            if training:
                loss = self._rescale(F.cross_entropy(scores, targets), len(targets))
                return loss, (scores.argmax(-1) == targets).float().mean()
            of_words = torch.stack(
                [F.cross_entropy(scores, targets, reduction="none"), (scores.argmax(-1) == targets).float()], dim=-1
            )
            of_captions = of_words.new_zeros(len(masked), 2).index_add(0, places // masked.shape[1], of_words)
            loss, right = (of_captions / masked.sum(1, keepdim=True).clamp(min=1)).mean(0)
            return loss, right

    def anchors_loss(self, batch: CaptionBatch) -> Tensor:
        """Return the loss of predicting the words of a caption from the anchor feature of one frame, a scalar."""
        part = slice(max(1, int(len(batch.labels) * self.ANCHOR_SHARE)))
        captions = batch.caption_ids[part]
        frame = int(torch.randint(batch.frames.shape[1], ()))
        prompt = batch.neutral.expand(len(captions), -1)
        video = normalise(batch.frames[part, frame : frame + 1])
        encoded = self.encoder(video, prompt, None)
        with self.float32():
            scores = self.anchor_head(encoded.fused)
        targets = torch.zeros_like(scores).scatter_(1, captions, 1.0)
        targets[:, 0] = 0  # padding
        return self._rescale(self.anchor_weight * F.binary_cross_entropy_with_logits(scores, targets), len(captions))

    def questions_loss(self, batch: CaptionBatch) -> tuple[Tensor, Tensor]:
        """Return the head's loss and the share of correct answers, both scalars."""
        encoded = self.encoder(normalise(batch.frames), batch.text_ids, batch.text_mask)
        with self.float32():
            fused = encoded.fused
            scores = self.head(fused, self.layer)
            loss = self.head.loss(scores, FeatureBatch(fused, batch.labels, batch.indices))
            if self.training:
                loss = self._rescale(loss, len(scores))
            return loss, (scores.argmax(-1) == batch.labels).float().mean()

    def _rescale(self, mean: Tensor, number: int) -> Tensor:
        """Rescale a mean over `number` items of this process, see `average_over_processes`."""
        return average_over_processes(mean, mean.new_full((), number * self._turn.counts))

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Draw the plan of the step with the first process's seed, then seed this process.

        With different plans, processes would wait for gradients of parameters that others leave out.
        """
        self.seed_step(batch_idx, rank=0)
        frames = None
        if self.current_epoch < self.trainer.max_epochs - self.whole_epochs and torch.rand(()) < self.SINGLE_FRAME_RATE:
            frames = torch.randint(batch.frames.shape[1], batch.labels.shape, device=batch.labels.device)
        captions = self.current_epoch < self.caption_epochs or bool(torch.rand(()) >= self.question_share)
        data = getattr(self.trainer, "datamodule", None)
        counts = not isinstance(data, EpochDataModule) or data.weigh(batch_idx, known=False) > 0
        self._turn = Turn(captions, frames, counts)
        if self.global_rank:
            self.seed_step(batch_idx, self.global_rank)

    def _step(self, batch: Any, split: Split) -> Tensor:
        if split == "train":
            captions, frames, _ = self._turn
            if frames is not None:
                batch = batch._replace(frames=batch.frames.take_along_dim(frames.view(-1, 1, 1, 1, 1), dim=1))
            loss = self.captions_loss(batch, training=True)[0] if captions else self.questions_loss(batch)[0]
            return loss + self.anchors_loss(batch) if self.anchor_weight else loss
        words, words_accuracy = self.captions_loss(batch, training=False)
        loss, accuracy = self.questions_loss(batch)
        for name, value in (("words_accuracy", words_accuracy), ("answers_accuracy", accuracy), ("loss", words + loss)):
            self.log(f"{split}/{name}", value, batch_size=float(len(batch.labels)), sync_dist=True, prog_bar=True)
        return words + loss

    def configure_optimizers(self) -> dict[str, Any]:
        """Add a warm-up to `Method`'s schedule: large first steps easily break randomly initialised attention."""
        configured = super().configure_optimizers()
        optimizer, decay = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
        steps = min(self.WARM_UP_STEPS, decay.total_iters)
        warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / steps, total_iters=steps)
        configured["lr_scheduler"]["scheduler"] = torch.optim.lr_scheduler.ChainedScheduler([warm_up, decay])
        return configured

    def parameter_counts(self) -> ParameterCounts:
        """Count the encoder; the pretraining heads are discarded."""
        trained = sum(parameter.numel() for parameter in self.parameters() if parameter.requires_grad)
        return ParameterCounts(count(self.encoder), 0, trained)

    def traffic(self) -> Traffic:
        """Return no bytes: nothing is sent."""
        return Traffic(0, 0)

    def export(self, folder: Path) -> None:
        """Write the encoder, from which all methods start, and the reading, which sessions can average."""
        save_safetensors(self.encoder.state_dict(), folder / "encoder.safetensors")
        torch.manual_seed(self.seed)
        reading = Reading()
        reading.fit(*self._encode_captioned(), self.seed)
        reading.save(folder / "reading.safetensors")

    @torch.no_grad()
    def _encode_captioned(self) -> tuple[Tensor, list[list[int]]]:
        """Return anchor features (N, T, 192) of all frames of the captioned clips, and the captions as word ids."""
        data, encoder = self.trainer.datamodule, self.encoder.eval()
        clips, features, words = data.captions.train, [], []
        for start in range(0, len(clips), self.CLIPS_AT_ONCE):
            items = [(0, index) for index in range(start, min(start + self.CLIPS_AT_ONCE, len(clips)))]
            batch = data.transfer_batch_to_device(clips.__getitems__(items), self.device, 0)
            prompt = batch.neutral.expand(len(items), -1)
            frames = normalise(batch.frames).split(1, dim=1)
            features.append(torch.stack([encoder(frame, prompt, None).fused for frame in frames], dim=1).cpu())
            lengths = batch.caption_mask.sum(1).tolist()  # [CLS] first, [SEP] last
            words += [ids[1 : length - 1] for ids, length in zip(batch.caption_ids.tolist(), lengths, strict=True)]
        return torch.cat(features), words
