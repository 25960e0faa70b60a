"""RS4D's instance segmentation (arXiv 2606.25324): backbone, neck, proposals, boxes, and one of two mask heads."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torchvision.ops import box_convert
from transformers import PreTrainedModel, SamModel
from transformers import initialization as init
from transformers.utils import ModelOutput, can_return_tuple

from .configuration_rs4d_instances import RS4DInstanceConfig
from .instance_heads import BoxHead, BoxMaskHead, Detections, Targets, sample_proposals
from .instance_neck import instance_neck
from .instance_prompts import FourierPositions, PromptMaskHead, add_positions, cover_input
from .instance_proposals import AnchorOutputs, ProposalHead
from .modeling_rs4d import RS4DBackbone
from .modeling_rs_vheat import RSVHeatBackbone
from .modeling_vheat import VHeatBackbone

PARTS_OF_SAM = ("mask_decoder.", "no_mask_embed.", "shared_image_embedding.")
BACKBONES = {backbone.config_class.model_type: backbone for backbone in (RS4DBackbone, RSVHeatBackbone, VHeatBackbone)}


@dataclass
class RS4DInstanceSegmentationOutput(ModelOutput):
    """Output of [`RS4DForInstanceSegmentation`]; `D` is the largest number of detections of an image of the batch.

    Args:
        loss: Sum of the terms of `loss_dict`, when labels are given.
        loss_dict: `loss_rpn_cls`, `loss_rpn_bbox`, `loss_cls`, `loss_bbox` and `loss_mask`, scalars.
        pred_boxes: `(batch, D, 4)`, corners (x1, y1, x2, y2) in pixels of the network input; 0 where padded.
        scores: `(batch, D)`, class probabilities in descending order; 0 where padded.
        class_labels: `(batch, D)`, int64; -1 where padded.
        pred_masks: `(batch, D, height, width)`, mask probabilities; 0 where padded. They cover the detection's box
            (28 x 28) where `config.mask_layout` is "box", and the whole network input where it is "image": at a quarter
            of its size, or in full if its sides are no multiples of the backbone's patches.
    """

    loss: torch.Tensor | None = None
    loss_dict: dict[str, torch.Tensor] | None = None
    pred_boxes: torch.Tensor | None = None
    scores: torch.Tensor | None = None
    class_labels: torch.Tensor | None = None
    pred_masks: torch.Tensor | None = None


class RS4DInstancePreTrainedModel(PreTrainedModel):
    config_class = RS4DInstanceConfig
    config: RS4DInstanceConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ("RS4DLayer", "HeatLayer", "PromptMaskHead")
    # The loss counts its own samples: the Trainer's number of items is not for it.
    accepts_loss_kwargs = False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """PyTorch's own initial weights, but for layers that carry a standard deviation or a layer to start like."""
        if hasattr(module, "starts_like"):
            init.copy_(module.weight, module.starts_like[0].weight)
            init.zeros_(module.bias)
        elif hasattr(module, "initial_std"):
            init.normal_(module.weight, std=module.initial_std)
            init.zeros_(module.bias)
        elif isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            if module.bias is not None:
                bound = module.weight[0].numel() ** -0.5
                init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, nn.LayerNorm | nn.BatchNorm2d):
            init.ones_(module.weight)
            init.zeros_(module.bias)
            if isinstance(module, nn.BatchNorm2d):
                init.zeros_(module.running_mean)
                init.ones_(module.running_var)
                init.zeros_(module.num_batches_tracked)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight)
        elif isinstance(module, FourierPositions):
            init.normal_(module.positional_embedding)

    def get_input_embeddings(self) -> nn.Module:
        """The backbone's first convolution. Quantisation and PEFT ask for it."""
        return self.backbone.get_input_embeddings()


class RS4DForInstanceSegmentation(RS4DInstancePreTrainedModel):
    """Finds objects: a box, a class, a score and a mask each. Over RS4D as published, or over vHeat or RS-vHeat.

    An RS-vHeat backbone uses its default modality ("optical", or the only one).
    """

    def __init__(self, config: RS4DInstanceConfig) -> None:
        super().__init__(config)
        backbone = config.backbone_config
        backbone.out_indices = config.out_indices
        self.backbone = BACKBONES[backbone.model_type](backbone)
        self.neck = instance_neck(self.backbone.channels, config)
        self.proposal_head = ProposalHead(config)
        self.box_head = BoxHead(config)
        self.mask_head: BoxMaskHead | PromptMaskHead
        if config.head == "bbox":
            self.mask_head = BoxMaskHead(config)
        else:
            self.mask_head = PromptMaskHead(self.neck.image_channels, config)
        self.post_init()

    def load_sam_mask_decoder(self, sam: SamModel | str | Path) -> None:
        """Start the "prompt" head from a SAM: its mask decoder, its embedding of "no mask", its positional encoding.

        Args:
            sam: A [`SamModel`], or the folder or repository id of one, e.g. "facebook/sam-vit-base".

        Raises:
            ValueError: This model has another head, or the decoders differ in size (all tensors are listed).
        """
        if self.config.head != "prompt":
            raise ValueError(f"Only head='prompt' has a SAM mask decoder; this model has head={self.config.head!r}.")
        if not isinstance(sam, SamModel):
            sam = SamModel.from_pretrained(sam)
        head, state = self.mask_head, dict[str, torch.Tensor]()
        for name in ("mask_decoder", "no_mask_embed", "shared_image_embedding"):
            part = getattr(sam.prompt_encoder if name == "no_mask_embed" else sam, name)
            state |= {f"{name}.{key}": value for key, value in part.state_dict().items()}
        own = {name: value for name, value in head.state_dict().items() if name.startswith(PARTS_OF_SAM)}
        wrong = [n for n in {**own, **state} if n not in own or n not in state or own[n].shape != state[n].shape]
        if wrong:
            raise ValueError(
                f"SAM's mask decoder does not fit `mask_decoder_config`; these tensors differ: {', '.join(wrong)}."
            )
        head.load_state_dict(state, strict=False)

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        pixel_mask: torch.Tensor | None = None,
        labels: list[dict[str, torch.Tensor]] | None = None,
        generator: torch.Generator | None = None,
        **kwargs,
    ) -> RS4DInstanceSegmentationOutput:
        r"""
        Args:
            pixel_values: `(batch, num_channels, height, width)`, normalised by the image processor, padded at the
                bottom and right.
            pixel_mask: `(batch, height, width)`, 1 where the image is and 0 where it is padded. Boxes are clipped to
                the image; without it to the whole input.
            labels: Per image a dict with `class_labels` `(objects,)`, `boxes` `(objects, 4)` - centre x, centre y,
                width and height, divided by the width and height of `pixel_values` - and `masks`
                `(objects, height, width)` of the size of `pixel_values`. `(0, ...)` for an image without objects.
            generator: Where the loss draws its samples from; torch's global generator if `None`.

        Returns:
            `loss` and `loss_dict` if there are labels; the detections, unless there are labels in training mode.
        """
        pyramid, roi_pyramid, image = self._features(pixel_values)
        anchors = self.proposal_head(pyramid)
        sizes = _image_sizes(pixel_values, pixel_mask)
        output = RS4DInstanceSegmentationOutput()
        if labels is not None:
            targets = _targets(labels, pixel_values, self.config.num_labels)
            output.loss_dict = self._losses(anchors, roi_pyramid, image, sizes, targets, generator)
            output.loss = sum(output.loss_dict.values())
        if labels is None or not self.training:
            proposals = [boxes for boxes, _ in self.proposal_head.proposals(anchors, sizes)]
            detections = self.box_head.detect(roi_pyramid, proposals, sizes)
            masks = self._masks(roi_pyramid, image, detections, pixel_values.shape[-2:])
            output.pred_boxes = _pad([d.boxes for d in detections])
            output.scores = _pad([d.scores for d in detections])
            output.class_labels = _pad([d.labels for d in detections], value=-1)
            output.pred_masks = _pad(masks)
        return output

    def _features(self, pixel_values: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
        """The pyramid for proposals, that for what is in them, and the image's embedding."""
        pyramid, image = self.neck(self.backbone(pixel_values, return_dict=True).feature_maps)
        return pyramid, add_positions(pyramid) if self.config.with_extra_pe else pyramid, image

    def _losses(
        self,
        anchors: AnchorOutputs,
        pyramid: list[torch.Tensor],
        image: torch.Tensor,
        sizes: list[tuple[int, int]],
        targets: list[Targets],
        generator: torch.Generator | None,
    ) -> dict[str, torch.Tensor]:
        losses = self.proposal_head.loss(anchors, [t.boxes for t in targets], generator)
        proposals = self.proposal_head.proposals(anchors, sizes, train=True)
        samples = [
            sample_proposals(boxes, target, self.config, generator)
            for (boxes, _), target in zip(proposals, targets, strict=True)
        ]
        losses |= self.box_head.loss(pyramid, samples, targets)
        losses["loss_mask"] = self.mask_head.loss(pyramid, image, samples, targets)
        return losses

    def _masks(
        self, pyramid: list[torch.Tensor], image: torch.Tensor, detections: list[Detections], size: tuple[int, int]
    ) -> list[torch.Tensor]:
        """Mask probabilities of each image's detections."""
        labels = torch.cat([d.labels for d in detections])
        masks = self.mask_head(pyramid, image, [d.boxes for d in detections], labels).sigmoid()
        stride = self.config.strides[2]
        if self.config.mask_layout == "image" and any(side % stride for side in size):
            masks = cover_input(masks, stride, size)
        return list(masks.split([len(d.labels) for d in detections]))

    def dense_outputs(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        """What every part computes before anything is selected, so that two machines' results can be compared.

        Args:
            pixel_values: `(batch, num_channels, height, width)`.

        Returns:
            `proposal_logits` `(batch, anchors)` and `proposal_deltas` `(batch, anchors, 4)`; for the whole input as one
            box `class_logits` `(batch, classes + 1)`, `box_deltas` `(batch, classes, 4)`, and `mask_logits` of the last
            class `(batch, height, width)`.
        """
        pyramid, roi_pyramid, image = self._features(pixel_values)
        anchors = self.proposal_head(pyramid)
        height, width = pixel_values.shape[-2:]
        boxes = [anchors.anchors[0].new_tensor([[0, 0, width, height]])] * len(pixel_values)
        class_logits, box_deltas = self.box_head(roi_pyramid, boxes)
        labels = torch.full((len(boxes),), self.config.num_labels - 1, device=pixel_values.device)
        return {
            "proposal_logits": torch.cat(anchors.logits, dim=1),
            "proposal_deltas": torch.cat(anchors.deltas, dim=1),
            "class_logits": class_logits,
            "box_deltas": box_deltas,
            "mask_logits": self.mask_head(roi_pyramid, image, boxes, labels),
        }


def _image_sizes(pixel_values: torch.Tensor, pixel_mask: torch.Tensor | None) -> list[tuple[int, int]]:
    """Height and width of each image inside its padding, pixels."""
    if pixel_mask is None:
        return [(pixel_values.shape[-2], pixel_values.shape[-1])] * len(pixel_values)
    mask = pixel_mask.bool()
    return list(zip(mask.any(2).sum(1).tolist(), mask.any(1).sum(1).tolist(), strict=True))


def _targets(labels: list[dict[str, torch.Tensor]], pixel_values: torch.Tensor, num_labels: int) -> list[Targets]:
    """Labels in pixels and on the images' device, checked."""
    if len(labels) != len(pixel_values):
        raise ValueError(f"`labels` needs one dict per image: got {len(labels)} for {len(pixel_values)} images.")
    return [_image_targets(label, pixel_values, num_labels) for label in labels]


def _image_targets(label: Mapping[str, torch.Tensor], pixel_values: torch.Tensor, num_labels: int) -> Targets:
    classes, boxes, masks = (label[name].to(pixel_values.device) for name in ("class_labels", "boxes", "masks"))
    size = tuple(pixel_values.shape[-2:])
    if boxes.shape != (len(classes), 4) or masks.shape != (len(classes), *size):
        raise ValueError(
            f"{len(classes)} class labels need as many boxes and masks of the input's size {size}: got boxes "
            f"{tuple(boxes.shape)} and masks {tuple(masks.shape)}."
        )
    if len(classes) and not 0 <= classes.min() <= classes.max() < num_labels:
        raise ValueError(f"`class_labels` must be within 0 and {num_labels - 1} (`num_labels` of the configuration).")
    if not (boxes[:, 2:] > 0).all():
        raise ValueError("A box has no width or height: leave such objects out of the labels.")
    dtype = torch.promote_types(pixel_values.dtype, torch.float32)
    scale = torch.tensor((size[1], size[0]) * 2, dtype=dtype, device=boxes.device)
    return Targets(box_convert(boxes.to(dtype) * scale, "cxcywh", "xyxy"), classes.long(), masks)


def _pad(rows: list[torch.Tensor], value: float = 0.0) -> torch.Tensor:
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)


__all__ = ["RS4DForInstanceSegmentation", "RS4DInstancePreTrainedModel", "RS4DInstanceSegmentationOutput"]
