"""vHeat (arXiv 2405.16555): a vision backbone that mixes patches by heat conduction."""

import torch
from torch import nn
from transformers.backbone_utils import BackboneMixin, filter_output_hidden_states
from transformers.modeling_outputs import (
    BackboneOutput,
    BaseModelOutputWithPoolingAndNoAttention,
    ImageClassifierOutputWithNoAttention,
)
from transformers.utils import can_return_tuple

from .configuration_vheat import VHeatConfig
from .heat_encoder import HeatEncoder, HeatStem, to_channels_first
from .heat_pretrained import HeatPreTrainedModel


class VHeatPreTrainedModel(HeatPreTrainedModel):
    config_class = VHeatConfig
    config: VHeatConfig
    base_model_prefix = "vheat"


class VHeatModel(VHeatPreTrainedModel):
    """vHeat without a head: feature maps of four stages and a pooled vector."""

    def __init__(self, config: VHeatConfig) -> None:
        super().__init__(config)
        self.stem = HeatStem(config.num_channels, config.hidden_sizes[0])
        self.encoder = HeatEncoder(config)
        self.layernorm = nn.LayerNorm(config.hidden_sizes[-1], eps=1e-5)
        self.post_init()

    @can_return_tuple
    def forward(
        self, pixel_values: torch.Tensor, output_hidden_states: bool | None = None, **kwargs
    ) -> BaseModelOutputWithPoolingAndNoAttention:
        r"""
        Args:
            pixel_values: `(batch, num_channels, height, width)`, normalised by the image processor; any size.
            output_hidden_states: Also return the stem's output and the four stages' outputs before downsampling,
                `(batch, channels, height / stride, width / stride)` with strides 4, 4, 8, 16, 32.

        Returns:
            `last_hidden_state` `(batch, channels, height / 32, width / 32)` before the final norm, and `pooler_output`
            `(batch, channels)`: the mean over positions of the normalised features.
        """
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        stem = self.stem(pixel_values)
        features = self.encoder(stem)
        pooled = self.layernorm(features[-1]).mean(dim=(1, 2))
        return BaseModelOutputWithPoolingAndNoAttention(
            last_hidden_state=features[-1].permute(0, 3, 1, 2),
            pooler_output=pooled,
            hidden_states=to_channels_first([stem, *features]) if output_hidden_states else None,
        )


class VHeatForImageClassification(VHeatPreTrainedModel):
    """vHeat with a linear classifier on the pooled features."""

    def __init__(self, config: VHeatConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.vheat = VHeatModel(config)
        self.classifier = nn.Linear(config.hidden_sizes[-1], config.num_labels)
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
            output_hidden_states: See [`VHeatModel.forward`].
        """
        outputs = self.vheat(pixel_values, output_hidden_states=output_hidden_states, return_dict=True)
        logits = self.classifier(outputs.pooler_output)
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        return ImageClassifierOutputWithNoAttention(loss=loss, logits=logits, hidden_states=outputs.hidden_states)


class VHeatBackbone(BackboneMixin, VHeatPreTrainedModel):
    """vHeat as a backbone: normalised feature maps of the stages in `out_features`, strides 4, 8, 16, 32."""

    has_attentions = False

    def __init__(self, config: VHeatConfig) -> None:
        super().__init__(config)
        self.num_features = [config.hidden_sizes[0], *config.hidden_sizes]
        self.stem = HeatStem(config.num_channels, config.hidden_sizes[0])
        self.encoder = HeatEncoder(config)
        # Only the returned maps are normalised; the trunk goes on from the plain features.
        self.hidden_states_norms = nn.ModuleDict(
            {
                name: nn.LayerNorm(channels, eps=1e-5)
                for name, channels in zip(self.out_features, self.channels, strict=True)
            }
        )
        self.post_init()

    @can_return_tuple
    @filter_output_hidden_states
    def forward(self, pixel_values: torch.Tensor, output_hidden_states: bool | None = None, **kwargs) -> BackboneOutput:
        r"""
        Args:
            pixel_values: `(batch, num_channels, height, width)`.
            output_hidden_states: Also return the features before the norms (see [`VHeatModel.forward`]).

        Returns:
            `feature_maps`, one `(batch, channels, height / stride, width / stride)` per stage in `out_features`.
        """
        stem = self.stem(pixel_values)
        features = dict(zip(self.stage_names, [stem, *self.encoder(stem)], strict=True))
        maps = [self.hidden_states_norms[name](features[name]) for name in self.out_features]
        return BackboneOutput(
            feature_maps=to_channels_first(maps), hidden_states=to_channels_first(list(features.values()))
        )


__all__ = ["VHeatBackbone", "VHeatForImageClassification", "VHeatModel", "VHeatPreTrainedModel"]
