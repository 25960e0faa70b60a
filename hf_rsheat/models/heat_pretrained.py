"""Base class of the heat models: initialisation, caches, and stems for other numbers of channels."""

import copy
import math

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.utils import logging

from .heat_conduction import CachingModule
from .heat_encoder import HeatLayer, HeatStage, HeatStem, PointwiseConv

logger = logging.get_logger(__name__)

_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


class HeatPreTrainedModel(PreTrainedModel):
    """Weight initialisation (as vHeat's), stem adaptation, and cache control."""

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

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path, *model_args, config=None, num_channels: int | None = None, **kwargs
    ):
        """As in transformers, plus stem adaptation.

        Args:
            num_channels: Channels of your images if they differ from the checkpoint's; the first convolution is then
                adapted as timm's `in_chans` does (see [`adapt_input_channels`]), and this is logged. For RS-vHeat it
                means the default modality; `modalities={"optical": 10}` in the config adapts any of them.
        """
        load = super().from_pretrained
        if config is None and num_channels is None and "modalities" not in kwargs:
            return load(pretrained_model_name_or_path, *model_args, **kwargs)
        stored = _stored_config(cls, pretrained_model_name_or_path, kwargs)
        if stored is None:
            return load(pretrained_model_name_or_path, *model_args, config=config, **kwargs)
        if config is None:
            hub_arguments = {name: kwargs[name] for name in _HUB_ARGUMENTS if name in kwargs}
            config, unused = cls.config_class.from_pretrained(
                pretrained_model_name_or_path, return_unused_kwargs=True, **kwargs
            )
            kwargs = {**unused, **hub_arguments}
        elif not isinstance(config, PreTrainedConfig):
            config = cls.config_class.from_pretrained(config)
        config = copy.deepcopy(config)
        wanted = _channels(config)
        if num_channels is not None:
            wanted[next(iter(wanted)) if "" in wanted else config.default_modality] = num_channels
        available = _channels(stored)
        _set_channels(config, {name: available.get(name, channels) for name, channels in wanted.items()})
        loaded = load(pretrained_model_name_or_path, *model_args, config=config, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        for name, channels in wanted.items():
            if channels != available.get(name, channels):
                adapt_input_channels(model, channels, modality=name or None)
        return loaded


def _stored_config(cls, path, kwargs: dict) -> PreTrainedConfig | None:
    try:
        hub_arguments = {name: kwargs[name] for name in _HUB_ARGUMENTS if name in kwargs}
        return cls.config_class.from_pretrained(path, **hub_arguments)
    except (OSError, TypeError):
        return None  # weights without a config: transformers itself explains what is missing


def _channels(config) -> dict[str, int]:
    """Channels by modality; vHeat's only stem has the empty name."""
    return dict(config.modalities) if hasattr(config, "modalities") else {"": config.num_channels}


def _set_channels(config, channels: dict[str, int]) -> None:
    if hasattr(config, "modalities"):
        config.modalities = channels
    else:
        config.num_channels = channels[""]


def adapt_input_channels(model: PreTrainedModel, num_channels: int, modality: str | None = None) -> PreTrainedModel:
    """Give a model's stem another number of input channels, in place, keeping what it has learned.

    The kernels are repeated over the new channels and scaled so that the response to equal channels stays the same; for
    one channel they are summed (timm's `adapt_input_conv`). Works on any model that holds one of our backbones, stock
    segmentation and detection models included.

    Args:
        model: The model; changed and returned.
        num_channels: New number of channels.
        modality: Which stem of an RS-vHeat (its default modality if `None`).

    Raises:
        ValueError: If the model has no such stem.
    """
    if num_channels < 1:
        raise ValueError(f"`num_channels` must be positive, got {num_channels}.")
    owner = next(
        (m for m in model.modules() if hasattr(m, "stems") or isinstance(getattr(m, "stem", None), HeatStem)), None
    )
    if owner is None:
        raise ValueError(f"{type(model).__name__} has no heat stem to adapt.")
    if hasattr(owner, "stems"):
        modality = modality or owner.config.default_modality
        if modality not in owner.stems:
            raise ValueError(f"No stem for modality {modality!r}; this model has {list(owner.stems)}.")
        stem = owner.stems[modality]
    else:
        stem = owner.stem
    old = stem.conv1
    if old.in_channels == num_channels:
        return model
    with torch.no_grad():
        if num_channels == 1:
            weight = old.weight.sum(dim=1, keepdim=True)
        else:
            repeats = math.ceil(num_channels / old.in_channels)
            weight = old.weight.repeat(1, repeats, 1, 1)[:, :num_channels] * (old.in_channels / num_channels)
        new = nn.Conv2d(num_channels, old.out_channels, old.kernel_size, old.stride, old.padding)
        new = new.to(device=old.weight.device, dtype=old.weight.dtype)
        new.weight.copy_(weight)
        new.bias.copy_(old.bias)
    stem.conv1 = new.requires_grad_(old.weight.requires_grad)
    for config in {id(c): c for c in (owner.config, model.config)}.values():
        if hasattr(config, "modalities"):
            config.modalities = {**config.modalities, modality: num_channels}
        elif hasattr(config, "num_channels"):
            config.num_channels = num_channels
    logger.warning(
        "Adapted the stem%s from %d to %d input channels.",
        f" {modality!r}" if modality else "",
        old.in_channels,
        num_channels,
    )
    return model
