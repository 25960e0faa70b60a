"""Configuration of SelectiveMAE (arXiv 2406.11933)."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.backbone_utils import BackboneConfigMixin

_PRESETS: dict[str, dict[str, int]] = {
    "small": {
        "hidden_size": 384,
        "num_hidden_layers": 12,
        "num_attention_heads": 6,
        "decoder_hidden_size": 256,
        "decoder_num_attention_heads": 8,
    },
    "base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12},
    "large": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16},
    "huge": {"hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 16, "patch_size": 14},
}


@strict
class SelectiveMAEConfig(BackboneConfigMixin, PreTrainedConfig):
    r"""Configuration of [`SelectiveMAEModel`]; the defaults are ViT-B/16 with the published recipe.

    Fields shared with [`ViTMAEConfig`] mean the same there.

    Args:
        image_size (`int` or pair, defaults to 224): Height and width in pixels for which the position tables are
            stored. Any other input size works: tables are then resized bicubically at run time.
        patch_size (`int`, defaults to 16): Side of a patch in pixels.
        num_channels (`int`, defaults to 3): Channels of the input.
        hidden_size, num_hidden_layers, num_attention_heads: Size of the encoder.
        head_dim (`int`, *optional*): Width of a head of the encoder (slimmed models); `hidden_size` over the number of
            heads if `None`.
        intermediate_size (`int`, *optional*): Hidden width of the encoder's MLPs; `4 * hidden_size` if `None`.
        hidden_act (`str`, defaults to `"gelu"`): Activation of the MLPs.
        qkv_bias (`bool`, defaults to `True`): Biases of the query, key and value projections.
        layer_norm_eps (`float`, defaults to 1e-6): Epsilon of all norms.
        drop_path_rate (`float`, defaults to 0.0): Stochastic depth rate of the last encoder layer; grows linearly from
            0. The original fine-tunes with 0.1 and pretrains without.
        initializer_range (`float`, defaults to 0.02): Standard deviation of the class and mask tokens at the start.
        use_mean_pooling (`bool`, defaults to `False`): Pool by the mean over patches with the final norm after it,
            instead of the normalised class token: the two kinds of the original's classifiers.
        decoder_hidden_size, decoder_num_hidden_layers, decoder_num_attention_heads: Size of the pretraining decoder,
            512, 12 and 16 by default.
        decoder_intermediate_size (`int`, *optional*): Hidden width of the decoder's MLPs; `4 * decoder_hidden_size`.
        mask_ratio (`float`, defaults to 0.85): Share of tokens that are not encoded.
        kept_mask_ratio (`float`, defaults to 0.25): Share of tokens that are reconstructed.
        norm_pix_loss (`bool`, defaults to `True`): Reconstruct pixels standardised per patch.
        criterion (`str`, defaults to `"uniform"`): How seeds and reconstructed tokens are chosen: "uniform" (what the
            released code does) or "hog" (the paper's method, repaired).
        total_epochs, smooth_epochs (`float`, default to 800 and 20): The scale of the `epoch` passed to the model, and
            the length of the two transitions of the schedule on it.
        apply_layernorm (`bool`, defaults to `True`): Normalise the backbone's feature maps by the final norm. The
            original's detection and segmentation code does not.
        out_features, out_indices: Layers that the backbone returns, of "stem", "stage1" ... "stage<layers>".
    """

    model_type = "selective_mae"

    image_size: int | list[int] | tuple[int, int] = 224
    patch_size: int = 16
    num_channels: int = 3
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    head_dim: int | None = None
    intermediate_size: int | None = None
    hidden_act: str = "gelu"
    qkv_bias: bool = True
    layer_norm_eps: float = 1e-6
    drop_path_rate: float | int = 0.0
    initializer_range: float | int = 0.02
    use_mean_pooling: bool = False
    decoder_hidden_size: int = 512
    decoder_num_hidden_layers: int = 12
    decoder_num_attention_heads: int = 16
    decoder_intermediate_size: int | None = None
    mask_ratio: float | int = 0.85
    kept_mask_ratio: float | int = 0.25
    norm_pix_loss: bool = True
    criterion: str = "uniform"
    total_epochs: float | int = 800
    smooth_epochs: float | int = 20
    apply_layernorm: bool = True
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self._check_sizes()
        if not (0 < self.mask_ratio < 1 and 0 < self.kept_mask_ratio <= 1):
            raise ValueError(
                f"`mask_ratio` and `kept_mask_ratio` must be shares, got {self.mask_ratio} and {self.kept_mask_ratio}."
            )
        if not 0 <= self.drop_path_rate < 1:
            raise ValueError(f"`drop_path_rate` must be in [0, 1), got {self.drop_path_rate}.")
        if self.criterion not in ("uniform", "hog"):
            raise ValueError(f"`criterion` must be 'uniform' or 'hog', got {self.criterion!r}.")
        self.stage_names = ["stem"] + [f"stage{index}" for index in range(1, self.num_hidden_layers + 1)]
        self.set_output_features_output_indices(
            out_indices=kwargs.pop("out_indices", None), out_features=kwargs.pop("out_features", None)
        )
        super().__post_init__(**kwargs)

    def _check_sizes(self) -> None:
        if min(self.image_size_pair) < 1 or self.patch_size < 1:
            raise ValueError(f"Sizes must be positive, got image {self.image_size} and patch {self.patch_size}.")
        if self.head_dim is not None and self.head_dim < 1:
            raise ValueError(f"`head_dim` must be positive, got {self.head_dim}.")
        if self.num_hidden_layers < 1 or self.decoder_num_hidden_layers < 1:
            raise ValueError("`num_hidden_layers` and `decoder_num_hidden_layers` must be at least 1.")
        for prefix in ("", "decoder_"):
            width, heads = getattr(self, f"{prefix}hidden_size"), getattr(self, f"{prefix}num_attention_heads")
            if width % 4 or heads < 1 or width % heads:
                raise ValueError(
                    f"`{prefix}hidden_size` must be a multiple of 4 and of `{prefix}num_attention_heads`, "
                    f"got {width} and {heads}."
                )
            if getattr(self, f"{prefix}intermediate_size") is None:
                setattr(self, f"{prefix}intermediate_size", 4 * width)

    @classmethod
    def preset(cls, name: str, **fields: Any) -> "SelectiveMAEConfig":
        """A published size, "small", "base", "large" or "huge" (patch 16; huge 14), with `fields` on top.

        Raises:
            ValueError: For another name.
        """
        if name not in _PRESETS:
            raise ValueError(f"Unknown preset {name!r}; presets are {', '.join(_PRESETS)}.")
        return cls(**{**_PRESETS[name], **fields})

    @property
    def image_size_pair(self) -> tuple[int, int]:
        """Height and width in pixels."""
        if isinstance(self.image_size, int):
            return self.image_size, self.image_size
        height, width = self.image_size
        return height, width

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches of an image; a part of a patch at the border counts as one."""
        return -(-height // self.patch_size), -(-width // self.patch_size)


__all__ = ["SelectiveMAEConfig"]
