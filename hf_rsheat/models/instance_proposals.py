"""Region proposals: where objects may be, whatever their class (arXiv 1506.01497)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import batched_nms

from .channels_last import respecting_hooks
from .configuration_rs4d_instances import RS4DInstanceConfig
from .instance_bands import by_bands, relu
from .instance_boxes import assign, decode_boxes, encode_boxes, make_anchors, sample, start_normal

UNIT_STDS = (1.0, 1.0, 1.0, 1.0)


@dataclass
class AnchorOutputs:
    """Per level of the pyramid: logits `(batch, n)` and box codes `(batch, n, 4)` of its anchors `(n, 4)`."""

    logits: list[torch.Tensor]
    deltas: list[torch.Tensor]
    anchors: list[torch.Tensor]


class ProposalHead(nn.Module):
    """Scores and refines the anchors of every level of the pyramid, with the same weights on all."""

    def __init__(self, config: RS4DInstanceConfig) -> None:
        super().__init__()
        self.config = config
        channels, anchors = config.feature_size, len(config.anchor_scales) * len(config.anchor_ratios)
        self.conv = start_normal(nn.Conv2d(channels, channels, 3, padding=1), 0.01)
        self.classifier = start_normal(nn.Conv2d(channels, anchors, 1), 0.01)
        self.regressor = start_normal(nn.Conv2d(channels, 4 * anchors, 1), 0.01)

    def forward(self, pyramid: list[torch.Tensor]) -> AnchorOutputs:
        """The five maps `(batch, feature_size, height, width)`, finest first, to what is said of their anchors."""
        outputs = AnchorOutputs([], [], [])
        scales, ratios = self.config.anchor_scales, self.config.anchor_ratios
        for features, stride in zip(pyramid, self.config.strides, strict=True):
            with respecting_hooks(self):
                x = by_bands(self._answers, features, halo=1)
            logits, deltas = x.split((len(scales) * len(ratios), 4 * len(scales) * len(ratios)), dim=1)
            # At least float32: NMS has no half precision, and coordinates would be rounded in it.
            dtype = torch.promote_types(x.dtype, torch.float32)
            outputs.logits.append(logits.permute(0, 2, 3, 1).flatten(1).to(dtype))
            outputs.deltas.append(deltas.permute(0, 2, 3, 1).reshape(len(x), -1, 4).to(dtype))
            anchors = make_anchors((x.shape[-2], x.shape[-1]), stride, scales, ratios, x.device)
            outputs.anchors.append(anchors.to(dtype))
        return outputs

    def _answers(self, features: torch.Tensor) -> torch.Tensor:
        """Logits and box codes of all anchors of each cell, as channels."""
        x = relu(self.conv(features))
        return torch.cat((self.classifier(x), self.regressor(x)), dim=1)

    @torch.no_grad()
    def proposals(
        self, outputs: AnchorOutputs, sizes: list[tuple[int, int]], train: bool = False
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The best boxes of each image, with the scores in descending order: `(n, 4)` and `(n,)`.

        Args:
            outputs: What `forward` returned.
            sizes: Height and width of each image inside its padding, to which boxes are clipped.
            train: Whether to take the larger numbers of boxes meant for the loss.
        """
        config = self.config
        before = config.rpn_nms_pre_train if train else config.rpn_nms_pre
        after = config.rpn_max_per_img_train if train else config.rpn_max_per_img
        results = []
        for i, size in enumerate(sizes):
            scores, boxes, levels = [], [], []
            per_level = zip(outputs.logits, outputs.deltas, outputs.anchors, strict=True)
            for level, (logits, deltas, anchors) in enumerate(per_level):
                best = logits[i].sigmoid().topk(min(before, logits.shape[1]))
                scores.append(best.values)
                boxes.append(decode_boxes(anchors[best.indices], deltas[i, best.indices], UNIT_STDS, size))
                levels.append(torch.full_like(best.indices, level))
            results.append(self._suppress(torch.cat(boxes), torch.cat(scores), torch.cat(levels), after))
        return results

    def _suppress(
        self, boxes: torch.Tensor, scores: torch.Tensor, levels: torch.Tensor, number: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        real = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
        boxes, scores, levels = boxes[real], scores[real], levels[real]
        keep = batched_nms(boxes, scores, levels, self.config.rpn_nms_threshold)[:number]
        return boxes[keep], scores[keep]

    def loss(
        self, outputs: AnchorOutputs, targets: list[torch.Tensor], generator: torch.Generator | None = None
    ) -> dict[str, torch.Tensor]:
        """`loss_rpn_cls` and `loss_rpn_bbox`: sums over the sampled anchors, over the number of these in the batch.

        Args:
            outputs: What `forward` returned.
            targets: Boxes of each image's objects, `(n, 4)`.
            generator: Where the sampling draws from.
        """
        config = self.config
        all_logits, all_deltas = torch.cat(outputs.logits, dim=1), torch.cat(outputs.deltas, dim=1)
        all_anchors = torch.cat(outputs.anchors)
        sums, number = torch.zeros(2, dtype=all_logits.dtype, device=all_logits.device), 0
        for image_logits, image_deltas, boxes in zip(all_logits, all_deltas, targets, strict=True):
            match = assign(all_anchors, boxes, config.rpn_pos_iou, config.rpn_neg_iou, config.rpn_min_pos_iou)
            objects, background = sample(match, config.rpn_num_samples, config.rpn_pos_fraction, generator)
            sampled = torch.cat((objects, background))
            wanted = (torch.arange(len(sampled), device=sampled.device) < len(objects)).to(image_logits.dtype)
            codes = encode_boxes(all_anchors[objects], boxes[match[objects]], UNIT_STDS)
            sums = sums + torch.stack(
                (
                    F.binary_cross_entropy_with_logits(image_logits[sampled], wanted, reduction="sum"),
                    F.smooth_l1_loss(image_deltas[objects], codes, reduction="sum"),
                )
            )
            number += len(sampled)
        means = sums / max(number, 1)
        return {"loss_rpn_cls": means[0], "loss_rpn_bbox": means[1]}
