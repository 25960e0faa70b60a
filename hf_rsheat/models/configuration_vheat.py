"""Configuration of vHeat (arXiv 2405.16555)."""

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .configuration_heat import HeatConfigMixin


@strict
class VHeatConfig(HeatConfigMixin, PreTrainedConfig):
    r"""Configuration of [`VHeatModel`]; the defaults are vHeat-T.

    Args:
        image_size (`int` or pair, defaults to 224):
            Height and width in pixels for which the frequency tables are stored. Any other input size works: tables
            are then resized bicubically at run time.
        num_channels (`int`, defaults to 3): Channels of the input.
        hidden_sizes (`list[int]`, defaults to `[96, 192, 384, 768]`): Width of each stage.
        depths (`list[int]`, defaults to `[2, 2, 6, 2]`): Layers of each stage.
        mlp_ratio (`float`, defaults to 4.0): Hidden width of the MLPs over the stage width.
        drop_path_rate (`float`, defaults to 0.1): Stochastic depth rate of the last layer; grows linearly from 0.
        post_norm (`bool`, defaults to `False`): Norm after each branch (vHeat-S and -B) instead of before it (-T).
        layer_scale_init_value (`float`, *optional*): Initial layer scale (1e-5 in vHeat-S and -B); none if `None`.
        inner_dims (`list[int]`, *optional*): Width of the heat operator per stage (slimmed models); `hidden_sizes`.
        mlp_hidden_dims (`list[int]`, *optional*): Hidden width of the MLPs per stage; `hidden_sizes * mlp_ratio`.
        initializer_range (`float`, defaults to 0.02): Standard deviation of linear weights and tables at the start.
        out_features, out_indices: Stages that the backbone returns, of "stem", "stage1" ... "stage4".
    """

    model_type = "vheat"
    has_heat_capacity = False
    table_interpolation = "bicubic"

    image_size: int | list[int] | tuple[int, int] = 224
    num_channels: int = 3
    hidden_sizes: list[int] | tuple[int, ...] = (96, 192, 384, 768)
    depths: list[int] | tuple[int, ...] = (2, 2, 6, 2)
    mlp_ratio: float | int = 4.0
    drop_path_rate: float | int = 0.1
    post_norm: bool = False
    layer_scale_init_value: float | int | None = None
    inner_dims: list[int] | tuple[int, ...] | None = None
    mlp_hidden_dims: list[int] | tuple[int, ...] | None = None
    initializer_range: float | int = 0.02
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(self, **kwargs):
        self._derive_stages(kwargs)
        super().__post_init__(**kwargs)


__all__ = ["VHeatConfig"]
