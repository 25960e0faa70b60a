"""Configuration of RS4D's instance segmentation (arXiv 2606.25324), loadable without the package."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig, SamMaskDecoderConfig

from .configuration_rs4d import RS4DConfig
from .configuration_rs_vheat import RSVHeatConfig
from .configuration_vheat import VHeatConfig

BACKBONE_CONFIGS = {config.model_type: config for config in (RS4DConfig, RSVHeatConfig, VHeatConfig)}
# What the two published heads do not share.
HEAD_DEFAULTS: dict[str, dict[str, Any]] = {
    "bbox": {"anchor_scales": (8,), "rcnn_num_samples": 512, "with_extra_pe": False},
    "prompt": {"anchor_scales": (4, 8), "rcnn_num_samples": 256, "with_extra_pe": True},
}
POSITIVE = (
    *("feature_size", "aggregator_size", "fc_size", "mask_num_convs", "n_points"),
    *("rpn_nms_pre", "rpn_max_per_img", "rpn_nms_pre_train", "rpn_max_per_img_train", "max_per_img"),
    *("rpn_num_samples", "rcnn_num_samples"),
)


@strict
class RS4DInstanceConfig(PreTrainedConfig):
    r"""Configuration of [`RS4DForInstanceSegmentation`]; the defaults are the published settings over RS4D-base.

    Args:
        backbone_config (`RS4DConfig`, `RSVHeatConfig`, `VHeatConfig` or `dict`, *optional*):
            The backbone, RS4D-base if `None`. Which maps it returns follows from the fields here.
        head (`str`, defaults to `"bbox"`):
            How an object's mask is made: "bbox" - 28 x 28 pixels inside its box, one mask per class; "prompt" - point
            prompts learned from the object's features, for a SAM mask decoder over the whole image.
        feature_size (`int`, defaults to 256): Channels of all feature maps of the neck.
        aggregator_size (`int`, defaults to 32): Channels inside the feature aggregator (RS4D backbones only).
        select_layers (`list[int]`, *optional*):
            Layers of an RS4D backbone that the aggregator joins, from 0. If `None`: every second one as published for
            RS4D-base, from 1 to 21 ("bbox") or 2 to 22 ("prompt") of 24; all of a backbone of less than 6 layers.
        aggregator_pa, fpn_pa (`bool`, default to `False`):
            The "Pa" variants of the aggregator (a second pass, last layer to first) and of the pyramid (each level also
            gets the finer one).
        anchor_scales (`list`, *optional*): Anchor sides in strides; `(8,)` for "bbox", `(4, 8)` for "prompt".
        anchor_ratios (`list[float]`, defaults to `(0.5, 1.0, 2.0)`): Anchor heights over widths.
        rpn_nms_pre, rpn_max_per_img (`int`, default to 1000): Proposals per level before NMS, and per image after it.
        rpn_nms_pre_train, rpn_max_per_img_train (`int`, default to 2000 and 1000): The same for the loss.
        rpn_nms_threshold (`float`, defaults to 0.7): IoU above which a proposal hides others of its level.
        score_threshold (`float`, defaults to 0.05): Detections need a class probability above this.
        nms_threshold (`float`, defaults to 0.5): IoU above which a detection hides others of its class.
        max_per_img (`int`, defaults to 100): Detections per image.
        mask_threshold (`float`, defaults to 0.5): Probability from which a pixel belongs to an object.
        rpn_pos_iou, rpn_neg_iou, rpn_min_pos_iou (`float`, default to 0.7, 0.3 and 0.3):
            Assignment of anchors: an IoU from the first is an object, below the second background; an object also gets
            the anchors that overlap it most, if by the third.
        rcnn_pos_iou, rcnn_neg_iou, rcnn_min_pos_iou (`float`, default to 0.5): The same for proposals.
        rpn_num_samples, rpn_pos_fraction (defaults to 256 and 0.5):
            Anchors per image in the loss, and the largest share of objects among them.
        rcnn_num_samples, rcnn_pos_fraction (defaults to 512 for "bbox", 256 for "prompt"; and 0.25):
            The same for proposals.
        fc_size (`int`, defaults to 1024): Width of the box head.
        mask_num_convs (`int`, defaults to 4): Convolutions of the "bbox" mask head.
        n_points (`int`, defaults to 5): Point prompts per object.
        with_sincos (`bool`, defaults to `False`): Whether prompts are sums of sines and plain values.
        with_extra_pe (`bool`, *optional*):
            Whether a sine-cosine position map is added to what both object heads see; only with "prompt" if `None`.
        with_box_pe (`bool`, defaults to `False`):
            Whether SAM's positional encoding of the object's box, one prompt its centre and the others its corners, is
            added to the learned prompts, and the decoder's attention starts with keys equal to queries, which finds the
            cells at the same place. As published, prompts and attention have to learn where an object is; started from
            SAM's decoder they can, from scratch that takes thousands of steps.
        mask_dice_weight (`float`, defaults to 0):
            What the Dice loss of "prompt" masks counts beside their cross-entropy. None as published, where the decoder
            starts from SAM's; to learn from scratch it needs about 1, since small objects are a hundredth of the pixels
            that the cross-entropy is the mean of.
        mask_decoder_config (`SamMaskDecoderConfig` or `dict`, *optional*): The decoder of "prompt", SAM's if `None`.
        num_labels, id2label: Classes, without background.
    """

    model_type = "rs4d_instances"

    backbone_config: dict | PreTrainedConfig | None = None
    head: str = "bbox"
    feature_size: int = 256
    aggregator_size: int = 32
    select_layers: list[int] | tuple[int, ...] | None = None
    aggregator_pa: bool = False
    fpn_pa: bool = False
    anchor_scales: list[float | int] | tuple[float | int, ...] | None = None
    anchor_ratios: list[float | int] | tuple[float | int, ...] = (0.5, 1.0, 2.0)
    rpn_nms_pre: int = 1000
    rpn_max_per_img: int = 1000
    rpn_nms_pre_train: int = 2000
    rpn_max_per_img_train: int = 1000
    rpn_nms_threshold: float = 0.7
    score_threshold: float | int = 0.05
    nms_threshold: float = 0.5
    max_per_img: int = 100
    mask_threshold: float = 0.5
    rpn_pos_iou: float = 0.7
    rpn_neg_iou: float = 0.3
    rpn_min_pos_iou: float = 0.3
    rpn_num_samples: int = 256
    rpn_pos_fraction: float = 0.5
    rcnn_pos_iou: float = 0.5
    rcnn_neg_iou: float = 0.5
    rcnn_min_pos_iou: float = 0.5
    rcnn_num_samples: int | None = None
    rcnn_pos_fraction: float = 0.25
    fc_size: int = 1024
    mask_num_convs: int = 4
    n_points: int = 5
    with_sincos: bool = False
    with_extra_pe: bool | None = None
    with_box_pe: bool = False
    mask_dice_weight: float | int = 0.0
    mask_decoder_config: dict | PreTrainedConfig | None = None

    def __post_init__(self, **kwargs):
        _check(self.head in HEAD_DEFAULTS, "head", self.head, f"one of {', '.join(HEAD_DEFAULTS)}")
        for name, value in HEAD_DEFAULTS[self.head].items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        self._check_ranges()
        self.backbone_config = _backbone_config(self.backbone_config)
        if not self.is_hierarchical and self.select_layers is None:
            layers, first = self.backbone_config.num_hidden_layers, 1 if self.head == "bbox" else 2
            self.select_layers = tuple(range(first, layers - 3 + first, 2)) if layers >= 6 else tuple(range(layers))
        self.out_indices  # noqa: B018 - says now if the layers do not fit
        if self.head == "prompt" and not isinstance(self.mask_decoder_config, PreTrainedConfig):
            self.mask_decoder_config = SamMaskDecoderConfig(**(self.mask_decoder_config or {}))
        super().__post_init__(**kwargs)

    def _check_ranges(self) -> None:
        for name, value in vars(self).items():
            if name.endswith(("_threshold", "_iou", "_fraction")):
                _check(0 <= value <= 1, name, value, "within 0 and 1")
            elif name in POSITIVE:
                _check(value >= 1, name, value, "positive")
        _check(self.mask_dice_weight >= 0, "mask_dice_weight", self.mask_dice_weight, "0 or more")
        _check(self.feature_size % 4 == 0, "feature_size", self.feature_size, "a multiple of 4")
        for name in ("anchor_scales", "anchor_ratios"):
            value = getattr(self, name)
            _check(len(value) > 0 and min(value) > 0, name, value, "one or more positive numbers")

    @property
    def is_hierarchical(self) -> bool:
        """Whether the backbone itself brings maps of several strides (vHeat, RS-vHeat)."""
        return self.backbone_config.model_type != RS4DConfig.model_type

    @property
    def out_indices(self) -> list[int]:
        """Which maps the backbone has to return, from 0 for its stem; the last is always among them.

        Raises:
            ValueError: `select_layers`, or a choice of plain necks, does not fit the backbone.
        """
        if self.is_hierarchical:
            for name in ("select_layers", "aggregator_pa", "fpn_pa"):
                _check(not getattr(self, name), name, getattr(self, name), "left out over a hierarchical backbone")
            return [1, 2, 3, 4]
        chosen, layers = list(self.select_layers), self.backbone_config.num_hidden_layers
        fits = chosen == sorted(set(chosen) & set(range(layers))) != []
        _check(fits, "select_layers", chosen, f"ascending layers from 0 to {layers - 1}")
        return sorted({layer + 1 for layer in chosen} | {layers})

    @property
    def strides(self) -> tuple[int, ...]:
        """Strides of the five levels of the pyramid, pixels."""
        stride = 16 if self.is_hierarchical else self.backbone_config.patch_size
        return tuple(stride * factor // 4 for factor in (1, 2, 4, 8, 16))

    @property
    def image_size(self) -> int | list[int] | tuple[int, int]:
        """Input size in pixels for which the backbone stores its tables; any other works."""
        return self.backbone_config.image_size

    @property
    def mask_layout(self) -> str:
        """What a mask covers: its "box", into which it has to be pasted, or the whole "image" (network input)."""
        return "box" if self.head == "bbox" else "image"


def _backbone_config(backbone: dict | PreTrainedConfig | None) -> PreTrainedConfig:
    if backbone is None:
        return RS4DConfig()
    fields = backbone if isinstance(backbone, dict) else backbone.to_dict()
    model_type = fields.get("model_type")
    _check(model_type in BACKBONE_CONFIGS, "backbone_config", model_type, f"one of {', '.join(BACKBONE_CONFIGS)}")
    if model_type == RS4DConfig.model_type:
        size = fields.get("patch_size", 16)
        _check(size % 4 == 0, "patch_size", size, "a multiple of 4, so that the pyramid has whole strides")
        fields = {**fields, "out_type": "featmap", "add_fpn": False}
    return BACKBONE_CONFIGS[model_type].from_dict(fields)


def _check(condition: bool, name: str, value: object, need: str) -> None:
    if not condition:
        raise ValueError(f"`{name}` must be {need}, got {value!r}.")


__all__ = ["RS4DInstanceConfig"]
