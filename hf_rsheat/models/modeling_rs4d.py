"""RS4D (arXiv 2606.25324): a plain stack of state-space mixers over image patches, distilled from SAM's encoder."""

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.backbone_utils import BackboneMixin, filter_output_hidden_states
from transformers.modeling_outputs import (
    BackboneOutput,
    BaseModelOutputWithPoolingAndNoAttention,
    ImageClassifierOutputWithNoAttention,
)
from transformers.utils import can_return_tuple

from .configuration_rs4d import RS4DConfig
from .input_channels import ChannelAdaptingModel
from .rs4d_mixer import RS4DLayer, RS4DMixer


class RS4DEmbeddings(nn.Module):
    """Patches to tokens, with a learned position each."""

    input_layer = "patch_embeddings"

    def __init__(self, config: RS4DConfig) -> None:
        super().__init__()
        self.patch_size, self.grid_size = config.patch_size, config.grid_size
        self.patch_embeddings = nn.Conv2d(
            config.num_channels, config.hidden_size, config.patch_size, stride=config.patch_size, bias=False
        )
        tokens = math.prod(self.grid_size) + int(config.use_cls_token)
        self.position_embeddings = nn.Parameter(torch.empty(1, tokens, config.hidden_size))
        self.cls_token = nn.Parameter(torch.empty(1, 1, config.hidden_size)) if config.use_cls_token else None

    def positions(self, height: int, width: int) -> torch.Tensor:
        """The position table for a grid of `height` x `width` patches: as stored, or resized bicubically."""
        table = self.position_embeddings
        exported_for_any_size = isinstance(height, torch.SymInt) or isinstance(width, torch.SymInt)
        if not exported_for_any_size and (height, width) == self.grid_size:
            return table
        start = 0 if self.cls_token is None else 1
        grid = resize_positions(table[:, start:], self.grid_size, (height, width))
        return torch.cat((table[:, :start], grid), dim=1)

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, int, int]:
        """`(batch, num_channels, height, width)` to tokens `(batch, tokens, hidden)`, and their rows and columns."""
        if pixel_values.ndim != 4 or pixel_values.shape[1] != self.patch_embeddings.in_channels:
            raise ValueError(
                f"Expected pixel_values of shape (batch, {self.patch_embeddings.in_channels}, height, width), got "
                f"{tuple(pixel_values.shape)}. Other channels: `from_pretrained(..., num_channels=N)`."
            )
        bottom, right = (-size % self.patch_size for size in pixel_values.shape[-2:])
        patches = self.patch_embeddings(
            F.pad(pixel_values.to(self.patch_embeddings.weight.dtype), (0, right, 0, bottom))
        )
        height, width = patches.shape[-2:]
        tokens = patches.flatten(2).transpose(1, 2)
        if self.cls_token is not None:
            tokens = torch.cat((self.cls_token.expand(len(tokens), -1, -1), tokens), dim=1)
        return tokens + self.positions(height, width), height, width


def resize_positions(table: torch.Tensor, grid: tuple[int, int], new_grid: tuple[int, int]) -> torch.Tensor:
    """Resize a position table `(1, rows * columns, hidden)` bicubically from one grid (rows, columns) to another."""
    maps = table.float().reshape(1, *grid, -1).permute(0, 3, 1, 2)
    maps = F.interpolate(maps, size=new_grid, mode="bicubic", align_corners=False)
    return maps.flatten(2).transpose(1, 2).to(table.dtype)


class RS4DEncoder(nn.Module):
    """The layers and the norms: one before every mixer, shared by all, and one after the last layer."""

    def __init__(self, config: RS4DConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.layers = nn.ModuleList(RS4DLayer(config) for _ in range(config.num_hidden_layers))
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if config.final_norm else None

    def forward(self, hidden_states: torch.Tensor) -> list[torch.Tensor]:
        """Output of every layer, `(batch, tokens, hidden)`; only the last is normalised."""
        outputs = []
        for layer in self.layers:
            hidden_states = layer(hidden_states, self.norm)
            outputs.append(hidden_states)
        if self.layernorm is not None:
            outputs[-1] = self.layernorm(hidden_states)
        return outputs


class RS4DPreTrainedModel(ChannelAdaptingModel):
    config_class = RS4DConfig
    config: RS4DConfig
    base_model_prefix = "rs4d"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ("RS4DLayer",)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.ConvTranspose2d):
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            if module.bias is not None:
                bound = module.weight[0].numel() ** -0.5
                init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, nn.LayerNorm | nn.GroupNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, RS4DMixer):
            module.init_weights()
        elif isinstance(module, RS4DEmbeddings):
            init.trunc_normal_(module.position_embeddings, std=self.config.initializer_range)
            if module.cls_token is not None:
                init.zeros_(module.cls_token)


class RS4DModel(RS4DPreTrainedModel):
    """RS4D without a head: one token per patch, and their mean."""

    def __init__(self, config: RS4DConfig) -> None:
        super().__init__(config)
        self.embeddings = RS4DEmbeddings(config)
        self.encoder = RS4DEncoder(config)
        self.pooled_layernorm = _pooled_norm(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self, pixel_values: torch.Tensor, output_hidden_states: bool | None = None, **kwargs
    ) -> BaseModelOutputWithPoolingAndNoAttention:
        r"""
        Args:
            pixel_values: `(batch, num_channels, height, width)`, normalised by the image processor; any size.
            output_hidden_states: Also return the embedded patches and every layer's output, each
                `(batch, tokens, hidden)`. Of these only the last is normalised.

        Returns:
            `last_hidden_state` `(batch, tokens, hidden)`, row by row over `ceil(height / 16)` x `ceil(width / 16)`
            patches (after the class token, if there is one), and `pooler_output` `(batch, hidden)`, the mean over the
            patches.
        """
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        tokens, height, width = self.embeddings(pixel_values)
        outputs = self.encoder(tokens)
        return BaseModelOutputWithPoolingAndNoAttention(
            last_hidden_state=outputs[-1],
            pooler_output=_pool(outputs[-1][:, -height * width :], self.pooled_layernorm),
            hidden_states=(tokens, *outputs) if output_hidden_states else None,
        )


def _pooled_norm(config: RS4DConfig) -> nn.LayerNorm | None:
    return nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if config.out_type == "avg_featmap" else None


def _pool(tokens: torch.Tensor, norm: nn.LayerNorm | None) -> torch.Tensor:
    pooled = tokens.mean(dim=1)
    return pooled if norm is None else norm(pooled)


class RS4DForImageClassification(RS4DPreTrainedModel):
    """RS4D with a linear classifier on the mean token."""

    def __init__(self, config: RS4DConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.rs4d = RS4DModel(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        **kwargs,
    ) -> ImageClassifierOutputWithNoAttention:
        r"""
        Args:
            pixel_values: `(batch, num_channels, height, width)`.
            labels: Class indices `(batch,)` (or multi-hot floats `(batch, num_labels)` with
                `config.problem_type="multi_label_classification"`).
            output_hidden_states: See [`RS4DModel.forward`].
        """
        outputs = self.rs4d(pixel_values, output_hidden_states=output_hidden_states, return_dict=True)
        logits = self.classifier(outputs.pooler_output)
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        return ImageClassifierOutputWithNoAttention(loss=loss, logits=logits, hidden_states=outputs.hidden_states)


class RS4DPyramid(nn.ModuleList):
    """Four maps of stride 16 to strides 4, 8, 16 and 32, with the layers of BEiT's and ViTDet's simple pyramids."""

    def __init__(self, dim: int) -> None:
        def upsample() -> nn.ConvTranspose2d:
            return nn.ConvTranspose2d(dim, dim, kernel_size=2, stride=2)

        # One group is a LayerNorm over channels and positions; unlike BatchNorm it works with a batch of one.
        stride4 = nn.Sequential(upsample(), nn.GroupNorm(1, dim, eps=1e-6), nn.GELU(), upsample())
        super().__init__([stride4, upsample(), nn.Identity(), nn.MaxPool2d(kernel_size=2, ceil_mode=True)])

    def forward(self, maps: list[torch.Tensor]) -> list[torch.Tensor]:
        """Four `(batch, hidden, height, width)` to four of 4x, 2x, 1x and half the height and width (rounded up)."""
        return [layer(feature) for layer, feature in zip(self, maps, strict=True)]


class RS4DBackbone(BackboneMixin, RS4DPreTrainedModel):
    """RS4D as a backbone: maps of the layers in `out_features`, all with stride 16."""

    has_attentions = False

    def __init__(self, config: RS4DConfig) -> None:
        super().__init__(config)
        self.num_features = [config.hidden_size] * len(config.stage_names)
        self.embeddings = RS4DEmbeddings(config)
        self.encoder = RS4DEncoder(config)
        self.pooled_layernorm = _pooled_norm(config)
        self.fpn = RS4DPyramid(config.hidden_size) if config.add_fpn else None
        self.post_init()

    def _form(self, tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
        out_type = self.config.out_type
        if out_type == "avg_featmap":
            return _pool(tokens, self.pooled_layernorm)
        if out_type == "raw":
            return tokens
        maps = tokens.unflatten(1, (height, width))
        return maps if out_type == "featmap_hwc" else maps.permute(0, 3, 1, 2).contiguous()

    @can_return_tuple
    @filter_output_hidden_states
    def forward(self, pixel_values: torch.Tensor, output_hidden_states: bool | None = None, **kwargs) -> BackboneOutput:
        r"""
        Args:
            pixel_values: `(batch, num_channels, height, width)`.
            output_hidden_states: Also return the tokens of every layer (see [`RS4DModel.forward`]).

        Returns:
            `feature_maps`, one `(batch, hidden, height / 16, width / 16)` (rounded up) per layer in `out_features`, or
            what `config.out_type` and `config.add_fpn` say. The class token, if there is one, is left out.
        """
        tokens, height, width = self.embeddings(pixel_values)
        hidden_states = (tokens, *self.encoder(tokens))
        features = dict(zip(self.stage_names, hidden_states, strict=True))
        maps = [self._form(features[name][:, -height * width :], height, width) for name in self.out_features]
        if self.fpn is not None:
            maps = self.fpn(maps)
        return BackboneOutput(feature_maps=tuple(maps), hidden_states=hidden_states)


__all__ = ["RS4DBackbone", "RS4DForImageClassification", "RS4DModel", "RS4DPreTrainedModel"]
