"""Models for images with other numbers of channels than their checkpoint was trained on."""

import copy

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

logger = logging.get_logger(__name__)

_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


class ChannelAdaptingModel(PreTrainedModel):
    """Base class whose `from_pretrained` takes `num_channels`.

    The module that sees the pixels names its convolution in `input_layer`; a decoder that predicts pixels has a method
    `adapt_channels(num_channels, modality)`.
    """

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path, *model_args, config=None, num_channels: int | None = None, **kwargs
    ):
        """As in transformers, plus adaptation to the channels of your images.

        Args:
            num_channels: Channels of your images if they differ from the checkpoint's; the first convolution is then
                adapted as timm's `in_chans` does (see [`adapt_input_channels`]), and this is logged. For RS-vHeat it
                means the default modality; `modalities={"optical": 10}` in the config adapts any of them.
        """
        load = super().from_pretrained
        if config is None and num_channels is None and "modalities" not in kwargs:
            return load(pretrained_model_name_or_path, *model_args, **kwargs)
        stored = _stored_config(cls, pretrained_model_name_or_path, kwargs)
        if stored is None or not _channels(stored):
            if num_channels is not None:
                kwargs["num_channels"] = num_channels
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

    def get_input_embeddings(self) -> nn.Module:
        """The first convolution (RS-vHeat: of the default modality). Quantisation and PEFT ask for it."""
        _, stem, _ = _find_stem(self, None)
        return getattr(stem, stem.input_layer)


def _stored_config(cls, path, kwargs: dict) -> PreTrainedConfig | None:
    try:
        hub_arguments = {name: kwargs[name] for name in _HUB_ARGUMENTS if name in kwargs}
        return cls.config_class.from_pretrained(path, **hub_arguments)
    except (OSError, TypeError):
        return None  # weights without a config: transformers itself explains what is missing


def _channels(config) -> dict[str, int]:
    """Channels by modality; models with one input layer give it the empty name."""
    if hasattr(config, "modalities"):
        return dict(config.modalities)
    return {"": config.num_channels} if hasattr(config, "num_channels") else {}


def _set_channels(config, channels: dict[str, int]) -> None:
    if hasattr(config, "modalities"):
        config.modalities = channels
    else:
        config.num_channels = channels[""]


def adapt_input_channels(model: PreTrainedModel, num_channels: int, modality: str | None = None) -> PreTrainedModel:
    """Give a model's first convolution another number of input channels, in place, keeping what it has learned.

    The kernels are repeated over the new channels and scaled, so that whole repeats of the old channels give what these
    gave; for one channel they are summed (timm's `adapt_input_conv`). A pretraining decoder's prediction of the pixels
    is repeated likewise, or averaged for one channel. Works on any model that holds one of our backbones, stock
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
    owner, stem, modality = _find_stem(model, modality)
    old = getattr(stem, stem.input_layer)
    if old.in_channels == num_channels:
        return model
    setattr(stem, stem.input_layer, repeat_inputs(old, num_channels))
    for module in model.modules():
        if hasattr(module, "adapt_channels"):
            module.adapt_channels(num_channels, modality)
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


def _find_stem(model: PreTrainedModel, modality: str | None) -> tuple:
    """The model that owns the input layer, the module with the layer, and the modality where there are several."""
    for owner in model.modules():
        if hasattr(owner, "stems"):
            modality = modality or owner.config.default_modality
            if modality not in owner.stems:
                raise ValueError(f"No stem for modality {modality!r}; this model has {list(owner.stems)}.")
            return owner, owner.stems[modality], modality
        for stem in owner.children():
            if hasattr(stem, "input_layer") and hasattr(owner, "config"):
                return owner, stem, None
    raise ValueError(f"{type(model).__name__} holds none of our backbones: there is no stem to adapt.")


@torch.no_grad()
def repeat_inputs(layer: nn.Conv2d, num_channels: int) -> nn.Conv2d:
    """A copy of a convolution for `num_channels` inputs, its kernels repeated and scaled, or summed for one channel."""
    old = layer.weight
    if num_channels == 1:
        weight = old.sum(dim=1, keepdim=True)
    else:
        chosen = torch.arange(num_channels, device=old.device) % layer.in_channels
        weight = old[:, chosen] * (layer.in_channels / num_channels)
    return _with_parameters(layer, {"weight": weight}, in_channels=num_channels)


@torch.no_grad()
def repeat_outputs(layer, channels: int, num_channels: int, dim: int):
    """A copy of a linear layer or convolution that predicts the pixels of `num_channels` instead of `channels`.

    Args:
        layer: Its outputs are the values of a patch.
        channels: Their channels.
        num_channels: New number of channels.
        dim: 0 if the outputs are ordered `(channels, pixels)`, 1 if `(pixels, channels)`.
    """
    parameters = {}
    for name, value in layer.named_parameters():
        patches = value.unflatten(0, (channels, -1) if dim == 0 else (-1, channels))
        if num_channels == 1:
            patches = patches.mean(dim, keepdim=True)
        else:
            patches = patches.index_select(dim, torch.arange(num_channels, device=value.device) % channels)
        parameters[name] = patches.flatten(0, 1)
    size = "out_channels" if isinstance(layer, nn.Conv2d) else "out_features"
    return _with_parameters(layer, parameters, **{size: len(parameters["weight"])})


def _with_parameters(layer, parameters: dict[str, torch.Tensor], **sizes: int):
    copied = copy.deepcopy(layer)
    for name, value in parameters.items():
        setattr(copied, name, nn.Parameter(value.contiguous(), requires_grad=getattr(layer, name).requires_grad))
    for name, size in sizes.items():
        setattr(copied, name, size)
    return copied
