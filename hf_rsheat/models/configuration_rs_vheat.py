"""Configuration of RS-vHeat (arXiv 2411.17984)."""

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .configuration_heat import HeatConfigMixin


@strict
class RSVHeatConfig(HeatConfigMixin, PreTrainedConfig):
    r"""Configuration of [`RSVHeatModel`]; the defaults are RS-vHeat-B, the only published size.

    Args:
        image_size (`int` or pair, defaults to 224):
            Height and width in pixels for which the tables are stored. Any other input size works: both tables are then
            resized bilinearly at run time.
        modalities (`dict[str, int]`, defaults to `{"optical": 3, "sar": 1}`):
            Sensors and their channels; each has its own stem, all share the trunk.
        hidden_sizes (`list[int]`, defaults to `[128, 256, 512, 1024]`): Width of each stage.
        depths (`list[int]`, defaults to `[2, 2, 18, 2]`): Layers of each stage.
        mlp_ratio (`float`, defaults to 4.0): Hidden width of the MLPs over the stage width.
        drop_path_rate (`float`, defaults to 0.5): Stochastic depth rate of the last layer; grows linearly from 0.
        post_norm (`bool`, defaults to `True`): Norm after each branch instead of before it.
        layer_scale_init_value (`float`, *optional*, defaults to 1e-5): Initial layer scale; none if `None`.
        inner_dims (`list[int]`, *optional*): Width of the heat operator per stage (slimmed models); `hidden_sizes`.
        mlp_hidden_dims (`list[int]`, *optional*): Hidden width of the MLPs per stage; `hidden_sizes * mlp_ratio`.
        initializer_range (`float`, defaults to 0.02): Standard deviation of linear weights and tables at the start.
        decoder_dim (`int`, *optional*): Width of the pretraining decoder; the width of stage 3 if `None`. Ours.
        mask_radius_range (pair of `float`, defaults to `(0.2, 0.3)`):
            Pretraining: radius of the frequency mask as a share of the padded spectrum's diagonal, drawn uniformly per
            image. The paper's "20-30 %" read as a radius; ours.
        spatial_loss_weight, frequency_loss_weight, contrastive_loss_weight (`float`, default to 1.0):
            Weights of the three pretraining losses, 1 : 1 : 1 as published. The contrastive term has no negatives: on
            small paired data weight 1 soon pulls all features together, and 0.1 trains better.
        out_features, out_indices: Stages that the backbone returns, of "stem", "stage1" ... "stage4".
    """

    model_type = "rs_vheat"
    has_heat_capacity = True
    table_interpolation = "bilinear"

    image_size: int | list[int] | tuple[int, int] = 224
    modalities: dict[str, int] | None = None
    hidden_sizes: list[int] | tuple[int, ...] = (128, 256, 512, 1024)
    depths: list[int] | tuple[int, ...] = (2, 2, 18, 2)
    mlp_ratio: float | int = 4.0
    drop_path_rate: float | int = 0.5
    post_norm: bool = True
    layer_scale_init_value: float | int | None = 1e-5
    inner_dims: list[int] | tuple[int, ...] | None = None
    mlp_hidden_dims: list[int] | tuple[int, ...] | None = None
    initializer_range: float | int = 0.02
    decoder_dim: int | None = None
    mask_radius_range: list[float] | tuple[float, float] = (0.2, 0.3)
    spatial_loss_weight: float | int = 1.0
    frequency_loss_weight: float | int = 1.0
    contrastive_loss_weight: float | int = 1.0
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(self, **kwargs):
        self.modalities = {"optical": 3, "sar": 1} if self.modalities is None else dict(self.modalities)
        if not self.modalities or any(channels < 1 for channels in self.modalities.values()):
            raise ValueError(f"`modalities` needs a sensor with at least one channel, got {self.modalities}.")
        low, high = self.mask_radius_range
        if not 0 <= low <= high <= 1:
            raise ValueError(f"`mask_radius_range` must be low <= high within [0, 1], got {self.mask_radius_range}.")
        self._derive_stages(kwargs)
        super().__post_init__(**kwargs)

    @property
    def default_modality(self) -> str:
        """ "optical", or the alphabetically first sensor of a model without it."""
        return "optical" if "optical" in self.modalities else min(self.modalities)


__all__ = ["RSVHeatConfig"]
