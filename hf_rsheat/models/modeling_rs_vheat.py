"""RS-vHeat (arXiv 2411.17984): heat conduction with a heat-capacity correction and one stem per sensor."""

import torch
from torch import nn
from transformers.backbone_utils import BackboneMixin, filter_output_hidden_states
from transformers.modeling_outputs import (
    BackboneOutput,
    BaseModelOutputWithPoolingAndNoAttention,
    ImageClassifierOutputWithNoAttention,
)
from transformers.utils import can_return_tuple

from .configuration_rs_vheat import RSVHeatConfig
from .frequency_masking import frequency_mask
from .heat_encoder import HeatEncoder, HeatStem, to_channels_first
from .heat_pretrained import HeatPreTrainedModel
from .rs_vheat_pretraining import (
    RSVHeatDecoder,
    RSVHeatForPreTrainingOutput,
    contrastive_losses,
    reconstruction_losses,
)


class RSVHeatPreTrainedModel(HeatPreTrainedModel):
    config_class = RSVHeatConfig
    config: RSVHeatConfig
    base_model_prefix = "rs_vheat"

    def _modality(self, modality: str | None) -> str:
        modality = modality or self.config.default_modality
        if modality not in self.config.modalities:
            raise ValueError(f"Unknown modality {modality!r}; this model has {list(self.config.modalities)}.")
        return modality


def _stems(config: RSVHeatConfig) -> nn.ModuleDict:
    dim = config.hidden_sizes[0]
    return nn.ModuleDict({name: HeatStem(channels, dim) for name, channels in config.modalities.items()})


class RSVHeatModel(RSVHeatPreTrainedModel):
    """RS-vHeat without a head: one stem per modality, a shared trunk, a pooled vector."""

    def __init__(self, config: RSVHeatConfig) -> None:
        super().__init__(config)
        self.stems = _stems(config)
        self.encoder = HeatEncoder(config)
        self.layernorm = nn.LayerNorm(config.hidden_sizes[-1], eps=1e-5)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        modality: str | None = None,
        output_hidden_states: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPoolingAndNoAttention:
        r"""
        Args:
            pixel_values: `(batch, channels of the modality, height, width)`, normalised; any size.
            modality: Sensor of the images, a key of `config.modalities`; "optical" (or the only one) if `None`.
            output_hidden_states: Also return the stem's output and the four stages' outputs before downsampling,
                `(batch, channels, height / stride, width / stride)` with strides 4, 4, 8, 16, 32.

        Returns:
            `last_hidden_state` `(batch, channels, height / 32, width / 32)` before the final norm, and `pooler_output`
            `(batch, channels)`: the mean over positions of the normalised features.
        """
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        stem = self.stems[self._modality(modality)](pixel_values)
        features = self.encoder(stem)
        pooled = self.layernorm(features[-1]).mean(dim=(1, 2))
        return BaseModelOutputWithPoolingAndNoAttention(
            last_hidden_state=features[-1].permute(0, 3, 1, 2),
            pooler_output=pooled,
            hidden_states=to_channels_first([stem, *features]) if output_hidden_states else None,
        )


class RSVHeatForPreTraining(RSVHeatPreTrainedModel):
    """Frequency-domain hierarchical masking: reconstruct images from their low-cut and high-cut halves.

    Optical-only, SAR-only and paired batches all work; the contrastive term exists only for pairs. Fusion, decoder and
    contrastive features are our reading of an unpublished part, see [`RSVHeatDecoder`].
    """

    def __init__(self, config: RSVHeatConfig) -> None:
        super().__init__(config)
        self.rs_vheat = RSVHeatModel(config)
        self.decoder = RSVHeatDecoder(config)
        self.post_init()

    def _mask_radius(self, mask_radius: float | torch.Tensor | None, batch: int) -> float | torch.Tensor:
        if mask_radius is not None:
            return mask_radius
        low, high = self.config.mask_radius_range
        return torch.empty(batch).uniform_(low, high) if self.training else (low + high) / 2

    def _reconstruct(
        self, pixel_values: torch.Tensor, modality: str, radius: float | torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """The reconstruction, the last stage's features `(2 * batch, h, w, c)`, and the two masked images."""
        low_cut, high_cut, _, _ = frequency_mask(pixel_values, radius)
        features = self.rs_vheat.encoder(self.rs_vheat.stems[modality](torch.cat((low_cut, high_cut))))
        reconstruction = self.decoder(features[-2], features[-1], modality, *pixel_values.shape[-2:])
        return reconstruction, features[-1], low_cut, high_cut

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        modality: str | None = None,
        paired_pixel_values: torch.Tensor | None = None,
        paired_modality: str = "sar",
        mask_radius: float | torch.Tensor | None = None,
        **kwargs,
    ) -> RSVHeatForPreTrainingOutput:
        r"""
        Args:
            pixel_values: `(batch, channels, height, width)`, normalised.
            modality: Sensor of `pixel_values`; "optical" (or the only one) if `None`.
            paired_pixel_values: Images of the same places by another sensor, `(batch, other channels, height, width)`.
            paired_modality: Sensor of the pair.
            mask_radius: Share of the padded spectrum's diagonal, a number or one per image `(batch,)`. If `None`, drawn
                from `config.mask_radius_range` in training and the middle of that range otherwise.
        """
        modality = self._modality(modality)
        radius = self._mask_radius(mask_radius, pixel_values.shape[0])
        reconstruction, features, low_cut, high_cut = self._reconstruct(pixel_values, modality, radius)
        spatial, frequency = reconstruction_losses(reconstruction, pixel_values)
        paired_reconstruction = contrastive = None
        if paired_pixel_values is not None:
            paired_modality = self._modality(paired_modality)
            paired_reconstruction, paired_features, _, _ = self._reconstruct(
                paired_pixel_values, paired_modality, radius
            )
            paired_losses = reconstruction_losses(paired_reconstruction, paired_pixel_values)
            spatial, frequency = torch.cat((spatial, paired_losses[0])), torch.cat((frequency, paired_losses[1]))
            contrastive = contrastive_losses(features, paired_features)
        config = self.config
        loss = config.spatial_loss_weight * spatial.mean() + config.frequency_loss_weight * frequency.mean()
        if contrastive is not None:
            loss = loss + config.contrastive_loss_weight * contrastive.mean()
        return RSVHeatForPreTrainingOutput(
            loss=loss,
            spatial_loss=spatial,
            frequency_loss=frequency,
            contrastive_loss=contrastive,
            reconstruction=reconstruction,
            paired_reconstruction=paired_reconstruction,
            low_cut=low_cut,
            high_cut=high_cut,
        )


class RSVHeatForImageClassification(RSVHeatPreTrainedModel):
    """RS-vHeat with a linear classifier on the pooled features."""

    def __init__(self, config: RSVHeatConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.rs_vheat = RSVHeatModel(config)
        self.classifier = nn.Linear(config.hidden_sizes[-1], config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        modality: str | None = None,
        labels: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        **kwargs,
    ) -> ImageClassifierOutputWithNoAttention:
        r"""
        Args:
            pixel_values: `(batch, channels of the modality, height, width)`.
            modality: Sensor of the images; "optical" (or the only one) if `None`.
            labels: Class indices `(batch,)` (or multi-hot floats `(batch, num_labels)` with
                `config.problem_type="multi_label_classification"`).
            output_hidden_states: See [`RSVHeatModel.forward`].
        """
        outputs = self.rs_vheat(pixel_values, modality, output_hidden_states=output_hidden_states, return_dict=True)
        logits = self.classifier(outputs.pooler_output)
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        return ImageClassifierOutputWithNoAttention(loss=loss, logits=logits, hidden_states=outputs.hidden_states)


class RSVHeatBackbone(BackboneMixin, RSVHeatPreTrainedModel):
    """RS-vHeat as a backbone: normalised feature maps of the stages in `out_features`, strides 4, 8, 16, 32."""

    has_attentions = False

    def __init__(self, config: RSVHeatConfig) -> None:
        super().__init__(config)
        self.num_features = [config.hidden_sizes[0], *config.hidden_sizes]
        self.stems = _stems(config)
        self.encoder = HeatEncoder(config)
        self.hidden_states_norms = nn.ModuleDict(
            {n: nn.LayerNorm(channels, eps=1e-5) for n, channels in zip(self.out_features, self.channels, strict=True)}
        )
        self.post_init()

    @can_return_tuple
    @filter_output_hidden_states
    def forward(
        self,
        pixel_values: torch.Tensor,
        modality: str | None = None,
        output_hidden_states: bool | None = None,
        **kwargs,
    ) -> BackboneOutput:
        r"""
        Args:
            pixel_values: `(batch, channels of the modality, height, width)`.
            modality: Sensor of the images; "optical" (or the only one) if `None`.
            output_hidden_states: Also return the features before the norms (see [`RSVHeatModel.forward`]).

        Returns:
            `feature_maps`, one `(batch, channels, height / stride, width / stride)` per stage in `out_features`.
        """
        stem = self.stems[self._modality(modality)](pixel_values)
        features = dict(zip(self.stage_names, [stem, *self.encoder(stem)], strict=True))
        maps = [self.hidden_states_norms[name](features[name]) for name in self.out_features]
        return BackboneOutput(
            feature_maps=to_channels_first(maps), hidden_states=to_channels_first(list(features.values()))
        )


__all__ = [
    "RSVHeatBackbone",
    "RSVHeatForImageClassification",
    "RSVHeatForPreTraining",
    "RSVHeatModel",
    "RSVHeatPreTrainedModel",
]
