"""Base class of the heat models: initialisation and caches."""

import math

import torch
from torch import nn
from transformers import initialization as init

from .channels_last import pack_linear
from .heat_conduction import CachingModule, HeatConduction
from .heat_encoder import HeatLayer, HeatMLP, HeatStage, PointwiseConv
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

    def pack_weights(self) -> None:
        """For faster inference on a CPU keep the linear maps' weights a second time, in blocks as oneDNN needs them.

        Nothing else changes; weights edited or moved later are used as before, until this is called again. Needs the
        memory of the weights again. Hooked, adapted and quantised linear maps are left alone.

        Raises:
            ValueError: The weights are not float32 or bfloat16 on a CPU, or PyTorch lacks oneDNN.
        """
        for module in self.modules():
            if isinstance(module, HeatConduction):
                pack_linear(module.in_proj, in_halves=True)
                pack_linear(module.out_proj)
            elif isinstance(module, HeatMLP):
                pack_linear(module.fc1)
                pack_linear(module.fc2)
