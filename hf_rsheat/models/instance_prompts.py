"""RSPrompter's mask head (arXiv 2306.16269): point prompts from an object's features, for a SAM mask decoder."""

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import SamMaskDecoderConfig
from transformers.models.sam.modeling_sam import SamMaskDecoder

from .channels_last import added
from .configuration_rs4d_instances import RS4DInstanceConfig
from .instance_boxes import pool_boxes, start_normal
from .instance_heads import MASK_ROI_SIZE, Samples, Targets
from .instance_mask_decoder import decode_masks
from .instance_neck import conv_norm_relu

TEMPERATURE = 10_000
# Points of a box, in shares of its width and height from the upper left: the centre and the corners.
BOX_POINTS = ((0.5, 0.5), (0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0))


def position_axes(like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sine-cosine positions as in DETR (arXiv 2005.12872), rows in the first half of the channels, columns in the rest.

    Args:
        like: `(batch, channels, height, width)`, with an even number of channels.

    Returns:
        `(1, channels, height, 1)` for rows and `(1, channels, 1, width)` for columns, each 0 in the other's half, of
        the same dtype and device.
    """
    half = like.shape[1] // 2
    index = torch.arange(half, device=like.device)
    frequency = TEMPERATURE ** (2 * (index // 2) / half)

    def axis(size: int) -> torch.Tensor:
        position = torch.arange(1, size + 1, device=like.device) / (size + 1e-6) * 2 * math.pi
        angle = position[:, None] / frequency
        return torch.where(index % 2 == 0, angle.sin(), angle.cos()).to(like.dtype)

    rows, columns = (axis(size) for size in like.shape[-2:])
    return F.pad(rows, (0, half)).t()[None, :, :, None], F.pad(columns, (half, 0)).t()[None, :, None, :]


def position_map(like: torch.Tensor) -> torch.Tensor:
    """The sum of both [`position_axes`], `(1, channels, height, width)`."""
    rows, columns = position_axes(like)
    return rows + columns


def add_positions(pyramid: list[torch.Tensor]) -> list[torch.Tensor]:
    """Add one position map, made for the finest level and resized bilinearly, to every level."""
    rows, columns = position_axes(pyramid[0])
    result = []
    for level in pyramid:
        height, width = level.shape[-2:]
        # One axis after the other: the whole map would be as large as the level.
        located = level + F.interpolate(rows, size=(height, 1), mode="bilinear")
        result.append(added(located, F.interpolate(columns, size=(1, width), mode="bilinear")))
    return result


def cover_input(masks: torch.Tensor, stride: int, size: tuple[int, int]) -> torch.Tensor:
    """Masks over the cells of an image's embedding, resized bilinearly to pixels; what lies outside is cut off.

    Args:
        masks: `(n, 4 * rows, 4 * columns)`.
        stride: Side of a cell, pixels; the last row and column may reach over the image.
        size: Height and width of the image.
    """
    rows, columns = (side // 4 * stride for side in masks.shape[-2:])
    whole = F.interpolate(masks[None], size=(rows, columns), mode="bilinear")[0]
    return whole[:, : size[0], : size[1]]


def dice_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """1 - (2 p . t + 1) / (|p| + |t| + 1) of each mask, with the usual addend against 0 / 0 (arXiv 1606.04797).

    Args:
        logits: `(n, height, width)`; p are their probabilities.
        targets: Of the same shape, 0 or 1.

    Returns:
        `(n,)`, within 0 and 1.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)  # areas are too large for half precision
    probabilities, targets = logits.to(dtype).sigmoid().flatten(1), targets.to(dtype).flatten(1)
    common, sizes = (probabilities * targets).sum(1), probabilities.sum(1) + targets.sum(1)
    return 1 - (2 * common + 1) / (sizes + 1)


class FourierPositions(nn.Module):
    """SAM's positional encoding: sines and cosines of random projections, which are not trained.

    In transformers' own module (`SamPositionalEmbedding`, since version 5) they would be.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("positional_embedding", torch.empty(2, channels // 2))

    def forward(self, like: torch.Tensor) -> torch.Tensor:
        """Encoding of the cell centres of a map `(batch, any, height, width)`, `(1, channels, height, width)`."""
        y, x = ((torch.arange(n, device=like.device) + 0.5) / n for n in like.shape[-2:])
        centers = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)
        return self.encode(centers).permute(2, 0, 1)[None].to(like.dtype)

    def encode(self, points: torch.Tensor) -> torch.Tensor:
        """Encoding `(..., channels)` of points x, y `(..., 2)` in shares of the image's width and height."""
        angles = 2 * math.pi * ((2 * points - 1).to(self.positional_embedding.dtype) @ self.positional_embedding)
        return torch.cat((angles.sin(), angles.cos()), dim=-1)


def _start_by_place(transformer: nn.Module) -> None:
    """Have attention between points and image start with keys made as queries are: the same place finds itself."""
    attentions = [transformer.final_attn_token_to_image]
    for layer in transformer.layers:
        attentions += (layer.cross_attn_token_to_image, layer.cross_attn_image_to_token)
    for attention in attentions:
        start_normal(attention.q_proj, math.sqrt(2 / attention.hidden_size))
        attention.k_proj.starts_like = (attention.q_proj,)  # a tuple, so that it does not become its submodule


class PromptMaskHead(nn.Module):
    """Prompts a SAM mask decoder with points learned from 14 x 14 features; one mask per object, of the whole image."""

    def __init__(self, image_channels: int, config: RS4DInstanceConfig) -> None:
        super().__init__()
        self.config = config
        decoder = config.mask_decoder_config or SamMaskDecoderConfig()
        decoder._attn_implementation = "eager"  # for a dozen tokens; attention to the image is in decode_masks
        size = decoder.hidden_size
        parts = 2 if config.with_sincos else 1
        self.point_emb = nn.Sequential(
            *conv_norm_relu(config.feature_size, size, 3, stride=2),
            nn.Flatten(),
            nn.Linear(size * (MASK_ROI_SIZE // 2) ** 2, size),
            nn.ReLU(),
            nn.Linear(size, size),
            nn.ReLU(),
            nn.Linear(size, size * config.n_points * parts),
        )
        self.no_mask_embed = nn.Embedding(1, size)
        self.mask_decoder = SamMaskDecoder(decoder)
        self.shared_image_embedding = FourierPositions(size)
        if config.with_box_pe:
            _start_by_place(self.mask_decoder.transformer)
        # SAM's encoder and RS4D's sizes give what the decoder takes; other backbones need a projection.
        self.projection = nn.Conv2d(image_channels, size, 1) if image_channels != size else nn.Identity()

    def prompts(self, pyramid: list[torch.Tensor], boxes: list[torch.Tensor]) -> torch.Tensor:
        """Boxes per image to point embeddings `(all boxes, n_points, hidden)`."""
        x = pool_boxes(pyramid, self.config.strides, boxes, MASK_ROI_SIZE)
        points = self.point_emb(x).unflatten(1, (self.config.n_points, -1))
        if self.config.with_sincos:
            points = points[..., ::2].sin() + points[..., 1::2]
        return points + self._places(pyramid[2], torch.cat(boxes)) if self.config.with_box_pe else points

    def _places(self, image: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
        """Encoding of the centre of boxes `(n, 4)`, their corners, and again: `(n, n_points, hidden)`.

        Args:
            image: A map of the same size as the image's embedding.
            boxes: In pixels.
        """
        shares = boxes.new_tensor([BOX_POINTS[i % len(BOX_POINTS)] for i in range(self.config.n_points)])
        low, high = boxes[:, None, :2], boxes[:, None, 2:]
        covered = self.config.strides[2] * boxes.new_tensor([image.shape[-1], image.shape[-2]])
        return self.shared_image_embedding.encode((low + shares * (high - low)) / covered).to(image.dtype)

    def forward(
        self,
        pyramid: list[torch.Tensor],
        image: torch.Tensor,
        boxes: list[torch.Tensor],
        labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Boxes per image to mask logits `(all boxes, 4 * height, 4 * width)`; they do not depend on the labels.

        Args:
            pyramid: Maps of the neck, finest first, with positions added.
            image: The images' embedding, `(batch, channels, height, width)`.
            boxes: Per image `(n, 4)`.
            labels: Not used.
        """
        image = self.projection(image)
        positions = self.shared_image_embedding(image)[0]
        image = image + self.no_mask_embed.weight[0, :, None, None]
        if sum(map(len, boxes)) == 0:  # batch norm refuses an empty batch
            return image.new_empty(0, 4 * image.shape[-2], 4 * image.shape[-1])
        points = self.prompts(pyramid, boxes).split([len(b) for b in boxes])
        masks = [
            decode_masks(self.mask_decoder, embedding, positions, some)
            for embedding, some in zip(image, points, strict=True)
        ]
        return torch.cat(masks)

    def loss(
        self, pyramid: list[torch.Tensor], image: torch.Tensor, samples: list[Samples], targets: list[Targets]
    ) -> torch.Tensor:
        """Mean cross-entropy over the input's pixels plus the weighted mean of the Dice losses; 0 without objects."""
        logits = self(pyramid, image, [s.objects for s in samples])
        total, dice, pixels = logits.sum() * 0, logits.sum() * 0, 0
        for own, sampled, target in zip(logits.split([len(s.target) for s in samples]), samples, targets, strict=True):
            if len(own) == 0:
                continue
            whole = cover_input(own, self.config.strides[2], target.masks.shape[-2:])
            wanted = target.masks[sampled.target].to(whole.dtype)
            total = total + F.binary_cross_entropy_with_logits(whole, wanted, reduction="sum")
            pixels += whole.numel()
            if self.config.mask_dice_weight:
                dice = dice + dice_loss(whole, wanted).sum()
        return total / max(pixels, 1) + self.config.mask_dice_weight * dice / max(len(logits), 1)
