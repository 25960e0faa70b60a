"""DINOv2 (arXiv 2304.07193) with MLPs of any hidden width: transformers' model, narrower inside."""

from torch import nn
from transformers import Dinov2Backbone, Dinov2ForImageClassification, Dinov2Model

from .configuration_slim_dinov2 import SlimDinov2Config


def _set_mlp_widths(model: nn.Module, config: SlimDinov2Config) -> None:
    """Replace the MLPs' linear layers by ones of `config.intermediate_size`. Head widths transformers sets itself."""
    hidden, width = config.hidden_size, config.intermediate_size
    names = ("gate_proj", "up_proj", "down_proj") if config.use_swiglu_ffn else ("fc1", "fc2")
    mlps = [module for module in model.modules() if all(hasattr(module, name) for name in names)]
    for mlp in mlps:
        for name in names[:-1]:
            setattr(mlp, name, nn.Linear(hidden, width))
        setattr(mlp, names[-1], nn.Linear(width, hidden))


class SlimDinov2Model(Dinov2Model):
    """[`Dinov2Model`] with the widths of [`SlimDinov2Config`]."""

    config_class = SlimDinov2Config
    config: SlimDinov2Config

    def __init__(self, config: SlimDinov2Config) -> None:
        super().__init__(config)
        _set_mlp_widths(self, config)
        self.post_init()


class SlimDinov2ForImageClassification(Dinov2ForImageClassification):
    """[`Dinov2ForImageClassification`] with the widths of [`SlimDinov2Config`]."""

    config_class = SlimDinov2Config
    config: SlimDinov2Config

    def __init__(self, config: SlimDinov2Config) -> None:
        super().__init__(config)
        _set_mlp_widths(self, config)
        self.post_init()


class SlimDinov2Backbone(Dinov2Backbone):
    """[`Dinov2Backbone`] with the widths of [`SlimDinov2Config`]."""

    config_class = SlimDinov2Config
    config: SlimDinov2Config

    def __init__(self, config: SlimDinov2Config) -> None:
        super().__init__(config)
        _set_mlp_widths(self, config)
        self.post_init()


__all__ = ["SlimDinov2Backbone", "SlimDinov2ForImageClassification", "SlimDinov2Model"]
