"""Base class of the heat models: initialisation and caches."""

import copy
import math
from typing import Self

import torch
from torch import nn
from transformers import initialization as init

from .fused_heat import check_fusable, fuse
from .heat_conduction import CachingModule
from .heat_encoder import HeatLayer, HeatStage, PointwiseConv
from .input_channels import ChannelAdaptingModel


class HeatPreTrainedModel(ChannelAdaptingModel):
    """Weight initialisation (as vHeat's) and cache control."""

    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["HeatLayer"]  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, nn.Conv2d | PointwiseConv):
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            if module.bias is not None:
                fan_in = module.weight[0].numel()
                init.uniform_(module.bias, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))
        elif isinstance(module, nn.Linear):
            init.trunc_normal_(module.weight, std=std)
            init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, HeatStage):
            init.trunc_normal_(module.frequency_embedding, std=std)
            if module.heat_capacity is not None:
                init.trunc_normal_(module.heat_capacity, std=std)
        elif isinstance(module, HeatLayer) and module.layer_scale1 is not None:
            init.constant_(module.layer_scale1, self.config.layer_scale_init_value)
            init.constant_(module.layer_scale2, self.config.layer_scale_init_value)

    def clear_cache(self) -> None:
        """Forget the decay maps kept in eval mode. Needed only after editing weights through `.data`."""
        for module in self.modules():
            if isinstance(module, CachingModule):
                module.clear_cache()

    def fuse(self) -> Self:
        """An equivalent model for inference on this CPU, without gradients; this model stays as it is.

        Same call, same outputs to rounding, for any batch and size. It cannot be trained, moved, saved, exported or
        looked into with hooks: do that with this model. Its weights need as much memory as this model's.

        Raises:
            ValueError: The weights are not float32 or bfloat16 on a CPU, or hooked, adapted or quantised; or PyTorch
                lacks oneDNN.
        """
        check_fusable(self)
        fused = copy.deepcopy(self).eval().requires_grad_(False)
        fuse(fused)
        return fused
