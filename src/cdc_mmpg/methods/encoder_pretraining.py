"""Pretraining of a small encoder on captioned clips: questions about them, and their captions' words."""

from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cdc_mmpg.data.batch import CaptionBatch, FeatureBatch, Split, View, normalise
from cdc_mmpg.dimensions import FEATURE_DIM
from cdc_mmpg.errors import ConfigError
from cdc_mmpg.methods.base import Method, ParameterCounts, Traffic, count
from cdc_mmpg.models.all_in_one import AllInOne
from cdc_mmpg.models.fda import StaticLayer
from cdc_mmpg.models.heads import Head
from cdc_mmpg.models.reading import Reading
from cdc_mmpg.models.weights import save_safetensors


class EncoderPretraining(Method):
    """Questions and captions of clips; leaves an encoder, and what it reads of an anchor.

    The paper's encoder comes from All-in-One's pretraining on millions of clips; this is for encoders that are small
    enough to begin at random. In the first epochs clips are seen with their captions, half of whose words are masked,
    in a fifth of the captions all of them; then with a question, which is answered in words, as many as the vocabulary
    has. Beside either, one clip in `ANCHORS` is seen as anchors are (one frame, a neutral prompt), and all words of its
    caption are told from the anchor feature. But for the last epochs a single frame of each clip is seen, which costs a
    third and teaches what a frame shows as well. The rate rises over `WARM_UP` steps.

    Args:
        encoder, head, learning_rate, weight_decay, seed: see `Method`; the head reads what the questions are answered
            from.
        caption_epochs: how many epochs see captions.
        whole_epochs: how many of the last epochs see all frames of every clip.
        anchor_weight: of the captions' loss, a mean over all words of which few are in a caption, beside the other's;
            0 leaves it out.
    """

    reads: ClassVar[View] = "captions"
    trains_in_turn: ClassVar[bool] = True
    monitor = "val/loss"
    monitor_mode: ClassVar[Literal["min", "max"]] = "min"

    MASKED = 0.5
    WHOLLY_MASKED = 0.2
    ANCHORS = 2  # one clip in so many of a step
    WARM_UP = 200
    CLIPS_AT_ONCE = 64

    def __init__(
        self,
        encoder: AllInOne,
        head: Head,
        caption_epochs: int = 1,
        whole_epochs: int = 1,
        anchor_weight: float = 10.0,
        learning_rate: float = 6e-4,
        weight_decay: float = 0.01,
        seed: int = 0,
    ) -> None:
        super().__init__(encoder, head, True, learning_rate, weight_decay, seed)
        if min(caption_epochs, whole_epochs) < 0 or not 0 <= anchor_weight < float("inf"):
            raise ConfigError(
                f"caption_epochs {caption_epochs}, whole_epochs {whole_epochs} and anchor_weight {anchor_weight} must "
                "not be negative"
            )
        self.caption_epochs, self.whole_epochs, self.anchor_weight = caption_epochs, whole_epochs, anchor_weight
        words = encoder.text_embeddings.word_embeddings.num_embeddings
        self.word_head = nn.Sequential(nn.Linear(FEATURE_DIM, FEATURE_DIM), nn.GELU(), nn.LayerNorm(FEATURE_DIM))
        self.word_bias = nn.Parameter(torch.zeros(words))
        self.layer = StaticLayer(head.inputs, words)
        self.anchor_head = nn.Linear(FEATURE_DIM, words).requires_grad_(anchor_weight > 0)

    def words_loss(self, batch: CaptionBatch, frames: Tensor) -> Tensor:
        """Return the cross-entropy of masked words of captions with frames (B, T, H, W, 3): of captions, a scalar.

        At least the first word of a caption is masked; which others is drawn anew.
        """
        ids, device = batch.caption_ids, batch.labels.device
        is_word = (batch.caption_mask == 1) & (ids != batch.neutral[0]) & (ids != batch.neutral[-1])
        masked = torch.rand(ids.shape, device=device) < self.MASKED
        masked |= torch.rand(len(ids), 1, device=device) < self.WHOLLY_MASKED
        masked[:, 1] = True
        masked &= is_word
        seen = torch.where(masked, batch.neutral[1], ids)
        words = self.encoder.encode_words(normalise(frames), seen, batch.caption_mask)
        with self.float32():
            embeddings = self.encoder.text_embeddings.word_embeddings.weight
            scores = F.linear(self.word_head(words), embeddings, self.word_bias)
            losses = F.cross_entropy(scores.transpose(1, 2), ids, reduction="none") * masked
            return (losses.sum(1) / masked.sum(1).clamp(min=1)).mean()

    def captions_loss(self, batch: CaptionBatch, frames: Tensor, every: int = 1) -> Tensor:
        """Return the loss of telling the words of every so many-th caption from an anchor feature, a scalar.

        Args:
            batch: captions of B clips.
            frames: (B, 1, H, W, 3) of theirs.
            every: 1 is all.
        """
        frames, captions = frames[::every], batch.caption_ids[::every]
        encoded = self.encoder(normalise(frames), batch.neutral.expand(len(frames), -1), None)
        with self.float32():
            scores = self.anchor_head(encoded.fused)
        there = torch.zeros_like(scores).scatter_(1, captions, 1.0)
        there[:, 0] = 0  # padding
        return self.anchor_weight * F.binary_cross_entropy_with_logits(scores, there)

    def questions_loss(self, batch: CaptionBatch, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Return the head's loss with frames (B, T, H, W, 3), and the share of right answers; scalars."""
        encoded = self.encoder(normalise(frames), batch.text_ids, batch.text_mask)
        with self.float32():
            scores = self.head(encoded.fused, self.layer)
            loss = self.head.loss(scores, FeatureBatch(encoded.fused, batch.labels, batch.indices))
            return loss, (scores.argmax(-1) == batch.labels).float().mean()

    def _step(self, batch: Any, split: Split) -> Tensor:
        middle = batch.frames[:, batch.frames.shape[1] // 2, None]
        if split == "train":
            frames, anchors = batch.frames, self._draw_frames(batch)
            if self.current_epoch < self.trainer.max_epochs - self.whole_epochs:
                frames = self._draw_frames(batch)
            masks = self.current_epoch < self.caption_epochs
            loss = self.words_loss(batch, frames) if masks else self.questions_loss(batch, frames)[0]
            return loss + self.captions_loss(batch, anchors, self.ANCHORS) if self.anchor_weight else loss
        loss, accuracy = self.questions_loss(batch, batch.frames)
        captions = self.captions_loss(batch, middle)
        for name, value in (("captions_loss", captions), ("answers_accuracy", accuracy), ("loss", captions + loss)):
            self.log(f"{split}/{name}", value, batch_size=float(len(batch.labels)), sync_dist=True, prog_bar=True)
        return captions + loss

    def _draw_frames(self, batch: CaptionBatch) -> Tensor:
        """Draw one frame of every clip, (B, 1, H, W, 3)."""
        drawn = torch.randint(batch.frames.shape[1], batch.labels.shape, device=batch.labels.device)
        return batch.frames.take_along_dim(drawn.view(-1, 1, 1, 1, 1), dim=1)

    def configure_optimizers(self) -> dict[str, Any]:
        """Return `Method`'s, after a warm-up: attention that starts at random is easily broken by the first steps."""
        configured = super().configure_optimizers()
        optimizer, decay = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
        steps = min(self.WARM_UP, decay.total_iters)
        warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / steps, total_iters=steps)
        configured["lr_scheduler"]["scheduler"] = torch.optim.lr_scheduler.ChainedScheduler([warm_up, decay])
        return configured

    def parameter_counts(self) -> ParameterCounts:
        """Count the encoder; the heads of the pretraining go nowhere."""
        trained = sum(parameter.numel() for parameter in self.parameters() if parameter.requires_grad)
        return ParameterCounts(count(self.encoder), 0, trained)

    def traffic(self) -> Traffic:
        """Return no bytes: nothing is sent."""
        return Traffic(0, 0)

    def export(self, folder: Path) -> None:
        """Write the encoder, where all methods begin, and what it reads of an anchor, which sessions may average."""
        save_safetensors(self.encoder.state_dict(), folder / "encoder.safetensors")
        torch.manual_seed(self.seed)
        reading = Reading()
        reading.fit(*self._encode_captioned(), self.seed)
        reading.save(folder / "reading.safetensors")

    @torch.no_grad()
    def _encode_captioned(self) -> tuple[Tensor, list[list[int]]]:
        """Return anchor features (N, T, 192) of all frames of the captioned clips, and the words of the captions."""
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
