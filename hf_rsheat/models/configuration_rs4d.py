"""Configuration of RS4D (arXiv 2606.25324)."""

import math
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.backbone_utils import BackboneConfigMixin

# The published sizes; they differ in depth and inner width only.
RS4D_SIZES: dict[str, dict[str, int]] = {
    "small": {"num_hidden_layers": 16, "inner_size": 512},
    "base": {"num_hidden_layers": 24, "inner_size": 512},
    "large": {"num_hidden_layers": 28, "inner_size": 640},
    "huge": {"num_hidden_layers": 32, "inner_size": 640},
}
# In which orders each path reads the tokens: as they are, reversed, in a random order.
PATH_ORDERS: dict[str, tuple[str, ...]] = {
    "forward": ("forward",),
    "forward_reverse_mean": ("forward", "reverse"),
    "forward_reverse_gate": ("forward", "reverse"),
    "forward_reverse_shuffle_mean": ("forward", "reverse", "shuffle"),
    "forward_reverse_shuffle_gate": ("forward", "reverse", "shuffle"),
}
OUT_TYPES = ("featmap", "featmap_hwc", "raw", "avg_featmap")


@strict
class RS4DConfig(BackboneConfigMixin, PreTrainedConfig):
    r"""Configuration of [`RS4DModel`]; the defaults are RS4D-base, other sizes come from [`RS4DConfig.preset`].

    Args:
        image_size (`int` or pair, defaults to 1024):
            Height and width in pixels for which the position table is stored. Any other input size works: the table is
            then resized bicubically at run time.
        patch_size (`int`, defaults to 16): Side of a patch, pixels; inputs are padded to it at the bottom and right.
        num_channels (`int`, defaults to 3): Channels of the input.
        hidden_size (`int`, defaults to 256): Width of the token stream.
        inner_size (`int`, defaults to 512): Width of the state-space mixers.
        num_hidden_layers (`int`, defaults to 24): Layers.
        state_size (`int`, defaults to 16): States per inner channel.
        conv_kernel (`int`, defaults to 4): Taps of the causal depthwise convolution.
        time_step_rank (`int`, *optional*): Rank of the time-step projection; `hidden_size / 16`, rounded up, if `None`.
        path_type (`str`, defaults to `"forward_reverse_mean"`):
            Orders in which a layer reads the tokens, and how their outputs are joined: a key of `PATH_ORDERS`.
            "shuffle" is a new random order at each call, also in evaluation.
        final_norm (`bool`, defaults to `True`): Whether the last layer's output is normalised.
        out_type (`str`, defaults to `"featmap"`):
            Form of a backbone's maps: "featmap" `(batch, hidden, height, width)`, "featmap_hwc" with channels last,
            "raw" tokens `(batch, tokens, hidden)`, or "avg_featmap", their normalised mean `(batch, hidden)`. The last
            adds a norm to the pooled output of every model; else this field changes nothing outside the backbone.
        add_fpn (`bool`, defaults to `False`):
            Whether the backbone brings the maps of its four `out_features` to strides 4, 8, 16 and 32 with new layers
            (as BEiT's `add_fpn`), for heads that expect a pyramid. Needs `out_type="featmap"`.
        use_cls_token (`bool`, defaults to `False`): Whether a learned token stands before the patches.
        layer_norm_eps (`float`, defaults to 1e-6): Epsilon of all norms.
        initializer_range (`float`, defaults to 0.02): Standard deviation of the position table at the start.
        teacher_channels (`int`, *optional*):
            Channels of the map that [`RS4DForDistillation`] imitates; `None` means `hidden_size`.
        scan_backend (`str`, defaults to `"auto"`): "auto", "torch", "associative" or "kernels"; see `selective_scan`.
        out_features, out_indices: What the backbone returns, of "stem", "stage1" ... one per layer.
    """

    model_type = "rs4d"

    image_size: int | list[int] | tuple[int, int] = 1024
    patch_size: int = 16
    num_channels: int = 3
    hidden_size: int = 256
    inner_size: int = 512
    num_hidden_layers: int = 24
    state_size: int = 16
    conv_kernel: int = 4
    time_step_rank: int | None = None
    path_type: str = "forward_reverse_mean"
    final_norm: bool = True
    out_type: str = "featmap"
    add_fpn: bool = False
    use_cls_token: bool = False
    layer_norm_eps: float = 1e-6
    initializer_range: float | int = 0.02
    teacher_channels: int | None = None
    scan_backend: str = "auto"
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(self, **kwargs):
        for name in ("patch_size", "num_channels", "hidden_size", "inner_size", "num_hidden_layers", "state_size"):
            _check(getattr(self, name) >= 1, name, getattr(self, name), "positive")
        _check(min(self.image_size_pair) >= 1, "image_size", self.image_size, "positive")
        _check(self.conv_kernel >= 1, "conv_kernel", self.conv_kernel, "positive")
        if self.time_step_rank is None:
            self.time_step_rank = math.ceil(self.hidden_size / 16)
        _check(self.time_step_rank >= 1, "time_step_rank", self.time_step_rank, "positive")
        _check(
            self.teacher_channels is None or self.teacher_channels >= 1,
            "teacher_channels",
            self.teacher_channels,
            "positive",
        )
        _check(self.path_type in PATH_ORDERS, "path_type", self.path_type, f"one of {', '.join(PATH_ORDERS)}")
        _check(self.out_type in OUT_TYPES, "out_type", self.out_type, f"one of {', '.join(OUT_TYPES)}")
        self.stage_names = ["stem"] + [f"stage{index}" for index in range(1, self.num_hidden_layers + 1)]
        self.set_output_features_output_indices(
            out_indices=kwargs.pop("out_indices", None), out_features=kwargs.pop("out_features", None)
        )
        if self.add_fpn and (len(self.out_features) != 4 or self.out_type != "featmap"):
            raise ValueError(
                "`add_fpn` makes a pyramid of four maps: give four `out_indices` and out_type='featmap', got "
                f"{self.out_features} and {self.out_type!r}."
            )
        super().__post_init__(**kwargs)

    @classmethod
    def preset(cls, size: str, **fields: Any) -> "RS4DConfig":
        """One of the published sizes.

        Args:
            size: "small", "base", "large" or "huge".
            fields: Any other fields.

        Raises:
            ValueError: Unknown size.
        """
        if size not in RS4D_SIZES:
            raise ValueError(f"RS4D comes in {', '.join(RS4D_SIZES)}; got {size!r}.")
        return cls(**{**RS4D_SIZES[size], **fields})

    @property
    def image_size_pair(self) -> tuple[int, int]:
        """Height and width in pixels."""
        if isinstance(self.image_size, int):
            return self.image_size, self.image_size
        height, width = self.image_size
        return height, width

    @property
    def grid_size(self) -> tuple[int, int]:
        """Rows and columns of patches at `image_size`, rounded up."""
        height, width = self.image_size_pair
        return -(-height // self.patch_size), -(-width // self.patch_size)

    @property
    def orders(self) -> tuple[str, ...]:
        """Orders in which every layer reads the tokens."""
        return PATH_ORDERS[self.path_type]

    @property
    def has_gate(self) -> bool:
        """Whether the orders are joined with learned weights instead of their mean."""
        return self.path_type.endswith("gate")


def _check(condition: bool, name: str, value: object, need: str) -> None:
    if not condition:
        raise ValueError(f"`{name}` must be {need}, got {value!r}.")


__all__ = ["RS4DConfig"]
