"""Decoder and losses of RS-vHeat's pretraining.

Published (arXiv 2411.17984): low-cut and high-cut images go through one Siamese trunk; stages 3 and 4 are fused and
decoded to the input; the loss is spatial L1 + frequency L1 + a contrastive cosine between sensors, weights 1. Never
published: the fusion module, the decoder, and which features the contrastive term compares. What stands here is our
reading: linear fusion of the two halves per stage, one hidden layer, pixel shuffle; pooled last-stage features.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers.utils import ModelOutput

from .frequency_masking import frequency_target
from .heat_encoder import PointwiseConv
from .input_channels import repeat_outputs

DECODER_STRIDE = 16  # of stage 3, the finer of the two decoded stages


@dataclass
class RSVHeatForPreTrainingOutput(ModelOutput):
    """
    Args:
        loss: Weighted sum of the means of the terms below, scalar.
        spatial_loss: Mean absolute error per image `(batch,)`; the pair's images follow, `(2 * batch,)`, if given.
        frequency_loss: Mean absolute error of the spectra per image, like `spatial_loss`.
        contrastive_loss: 1 - cosine between the sensors per pair, `(batch,)`; only where a pair is given.
        reconstruction: `(batch, channels, height, width)`, normalised like the input.
        paired_reconstruction: The same for the pair's images.
        low_cut: The images without their low frequencies, as the trunk saw them, `(batch, channels, height, width)`.
        high_cut: The images without their high frequencies.
    """

    loss: torch.Tensor | None = None
    spatial_loss: torch.Tensor | None = None
    frequency_loss: torch.Tensor | None = None
    contrastive_loss: torch.Tensor | None = None
    reconstruction: torch.Tensor | None = None
    paired_reconstruction: torch.Tensor | None = None
    low_cut: torch.Tensor | None = None
    high_cut: torch.Tensor | None = None


def _halves(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The low-cut and the high-cut half of a batch (`chunk` would fix the batch size in an exported program)."""
    return x.unflatten(0, (2, x.shape[0] // 2)).unbind()


class RSVHeatDecoder(nn.Module):
    """Fuses low-cut and high-cut features of stages 3 and 4 and decodes them to an image of the given modality.

    One hidden layer per position, then a 3x3 convolution to the pixels of each position (pixel shuffle): a position's
    pixels also see its neighbours, so that they join without seams.
    """

    def __init__(self, config) -> None:
        super().__init__()
        fine, coarse = config.hidden_sizes[-2:]
        dim = config.decoder_dim or fine
        self.fuse_fine = PointwiseConv(2 * fine, fine)
        self.fuse_coarse = PointwiseConv(2 * coarse, coarse)
        self.embed = PointwiseConv(fine + coarse, dim)
        self.norm = nn.LayerNorm(dim, eps=1e-5)
        self.heads = nn.ModuleDict(
            {
                name: nn.Conv2d(dim, channels * DECODER_STRIDE**2, kernel_size=3, padding=1)
                for name, channels in config.modalities.items()
            }
        )

    def forward(self, fine: torch.Tensor, coarse: torch.Tensor, modality: str, height: int, width: int) -> torch.Tensor:
        """
        Args:
            fine: Stage 3 features, low-cut images first, then high-cut: `(2 * batch, h, w, channels)`.
            coarse: Stage 4 features in the same order.
            modality: Whose head to use.
            height, width: Size of the result in pixels.

        Returns:
            `(batch, channels, height, width)`.
        """
        fine = self.fuse_fine(torch.cat(_halves(fine), dim=-1))
        coarse = self.fuse_coarse(torch.cat(_halves(coarse), dim=-1))
        coarse = F.interpolate(coarse.permute(0, 3, 1, 2), size=fine.shape[1:3], mode="bilinear").permute(0, 2, 3, 1)
        hidden = F.gelu(self.norm(self.embed(torch.cat((fine, coarse), dim=-1))))
        image = F.pixel_shuffle(self.heads[modality](hidden.permute(0, 3, 1, 2)), DECODER_STRIDE)
        return image[..., :height, :width]

    def adapt_channels(self, num_channels: int, modality: str) -> None:
        """Predict another number of channels for one modality; see [`adapt_input_channels`]."""
        head = self.heads[modality]
        channels = head.out_channels // DECODER_STRIDE**2
        self.heads[modality] = repeat_outputs(head, channels, num_channels, dim=0)


def reconstruction_losses(prediction: torch.Tensor, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean absolute error per image in space and in frequency (predicted spectra are clamped, targets are not)."""
    prediction, image = prediction.float(), image.float()
    spatial = (prediction - image).abs().mean(dim=(1, 2, 3))
    spectra = frequency_target(prediction, clamp=True) - frequency_target(image)
    return spatial, spectra.abs().mean(dim=(1, 2, 3))


def contrastive_losses(features: torch.Tensor, paired_features: torch.Tensor) -> torch.Tensor:
    """1 - cosine similarity of the two sensors' pooled features, averaged over low-cut and high-cut, `(batch,)`.

    Args:
        features, paired_features: Last-stage features `(2 * batch, h, w, channels)`, low-cut images first.
    """
    similarity = F.cosine_similarity(features.float().mean(dim=(1, 2)), paired_features.float().mean(dim=(1, 2)))
    return 1 - torch.stack(_halves(similarity)).mean(dim=0)
