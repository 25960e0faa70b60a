"""What a proposal shows: its class and refined box (arXiv 1506.01497), and its mask in the box (arXiv 1703.06870)."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import batched_nms, roi_align

from .channels_last import apply_linear, per_image_in_cache, respecting_hooks
from .configuration_rs4d_instances import RS4DInstanceConfig
from .instance_bands import relu
from .instance_boxes import TARGETS_AT_ONCE, assign, decode_boxes, encode_boxes, pool_boxes, sample, start_normal

BOX_STDS = (0.1, 0.1, 0.2, 0.2)
BOX_ROI_SIZE, MASK_ROI_SIZE = 7, 14


@dataclass
class Targets:
    """One image's objects: boxes `(n, 4)` in pixels, classes `(n,)`, masks `(n, height, width)` of the whole input."""

    boxes: torch.Tensor
    labels: torch.Tensor
    masks: torch.Tensor


@dataclass
class Samples:
    """One image's proposals in the loss: `boxes` with the objects first, and for these the `target` they stand for."""

    boxes: torch.Tensor
    target: torch.Tensor

    @property
    def objects(self) -> torch.Tensor:
        """Boxes of the proposals that stand for an object."""
        return self.boxes[: len(self.target)]


@torch.no_grad()
def sample_proposals(
    proposals: torch.Tensor,
    targets: Targets,
    config: RS4DInstanceConfig,
    generator: torch.Generator | None = None,
) -> Samples:
    """Draw the proposals of one image that enter the loss; the objects' own boxes stand in for them, too.

    Args:
        proposals: `(n, 4)`.
        targets: The image's objects.
        config: Thresholds and numbers (`rcnn_...`).
        generator: See `instance_boxes.sample`.
    """
    boxes = targets.boxes.to(proposals.dtype)
    match = assign(proposals, boxes, config.rcnn_pos_iou, config.rcnn_neg_iou, config.rcnn_min_pos_iou)
    match = torch.cat((torch.arange(len(boxes), device=match.device), match))
    objects, background = sample(match, config.rcnn_num_samples, config.rcnn_pos_fraction, generator)
    candidates = torch.cat((boxes, proposals))
    return Samples(candidates[torch.cat((objects, background))], match[objects])


@dataclass
class Detections:
    """One image's results in descending order of score: boxes `(n, 4)`, scores `(n,)`, classes `(n,)`."""

    boxes: torch.Tensor
    scores: torch.Tensor
    labels: torch.Tensor


class BoxHead(nn.Module):
    """Two linear layers over 7 x 7 features; one box per class, and background as the last class."""

    def __init__(self, config: RS4DInstanceConfig) -> None:
        super().__init__()
        self.config = config
        size = config.fc_size
        self.fc1 = nn.Linear(config.feature_size * BOX_ROI_SIZE**2, size)
        self.fc2 = nn.Linear(size, size)
        self.classifier = start_normal(nn.Linear(size, config.num_labels + 1), 0.01)
        self.regressor = start_normal(nn.Linear(size, 4 * config.num_labels), 0.001)

    def forward(self, pyramid: list[torch.Tensor], boxes: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Boxes per image to logits `(all boxes, classes + 1)` and deltas `(all boxes, classes, 4)`."""
        x = pool_boxes(pyramid, self.config.strides, boxes, BOX_ROI_SIZE).flatten(1)
        x = F.relu(self.fc2(F.relu(apply_linear(self.fc1, x))))
        logits, deltas = self.classifier(x), self.regressor(x)
        dtype = torch.promote_types(x.dtype, torch.float32)
        return logits.to(dtype), deltas.unflatten(1, (-1, 4)).to(dtype)

    def loss(self, pyramid: list[torch.Tensor], samples: list[Samples], targets: list[Targets]) -> dict:
        """`loss_cls`, the mean over all samples, and `loss_bbox`, a sum over the objects divided by their number."""
        logits, deltas = self(pyramid, [s.boxes for s in samples])
        wanted, chosen, codes = [], [], []
        start = 0
        for sampled, target in zip(samples, targets, strict=True):
            objects = len(sampled.target)
            labels = target.labels[sampled.target]
            wanted.append(F.pad(labels, (0, len(sampled.boxes) - objects), value=self.config.num_labels))
            chosen.append(deltas[start : start + objects][torch.arange(objects, device=labels.device), labels])
            codes.append(encode_boxes(sampled.objects, target.boxes[sampled.target], BOX_STDS))
            start += len(sampled.boxes)
        number = max(len(logits), 1)
        return {
            "loss_cls": F.cross_entropy(logits, torch.cat(wanted), reduction="sum") / number,
            "loss_bbox": F.smooth_l1_loss(torch.cat(chosen), torch.cat(codes), reduction="sum") / number,
        }

    def detect(
        self, pyramid: list[torch.Tensor], proposals: list[torch.Tensor], sizes: list[tuple[int, int]]
    ) -> list[Detections]:
        """Classify and refine proposals, and keep the best of those that show the same.

        Args:
            pyramid: The neck's maps.
            proposals: Per image `(n, 4)`.
            sizes: Height and width of each image inside its padding, to which boxes are clipped.
        """
        logits, deltas = self(pyramid, proposals)
        numbers = [len(boxes) for boxes in proposals]
        probabilities = logits.softmax(dim=1)[:, :-1]
        return [
            self._select(*parts)
            for parts in zip(proposals, probabilities.split(numbers), deltas.split(numbers), sizes, strict=True)
        ]

    def _select(
        self, proposals: torch.Tensor, probabilities: torch.Tensor, deltas: torch.Tensor, size: tuple[int, int]
    ) -> Detections:
        rows, labels = (probabilities > self.config.score_threshold).nonzero(as_tuple=True)
        scores = probabilities[rows, labels]
        boxes = decode_boxes(proposals[rows], deltas[rows, labels], BOX_STDS, size)
        real = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)  # clipping can leave nothing of a box
        boxes, scores, labels = boxes[real], scores[real], labels[real]
        keep = batched_nms(boxes, scores, labels, self.config.nms_threshold)[: self.config.max_per_img]
        return Detections(boxes[keep], scores[keep], labels[keep])


class BoxMaskHead(nn.Module):
    """Convolutions over 14 x 14 features, to one mask of 28 x 28 per class."""

    def __init__(self, config: RS4DInstanceConfig) -> None:
        super().__init__()
        self.config = config
        channels = config.feature_size
        std = math.sqrt(2 / channels)  # keeps the scale through a ReLU, per weight of a kernel
        self.convs = nn.ModuleList(
            start_normal(nn.Conv2d(channels, channels, 3, padding=1), std / 3) for _ in range(config.mask_num_convs)
        )
        self.upsample = start_normal(nn.ConvTranspose2d(channels, channels, kernel_size=2, stride=2), std)
        self.classifier = start_normal(nn.Conv2d(channels, config.num_labels, 1), std)

    def forward(
        self, pyramid: list[torch.Tensor], image: torch.Tensor, boxes: list[torch.Tensor], labels: torch.Tensor
    ) -> torch.Tensor:
        """Mask logits `(all boxes, 28, 28)` of the boxes' classes `(all boxes,)`; the image's embedding is not used."""
        x = pool_boxes(pyramid, self.config.strides, boxes, MASK_ROI_SIZE)
        with respecting_hooks(self):
            logits = per_image_in_cache(self._masks_of_classes, x)
        return logits[torch.arange(len(labels), device=labels.device), labels]

    def _masks_of_classes(self, x: torch.Tensor) -> torch.Tensor:
        """`(n, channels, 14, 14)` to logits `(n, classes, 28, 28)`."""
        for conv in self.convs:
            x = relu(conv(x))
        return self.classifier(relu(self.upsample(x)))

    def loss(
        self, pyramid: list[torch.Tensor], image: torch.Tensor, samples: list[Samples], targets: list[Targets]
    ) -> torch.Tensor:
        """Mean cross-entropy of the objects' pixels, scalar; 0 without objects."""
        labels = torch.cat([t.labels[s.target] for s, t in zip(samples, targets, strict=True)])
        logits = self(pyramid, image, [s.objects for s in samples], labels)
        wanted = [_cut_masks(s, t, logits.shape[-1]) for s, t in zip(samples, targets, strict=True)]
        loss = F.binary_cross_entropy_with_logits(logits, torch.cat(wanted).to(logits.dtype), reduction="sum")
        return loss / max(logits.numel(), 1)


def _cut_masks(samples: Samples, targets: Targets, size: int) -> torch.Tensor:
    """The target masks inside the sampled objects' boxes, `(n, size, size)`, 0 or 1."""
    boxes = samples.objects
    result = torch.zeros(len(boxes), size, size, dtype=torch.bool, device=boxes.device)
    for start in range(0, len(targets.masks), TARGETS_AT_ONCE):  # as numbers, all masks would need gigabytes
        masks = targets.masks[start : start + TARGETS_AT_ONCE, None].to(boxes.dtype)
        chosen = ((samples.target >= start) & (samples.target < start + len(masks))).nonzero()[:, 0]
        rois = torch.cat((samples.target[chosen, None] - start, boxes[chosen]), dim=1)
        result[chosen] = roi_align(masks, rois, size, aligned=True)[:, 0] >= 0.5
    return result
