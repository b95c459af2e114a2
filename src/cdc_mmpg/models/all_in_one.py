"""The All-in-One-Ti encoder (Wang et al. 2023; showlab/all-in-one at ae0e288): one transformer for video and text.

Cloud and device share it. DeiT-Tiny comes from timm and the text embeddings from transformers, under the parameter
names of the published checkpoint, so that it can be imported key by key.
"""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple, cast, final

import timm
import torch
import torch.nn.functional as F
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from transformers import BertConfig
from transformers.models.bert.modeling_bert import BertEmbeddings

from cdc_mmpg.dimensions import FEATURE_DIM
from cdc_mmpg.errors import CheckpointError, ConfigError
from cdc_mmpg.models.weights import read_state_dict, strip_prefix

logger = logging.getLogger(__name__)

PATCH = 16  # pixels of a side
DEIT = "deit_tiny_patch16_224"

# Prefixes of keys in published checkpoints that the encoder does not use: pretraining and task heads, and counters.
DROPPED_PREFIXES = (
    "mlm_score.", "itm_score.", "rank_output.", "vqa_classifier.", "mc_vqa_classifier.", "txt_proj.", "vid_proj.",
    "transformer.head.", "text_embeddings.position_ids", "text_embeddings.token_type_ids",
)  # fmt: skip


class Encoded:
    """Encoder outputs for a batch of clips with their texts.

    Attributes:
        frame_features: (B, T, 192) the text's [CLS] for every frame after the final norm, x_t.
    """

    def __init__(self, frame_features: Tensor, pool: Callable[[Tensor], Tensor]) -> None:
        self.frame_features = frame_features
        self._pool = pool

    @property
    def fused(self) -> Tensor:
        """Fused feature m̄ (B, 192) = tanh(pooler(mean over t of x_t)), computed on access."""
        return self._pool(self.frame_features.mean(1))


class ImportReport(NamedTuple):
    """How each key of a foreign checkpoint was handled."""

    used: list[str]
    dropped: list[str]  # pretraining heads, which this encoder does not have
    unexpected: list[str]  # neither of the encoder nor of a known head
    missing: list[str]  # left at their random initial values (DeiT has no text part)
    absent: list[str]  # those of the missing keys that the encoder requires


@final
class AllInOne(nn.Module):
    """Early-fusion transformer over [text; frame] of every frame, with token rolling between frames.

    Source: paper section 3.1, eq. 2-4. At T = 3 and the defaults it has 11,431,104 parameters.

    The blocks compute in the precision of the run (autocast); the returned features are float32.

    Deviation: the reference draws a new permutation of the patches for every frame and call before it rolls them, in
    evaluation too; here they stay in raster order, because cloud and device must compute the same feature.

    Args:
        num_frames: maximum number of frames in a clip, T.
        image_size: side in pixels of the square images for which position embeddings are stored; a multiple of 16.
            For frames of other sizes the embeddings are resized bicubically at every call.
        depth: number of transformer blocks.
        vocab_size: number of WordPieces in the vocabulary.
        text_length: maximum number of tokens in a text.
        dropout: rate after positions, on the attention projection and in both linear layers of the MLP.
        drop_path: stochastic depth rate of the last block; the rate rises linearly from 0 at the first block.
        checkpoint: initial weights: an All-in-One or DeiT-Tiny file, an encoder saved by this project (safetensors),
            or "deit_tiny_patch16_224" to fetch DeiT-Tiny through timm. None initialises at random.

    Raises:
        ConfigError: a size is not a multiple of 16, a count is below 1, or a rate is not in [0, 1).
        CheckpointError: the checkpoint lacks a key of the encoder, or a shape differs.
    """

    def __init__(
        self,
        num_frames: int = 3,
        image_size: int = 224,
        depth: int = 12,
        vocab_size: int = 30_522,
        text_length: int = 40,
        dropout: float = 0.1,
        drop_path: float = 0.1,
        checkpoint: str | None = None,
    ) -> None:
        super().__init__()
        if image_size < PATCH or image_size % PATCH:
            raise ConfigError(f"image_size {image_size} is not a multiple of {PATCH}: use e.g. 224")
        if min(num_frames, depth, vocab_size, text_length) < 1:
            raise ConfigError("num_frames, depth, vocab_size and text_length must be at least 1")
        if not (0 <= dropout < 1 and 0 <= drop_path < 1):
            raise ConfigError(f"dropout {dropout} and drop_path {drop_path} must be at least 0 and below 1")
        self.num_frames = num_frames
        self.text_embeddings = BertEmbeddings(
            BertConfig(
                vocab_size=vocab_size,
                hidden_size=FEATURE_DIM,
                max_position_embeddings=text_length,
                hidden_dropout_prob=dropout,
            )
        )
        self.token_type_embeddings = nn.Embedding(2, FEATURE_DIM)  # the modality: 0 text, 1 video
        self.transformer = cast(
            VisionTransformer,
            timm.create_model(
                DEIT,
                img_size=image_size,
                depth=depth,
                num_classes=0,
                pos_drop_rate=dropout,
                proj_drop_rate=dropout,
                drop_path_rate=drop_path,
                dynamic_img_size=True,
            ),
        )
        self.transformer.temporal_embed = nn.Parameter(torch.zeros(1, num_frames, FEATURE_DIM))
        self.pooler = nn.ModuleDict({"dense": nn.Linear(FEATURE_DIM, FEATURE_DIM)})
        self._but_last = self._run_first_blocks  # `compile_blocks` replaces it
        self._initialise()
        if checkpoint is not None:
            self.load_reference(checkpoint)

    def _initialise(self) -> None:
        """Draw initial weights from which a small encoder learns in minutes; timm's deviation of 0.02 takes hours.

        Linear layers double the variance of their inputs; patches, their positions and words start at the same scale,
        so that none dominates.
        """
        for module in (*self.text_embeddings.modules(), self.token_type_embeddings):
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        for module in (*self.transformer.blocks.modules(), self.pooler["dense"]):
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=(2 / module.in_features) ** 0.5)
                nn.init.zeros_(module.bias)
        projection = self.transformer.patch_embed.proj
        nn.init.normal_(projection.weight, std=(3 * PATCH * PATCH) ** -0.5)
        nn.init.zeros_(projection.bias)
        nn.init.normal_(self.transformer.pos_embed, std=0.5)

    def compile_blocks(self) -> None:
        """Compile all blocks but the last as one function (torch.compile), for any number and length of texts.

        Compiled separately, every drop path rate would trigger a recompilation.
        """
        self._but_last = torch.compile(self._run_first_blocks, dynamic=True)

    def pool(self, cls: Tensor) -> Tensor:
        """Return tanh(pooler(x)), (..., 192): the fused feature of a mean [CLS], the anchor feature of a frame's."""
        return torch.tanh(self.pooler["dense"](cls))

    def forward(self, video: Tensor, text_ids: Tensor, text_mask: Tensor | None) -> Encoded:
        """Encode clips fused with their texts: frame features (N, T, 192).

        Args:
            video: (B, T, 3, H, W) normalised frames, 1 <= T <= num_frames.
            text_ids: (N, L) WordPiece ids, padded at the end; N is B, or K B for K consecutive texts per clip, whose
                patches are embedded only once.
            text_mask: (N, L) 1 for tokens, 0 for padding; every text has at least one token. None: no padding.

        Raises:
            ValueError: the shapes do not match.
        """
        frames = video.shape[1]
        tokens, mask, length = self._join(video, text_ids, text_mask)
        cls = self._transform(tokens, mask, frames=frames, text_tokens=length)
        return Encoded(cls.view(len(text_ids), frames, FEATURE_DIM).float(), self.pool)

    def encode_clip(self, video: Tensor, text_ids: Tensor) -> Tensor:
        """Encode one clip (1, T, 3, H, W) with one unpadded text (1, L) like `forward`, for export: (T, 192).

        The control flow does not depend on values, so that the graph can be exported for any T and L.
        """
        frames = video.shape[1]
        text = self.text_embeddings(text_ids) + self.token_type_embeddings.weight[0]
        visual = self._embed_video(video)
        tokens = torch.cat([text.expand(visual.shape[0], -1, -1), visual], dim=1)
        return self._transform(tokens, None, frames=frames, text_tokens=text_ids.shape[1])

    def encode_words(self, video: Tensor, text_ids: Tensor, text_mask: Tensor | None) -> Tensor:
        """Return the text tokens after the final norm, averaged over the frames: (B, L, 192).

        Pretraining predicts masked words from them. The arguments are those of `forward`.
        """
        batch, frames = video.shape[:2]
        tokens, mask, length = self._join(video, text_ids, text_mask)
        tokens = self.transformer.blocks[-1](self._but_last(tokens, mask, frames, length), attn_mask=mask)
        words = self.transformer.norm(tokens[:, :length]).float()
        return words.view(batch, frames, length, FEATURE_DIM).mean(1)

    def encode_text(self, text_ids: Tensor, text_mask: Tensor | None) -> Tensor:
        """Return the [CLS] (B, 192) of texts alone, without video, after the final norm; both arguments are (B, L)."""
        text = self._embed_text(text_ids, text_mask)
        mask = None if text_mask is None else text_mask.bool()[:, None, None]
        return self._transform(text, mask).float()

    def encode_video(self, video: Tensor) -> Tensor:
        """Return the visual [CLS] (B, T, 192) of frames alone, without text or rolling; video is (B, T, 3, H, W)."""
        batch, frames = video.shape[:2]
        return self._transform(self._embed_video(video), None).view(batch, frames, FEATURE_DIM).float()

    def _embed_text(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        """Embed texts as tokens (B, L, 192)."""
        max_length = self.text_embeddings.position_embeddings.num_embeddings
        if ids.dim() != 2 or ids.shape[1] > max_length or (mask is not None and ids.shape != mask.shape):
            shape = None if mask is None else tuple(mask.shape)
            raise ValueError(f"text ids {tuple(ids.shape)} and mask {shape}: expected (B, L) with L <= {max_length}")
        return self.text_embeddings(ids) + self.token_type_embeddings.weight[0]

    def _embed_video(self, video: Tensor) -> Tensor:
        """Embed frames as visual tokens (B*T, V, 192): [CLS], then the patches in raster order."""
        if video.dim() != 5 or video.shape[2] != 3 or video.shape[3] % PATCH or video.shape[4] % PATCH:
            raise ValueError(f"video {tuple(video.shape)} is not (B, T, 3, H, W) with H and W multiples of {PATCH}")
        batch, frames = video.shape[:2]
        if not 1 <= frames <= self.num_frames:
            raise ValueError(f"{frames} frames in a clip: this encoder accepts 1 to {self.num_frames} (num_frames)")
        vit = self.transformer
        patches = vit.patch_embed(video.flatten(0, 1))  # (B*T, h, w, 192)
        position = resample_abs_pos_embed(
            vit.pos_embed, list(patches.shape[1:3]), old_size=list(vit.patch_embed.grid_size)
        )
        patches = patches.flatten(1, 2) + position[:, 1:]
        time = vit.temporal_embed[:, :frames].unsqueeze(2)  # (1, T, 1, 192)
        patches = (patches.view(batch, frames, -1, FEATURE_DIM) + time).flatten(0, 1)
        cls = (vit.cls_token + position[:, :1]).expand(patches.shape[0], -1, -1)
        return vit.pos_drop(torch.cat([cls, patches], dim=1)) + self.token_type_embeddings.weight[1]

    def _transform(self, tokens: Tensor, mask: Tensor | None, frames: int = 1, text_tokens: int = 0) -> Tensor:
        """Return token 0 after all blocks and the final norm: (B*T, N, 192) -> (B*T, 192).

        The last block computes keys and values for all tokens, but everything else for token 0 only, since the other
        output tokens are not used.
        """
        tokens = self._but_last(tokens, mask, frames, text_tokens)
        return self.transformer.norm(run_block_on_first_token(self.transformer.blocks[-1], tokens, mask))

    def _run_first_blocks(self, tokens: Tensor, mask: Tensor | None, frames: int, text_tokens: int) -> Tensor:
        """Run all blocks but the last: tokens (B*T, N, 192); the tokens are rolled before every block."""
        for block in self.transformer.blocks[:-1]:
            tokens = block(roll_tokens(tokens, frames, text_tokens), attn_mask=mask)
        return roll_tokens(tokens, frames, text_tokens)

    def _join(self, video: Tensor, text_ids: Tensor, text_mask: Tensor | None) -> tuple[Tensor, Tensor | None, int]:
        """Join [text; frame] of all texts and frames: tokens (N*T, ., 192), attention mask, number of text tokens."""
        frames = video.shape[1]
        text = self._embed_text(text_ids, text_mask)  # (B, L, 192)
        if len(text_ids) % len(video):
            raise ValueError(f"{len(text_ids)} texts for {len(video)} clips: every clip needs the same number of texts")
        visual = self._embed_video(video)  # (B*T, V, 192)
        if further := len(text_ids) // len(video) - 1:
            visual = visual.unflatten(0, (-1, frames)).repeat_interleave(further + 1, dim=0).flatten(0, 1)
        tokens = torch.cat([text.repeat_interleave(frames, dim=0), visual], dim=1)
        mask = None
        if text_mask is not None:
            keys = F.pad(text_mask.bool(), (0, visual.shape[1]), value=True).repeat_interleave(frames, dim=0)
            mask = keys[:, None, None]  # (B*T, 1, 1, N)
        return tokens, mask, text.shape[1]

    @classmethod
    def from_reference(
        cls, path_or_state_dict: str | Path | Mapping[str, Tensor], num_frames: int = 3, image_size: int = 224
    ) -> "AllInOne":
        """Create an encoder with the weights of a published checkpoint; see `load_reference`."""
        encoder = cls(num_frames=num_frames, image_size=image_size)
        encoder.load_reference(path_or_state_dict)
        return encoder

    def load_reference(self, path_or_state_dict: str | Path | Mapping[str, Tensor]) -> ImportReport:
        """Load the weights of an All-in-One checkpoint, of DeiT-Tiny, or of an encoder saved by this project.

        Temporal embeddings are truncated or zero-padded to `num_frames`, text positions keep their common prefix, and
        image positions are resized bicubically. Code in the file is never run. The report is also logged.

        Raises:
            CheckpointError: the file is not a checkpoint, an encoder key is missing, or a shape differs.
        """
        source = "the state dict" if isinstance(path_or_state_dict, Mapping) else str(path_or_state_dict)
        used, report = self.map_keys(path_or_state_dict)
        self.load_mapped(used, report, source)
        return report

    def load_mapped(self, used: Mapping[str, Tensor], report: ImportReport, source: str) -> None:
        """Load the weights returned by `map_keys`; `source` names the checkpoint in messages.

        Raises:
            CheckpointError: an encoder key is missing, or a shape differs.
        """
        if report.absent:
            raise CheckpointError(
                f"{source} lacks {len(report.absent)} of the encoder's {len(self.state_dict())} weights, the first "
                f"{report.absent[0]!r}: is it an All-in-One-Ti or DeiT-Tiny checkpoint?"
            )
        own = self.state_dict()
        self.load_state_dict(
            {key: self._resize_embedding(key, value, own[key], source) for key, value in used.items()}, strict=False
        )
        logger.info(
            "%s: %d keys used, %d of other heads dropped, unexpected %s, missing %s",
            source, len(report.used), len(report.dropped), report.unexpected or "none", report.missing or "none",
        )  # fmt: skip

    def map_keys(self, path_or_state_dict: str | Path | Mapping[str, Tensor]) -> tuple[dict[str, Tensor], ImportReport]:
        """Return the weights that `load_reference` would load, by this encoder's names, and how each key is handled.

        Raises:
            CheckpointError: the file is not a checkpoint.
        """
        if isinstance(path_or_state_dict, Mapping):
            state = dict(path_or_state_dict)
        elif str(path_or_state_dict) == DEIT:
            state = _fetch_deit()
        else:
            state = read_state_dict(Path(path_or_state_dict))
        own = self.state_dict()
        image_names = [key.removeprefix("transformer.") for key in own]  # DeiT has only the image part
        full, image = strip_prefix(state, own), strip_prefix(state, image_names)
        is_deit = not own.keys() & full.keys() and "cls_token" in image
        state = image if is_deit else full
        if is_deit:
            state = {f"transformer.{key}": value for key, value in state.items()}
        used = {key: value for key, value in state.items() if key in own}
        others = [key for key in state if key not in own]
        missing = [key for key in own if key not in used]
        foreign = [key for key in own if not key.startswith("transformer.") or key == "transformer.temporal_embed"]
        absent = [key for key in missing if not (is_deit and key in foreign)]  # DeiT has no text or time embeddings
        dropped = [key for key in others if key.startswith(DROPPED_PREFIXES)]
        unexpected = [key for key in others if key not in dropped]
        return used, ImportReport(list(used), dropped, unexpected, missing, absent)

    def _resize_embedding(self, key: str, value: Tensor, own: Tensor, source: str) -> Tensor:
        """Resize a foreign `value` to the shape of this encoder's `own`, for embeddings of configurable size."""
        if value.shape == own.shape:
            return value
        if key == "transformer.temporal_embed" and value.shape[::2] == own.shape[::2]:
            return F.pad(value, (0, 0, 0, max(0, own.shape[1] - value.shape[1])))[:, : own.shape[1]]
        if key == "text_embeddings.position_embeddings.weight" and value.shape[1] == own.shape[1]:
            return torch.cat([value[: len(own)], own[len(value) :]])
        if key == "transformer.pos_embed" and value.shape[::2] == own.shape[::2]:
            return resample_abs_pos_embed(value, list(self.transformer.patch_embed.grid_size))
        raise CheckpointError(f"{source}: {key!r} is {tuple(value.shape)}, this encoder has {tuple(own.shape)}")


def _fetch_deit() -> dict[str, Tensor]:
    try:
        return timm.create_model(DEIT, pretrained=True).state_dict()
    except Exception as error:  # the hub client raises exceptions of many types
        raise CheckpointError(
            f"cannot fetch {DEIT} through timm ({type(error).__name__}): download its file elsewhere and give its path"
        ) from error


def roll_tokens(tokens: Tensor, frames: int, text_tokens: int) -> Tensor:
    """Roll tokens (Wang et al. 2023, section 3.2): exchange an eighth of the patches with each neighbouring frame.

    The text and the visual [CLS] stay. The first eighth of the patches comes from the previous frame, the last eighth
    from the next one, cyclically. Input and output are (B*T, N, 192).
    """
    fold = (tokens.shape[1] - text_tokens) // 8
    if frames == 1 or fold == 0:  # fewer than eight patches: nothing to roll
        return tokens
    start = text_tokens + 1
    clips = tokens.view(-1, frames, *tokens.shape[1:])
    return torch.cat(
        [
            clips[:, :, :start],
            clips[:, :, start : start + fold].roll(1, dims=1),
            clips[:, :, start + fold : -fold],
            clips[:, :, -fold:].roll(-1, dims=1),
        ],
        dim=2,
    ).flatten(0, 1)


def run_block_on_first_token(block: Block, tokens: Tensor, mask: Tensor | None) -> Tensor:
    """Return the output of `block` for token 0, attending to all tokens: (B, N, D) -> (B, D)."""
    attention = block.attn
    normed = block.norm1(tokens)
    width, heads = tokens.shape[-1], attention.num_heads
    weight, bias = attention.qkv.weight, attention.qkv.bias
    query = F.linear(normed[:, :1], weight[:width], bias[:width]).unflatten(-1, (heads, -1)).transpose(1, 2)
    keys_values = F.linear(normed, weight[width:], bias[width:]).unflatten(-1, (2, heads, -1))
    key, value = keys_values.permute(2, 0, 3, 1, 4)
    attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2).flatten(2)
    cls = tokens[:, :1] + block.drop_path1(attention.proj_drop(attention.proj(attended)))
    return (cls + block.drop_path2(block.mlp(block.norm2(cls)))).squeeze(1)
