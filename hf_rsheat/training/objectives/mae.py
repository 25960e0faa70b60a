"""Masked autoencoder pretraining (arXiv 2111.06377) with transformers' ViTMAE: the baseline of SelectiveMAE."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel, ViTMAEConfig, ViTMAEForPreTraining

from ...errors import ConfigurationError
from ...models.configuration_selective_mae import SelectiveMAEConfig
from ...models.image_processing_selective_mae import SelectiveMAEImageProcessor
from ...models.modeling_selective_mae import SelectiveMAEModel
from ...models.selective_mae_layers import patchify, sincos_table
from ...patch_figures import patch_views
from ..augmentation import Geometry
from ..batching import stack
from ..data import Batch
from ..image_folder import DecodedSample, check_modalities
from ..manifest import find_scenes
from ..normalization import denormalize, normalize, resolve_processor
from ..recipe import Recipe
from ..starting_point import resolve_config, resolve_model
from .base import Objective, Terms
from .selective_mae import MODALITY, MaskedAutoencoderOptions

_SHARED_FIELDS = (
    "image_size",
    "patch_size",
    "num_channels",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "hidden_act",
    "qkv_bias",
    "layer_norm_eps",
)


class MAEPretraining(Objective):
    """Reconstruction of all masked patches; one term, `reconstruction`, with one addend per image.

    Checkpoints hold transformers' `ViTMAEForPreTraining`. The exported folder holds the encoder as a
    [`SelectiveMAEModel`], the same Vision Transformer, since `ViTMAEModel` masks its input and pools nothing: it can be
    evaluated and fine-tuned like the model it is compared with.
    """

    Options = MaskedAutoencoderOptions
    every_parameter_every_step = True
    addends_per_image = True
    reads_manifest = True
    reads_dataset = True

    def __init__(self, recipe: Recipe, checkpoint: Path | None = None) -> None:
        super().__init__(recipe, checkpoint)
        if recipe.model_fields.get("model_type", "vit_mae") != "vit_mae":
            raise ConfigurationError("objective 'mae' trains model_type 'vit_mae': remove model.model_type.")
        self.config: ViTMAEConfig = resolve_config(ViTMAEConfig, recipe, checkpoint)
        patch_size = self.config.patch_size
        fits = self.config.image_size == recipe.image_size
        if not (fits and isinstance(patch_size, int) and recipe.image_size % patch_size == 0):
            raise ConfigurationError(
                f"A ViTMAE of {self.config.image_size} px with patches of {patch_size} px cannot train at "
                f"{recipe.image_size} px: set image_size to a multiple of the patch and to that of the model."
            )
        channels = {MODALITY: self.config.num_channels}
        check_modalities(channels)
        self.processor = resolve_processor(SelectiveMAEImageProcessor, recipe, checkpoint, channels)
        self.samples = find_scenes(recipe, self.source, [MODALITY], MODALITY)
        self._patch_size, self._side = patch_size, recipe.image_size // patch_size

    def build_model(self) -> PreTrainedModel:
        model: Any = resolve_model(ViTMAEForPreTraining, self.config, self.recipe, self.checkpoint)
        if self.checkpoint is None and self.recipe.pretrained is None:
            initialize(model, self._side)
        for table in (model.vit.embeddings.position_embeddings, model.decoder.decoder_pos_embed):
            table.requires_grad_(False)  # transformers' loader makes them trainable
        return model

    def exported(self, model: PreTrainedModel) -> PreTrainedModel:
        return encoder_of(model)

    def channels(self, modality: str) -> int:
        return self.config.num_channels

    def prepare(self, sample: DecodedSample, rng: np.random.Generator) -> Batch:
        ((modality, image),) = sample.images.items()
        view = Geometry.draw(rng, self.options.crop_scale).apply(image, self.recipe.image_size)
        noise = torch.from_numpy(rng.random(self._side**2, dtype=np.float32))
        return {"pixel_values": normalize(self.processor, view, modality), "noise": noise}

    def collate(self, samples: list[Batch]) -> Batch:
        return {name: stack([sample[name] for sample in samples]) for name in ("pixel_values", "noise")}

    @property
    def term_weights(self) -> dict[str, float]:
        return {"reconstruction": 1.0}

    def counts(self, batch: Batch) -> dict[str, int]:
        return {"reconstruction": len(batch["pixel_values"])}

    def loss(self, model: nn.Module, batch: Batch, step: int) -> Terms:
        output = model(**batch)
        patches = patchify(batch["pixel_values"], self._patch_size)
        losses = loss_per_image(patches, output.logits, output.mask, self.config.norm_pix_loss)
        return {"reconstruction": (losses, len(losses))}

    def picture(self, model: nn.Module, batch: Batch) -> list[torch.Tensor]:
        """Input, encoded patches, and these with the reconstructed ones."""
        output, pixel_values = model(**batch), batch["pixel_values"]
        masked = output.mask.bool()
        views = patch_views(
            pixel_values, self._patch_size, ~masked, masked, output.logits, standardised=self.config.norm_pix_loss
        )
        shown = (pixel_values, views.encoded, views.restored)
        return [denormalize(self.processor, view, MODALITY) for view in shown]


def loss_per_image(
    patches: torch.Tensor, logits: torch.Tensor, mask: torch.Tensor, norm_pix_loss: bool
) -> torch.Tensor:
    """What ViTMAE's loss is the mean of, since transformers returns the mean only.

    Args:
        patches: The images as `patchify` cuts them, `(batch, patches, patch_size**2 * channels)`.
        logits: Predicted patches of the same shape.
        mask: 1 where a patch was masked, `(batch, patches)`; equally many in every image.
        norm_pix_loss: Whether each patch is standardised first.

    Returns:
        Mean squared error over the masked patches, float32 `(batch,)`.
    """
    if norm_pix_loss:
        patches = (patches - patches.mean(-1, keepdim=True)) / (patches.var(-1, keepdim=True) + 1e-6).sqrt()
    errors = (logits.float() - patches).square().mean(-1)
    return (errors * mask).sum(1) / mask.sum(1)


@torch.no_grad()
def initialize(model: Any, side: int) -> None:
    """Give a new ViTMAE of `side * side` patches MAE's fixed positions, mask token and weights (appendix A.1).

    transformers (seen in 5.23) leaves both position tables of a model that is not loaded at zero, and freezes them:
    such a model could not tell one patch from another. Its weights have a spread of 0.02 at any width, where MAE takes
    Xavier's uniform ones.
    """
    for table in (model.vit.embeddings.position_embeddings, model.decoder.decoder_pos_embed):
        table[:, 0] = 0
        table[:, 1:] = sincos_table(side, side, table.shape[-1])
    model.decoder.mask_token.normal_(std=model.config.initializer_range)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)


def encoder_of(model: Any) -> SelectiveMAEModel:
    """The encoder of a ViTMAE as our model, with copies of its weights."""
    fields = {name: getattr(model.config, name) for name in _SHARED_FIELDS}
    names = (("embeddings.patch_embeddings.", "embeddings."), ("layers.", "encoder.layers."))
    state = {}
    for name, value in model.vit.state_dict().items():
        for theirs, ours in names:
            if name.startswith(theirs):
                name = ours + name.removeprefix(theirs)
        state[name] = value
    encoder = SelectiveMAEModel(SelectiveMAEConfig(**fields))
    encoder.load_state_dict(state)
    return encoder.eval()
