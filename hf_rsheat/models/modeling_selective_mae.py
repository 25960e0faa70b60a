"""SelectiveMAE (arXiv 2406.11933): a ViT pretrained by encoding 15 % and reconstructing 25 % of the patches."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import initialization as init
from transformers.backbone_utils import BackboneMixin, filter_output_hidden_states
from transformers.modeling_outputs import BackboneOutput, BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.utils import ModelOutput, can_return_tuple

from .configuration_selective_mae import SelectiveMAEConfig
from .hog_scores import hog_scores
from .input_channels import ChannelAdaptingModel
from .selective_mae_layers import (
    SelectiveMAEDecoder,
    SelectiveMAEEmbeddings,
    SelectiveMAEEncoder,
    pad_to_patches,
    patchify,
    sincos_table,
)
from .token_selection import SelectionStage, TokenSelection, fixed_draws, select_tokens, stage_at, token_mask


@dataclass
class SelectiveMAEForPreTrainingOutput(ModelOutput):
    """
    Args:
        loss: Mean of `loss_per_image`, scalar.
        loss_per_image: Mean squared error over the reconstructed pixels, `(batch,)`, float32.
        logits: Predicted pixels of the reconstructed patches, `(batch, reconstructed, patch_size**2 * channels)`, each
            patch ordered row, column, channel; standardised per patch with `config.norm_pix_loss`.
        last_hidden_state: Encoder output after the final norm, `(batch, 1 + encoded, hidden_size)`: class token first.
        encode_ids: Encoded patches in the order of selection, `(batch, encoded)`.
        reconstruct_ids: Reconstructed patches, ascending, `(batch, reconstructed)`.
        mask: Bool `(batch, patches)`, true where reconstructed.
    """

    loss: torch.Tensor | None = None
    loss_per_image: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    last_hidden_state: torch.Tensor | None = None
    encode_ids: torch.Tensor | None = None
    reconstruct_ids: torch.Tensor | None = None
    mask: torch.Tensor | None = None


class SelectiveMAEPreTrainedModel(ChannelAdaptingModel):
    config_class = SelectiveMAEConfig
    config: SelectiveMAEConfig
    base_model_prefix = "selective_mae"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # the Trainer would take `**kwargs` for a promise to use its token counts
    _no_split_modules = ["SelectiveMAELayer", "SelectiveMAEDecoderLayer"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):
            fan_out, fan_in = module.weight.flatten(1).shape
            limit = math.sqrt(6 / (fan_in + fan_out))  # Xavier, on patches as flat vectors
            init.uniform_(module.weight, -limit, limit)
            init.uniform_(module.bias, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))
        elif isinstance(module, nn.Linear):
            if module is getattr(self, "classifier", None):
                init.trunc_normal_(module.weight, std=2e-5)
            else:
                init.xavier_uniform_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, SelectiveMAEEmbeddings):
            rows, columns = module.stored_grid
            table = sincos_table(rows, columns, module.position_embeddings.shape[-1])
            init.copy_(module.position_embeddings, nn.functional.pad(table, (0, 0, 1, 0)))
            init.normal_(module.cls_token, std=self.config.initializer_range)
        elif isinstance(module, SelectiveMAEDecoder):
            rows, columns = module.stored_grid
            table = sincos_table(rows, columns, module.position_embeddings.shape[-1])
            init.copy_(module.position_embeddings, table)
            init.normal_(module.mask_token, std=self.config.initializer_range)

    def _wants_attentions(self, output_attentions: bool | None) -> bool:
        wanted = self.config.output_attentions if output_attentions is None else output_attentions
        if wanted and self.config._attn_implementation != "eager":
            raise ValueError(
                f"Attention weights do not exist with attn_implementation={self.config._attn_implementation!r}: load "
                'the model with attn_implementation="eager".'
            )
        return wanted


class SelectiveMAEModel(SelectiveMAEPreTrainedModel):
    """The ViT encoder on all patches, without a head."""

    def __init__(self, config: SelectiveMAEConfig) -> None:
        super().__init__(config)
        self.embeddings = SelectiveMAEEmbeddings(config)
        self.encoder = SelectiveMAEEncoder(config)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        r"""
        Args:
            pixel_values: `(batch, num_channels, height, width)`, normalised by the image processor; any size. What is
                missing to whole patches is filled with zeros.
            output_hidden_states: Also return the embeddings and the output of each layer.
            output_attentions: Also return each layer's attention weights `(batch, heads, tokens, tokens)`; needs
                `attn_implementation="eager"`.

        Returns:
            `last_hidden_state` `(batch, 1 + patches, hidden_size)`, class token first, and `pooler_output`
            `(batch, hidden_size)`: the normalised class token; with `config.use_mean_pooling` the norm of the mean over
            patches, and `last_hidden_state` is not normalised then.
        """
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        wants_attentions = self._wants_attentions(output_attentions)
        patches, _ = self.embeddings.patches(pixel_values)
        tokens = torch.cat((self.embeddings.class_token(patches.shape[0], with_position=True), patches), dim=1)
        last, hidden_states, attentions = self.encoder(tokens, keep_all=output_hidden_states or wants_attentions)
        if self.config.use_mean_pooling:
            pooled = self.layernorm(last[:, 1:].mean(dim=1))
        else:
            last = self.layernorm(last)
            pooled = last[:, 0]
        return BaseModelOutputWithPooling(
            last_hidden_state=last,
            pooler_output=pooled,
            hidden_states=hidden_states if output_hidden_states else None,
            attentions=attentions if wants_attentions else None,
        )


class SelectiveMAEForPreTraining(SelectiveMAEPreTrainedModel):
    """Masked autoencoder with selected tokens: the encoder sees few patches, the decoder restores some of the others.

    In eval mode nothing is random: without a generator or injected draws, everything that training draws is spread
    evenly, so that losses of two checkpoints can be compared.
    """

    def __init__(self, config: SelectiveMAEConfig) -> None:
        super().__init__(config)
        self.selective_mae = SelectiveMAEModel(config)
        self.decoder = SelectiveMAEDecoder(config)
        self.post_init()
        self._freeze_positions()

    def _freeze_positions(self) -> None:
        for module in (self.selective_mae.embeddings, self.decoder):
            module.position_embeddings.requires_grad_(False)

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """As in transformers; its loader makes every parameter trainable again, which the fixed positions are not."""
        loaded = super().from_pretrained(*args, **kwargs)
        (loaded[0] if isinstance(loaded, tuple) else loaded)._freeze_positions()
        return loaded

    def stage(self, epoch: float | None = None, progress: float | None = None) -> SelectionStage:
        """The stage of the schedule at an epoch of `config.total_epochs`, or at a share of training, 0 to 1.

        Without either it is the last stage, random.
        """
        if epoch is not None and progress is not None:
            raise ValueError("Pass `epoch` or `progress`, not both.")
        if progress is not None:
            if not 0 <= progress <= 1:
                raise ValueError(f"`progress` is a share of training, 0 to 1, got {progress}.")
            epoch = progress * self.config.total_epochs
        if epoch is None:
            return SelectionStage("random")
        return stage_at(epoch, self.config.total_epochs, self.config.smooth_epochs)

    def _select(
        self,
        tokens: torch.Tensor,
        pixel_values: torch.Tensor,
        stage: SelectionStage,
        draws: dict,
        generator: torch.Generator | None,
    ) -> TokenSelection:
        config = self.config
        ratios = (1 - config.mask_ratio, config.kept_mask_ratio)
        scores = None
        if config.criterion == "hog":
            scores = hog_scores(pad_to_patches(pixel_values, config.patch_size), config.patch_size)
        if not self.training and generator is None:
            fixed = fixed_draws(tokens.shape[0], tokens.shape[1], stage, *ratios, device=tokens.device)
            if scores is not None:
                fixed = {"permutations": fixed["permutations"]}  # the others follow from the scores
            draws = {**fixed, **{name: value for name, value in draws.items() if value is not None}}
        return select_tokens(tokens, stage, *ratios, config.criterion, scores=scores, generator=generator, **draws)

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        epoch: float | None = None,
        progress: float | None = None,
        seed_ids: torch.Tensor | None = None,
        permutations: Sequence[torch.Tensor] | None = None,
        reconstruct_ids: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        reconstruct_choice: torch.Tensor | None = None,
        **kwargs,
    ) -> SelectiveMAEForPreTrainingOutput:
        r"""
        Args:
            pixel_values: `(batch, num_channels, height, width)`, normalised; any size.
            epoch: Where training stands, in epochs of `config.total_epochs` (0 to 800 in the original).
            progress: The same as a share of training, 0 to 1. Without either the last stage is used.
                Under `torch.compile` every new value within a transition compiles anew (5 % of training).
            seed_ids: Seed patches `(batch, seeds)`; drawn if `None`.
            permutations: The permutations of the two rounds in the random stages; drawn if `None`.
            reconstruct_ids: Patches to reconstruct `(batch, n)`, any number of them; chosen if `None`.
            generator: Source of what is drawn, on the device of the model.
            reconstruct_choice: Positions among the patches that are not encoded, instead of `reconstruct_ids`; see
                [`select_tokens`].
        """
        embeddings = self.selective_mae.embeddings
        tokens, grid = embeddings.patches(pixel_values)
        draws = {"seed_ids": seed_ids, "permutations": permutations, "reconstruct_choice": reconstruct_choice}
        selection = self._select(tokens, pixel_values, self.stage(epoch, progress), draws, generator)
        if reconstruct_ids is not None:
            ids = reconstruct_ids.to(tokens.device, torch.int64).sort(dim=1).values
            selection = selection._replace(reconstruct_ids=ids, mask=token_mask(ids, tokens.shape[1]))
        visible = tokens.gather(1, selection.encode_ids[..., None].expand(-1, -1, tokens.shape[-1]))
        visible = torch.cat((embeddings.class_token(tokens.shape[0], with_position=False), visible), dim=1)
        encoded = self.selective_mae.layernorm(self.selective_mae.encoder(visible)[0])
        logits = self.decoder(encoded, selection.reconstruct_ids, grid)
        losses = self._losses(pixel_values, logits, selection.reconstruct_ids)
        return SelectiveMAEForPreTrainingOutput(
            loss=losses.mean(),
            loss_per_image=losses,
            logits=logits,
            last_hidden_state=encoded,
            encode_ids=selection.encode_ids,
            reconstruct_ids=selection.reconstruct_ids,
            mask=selection.mask,
        )

    def _losses(self, pixel_values: torch.Tensor, logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Mean squared error per image `(batch,)`."""
        patches = patchify(pad_to_patches(pixel_values, self.config.patch_size), self.config.patch_size)
        target = patches.gather(1, ids[..., None].expand(-1, -1, patches.shape[-1])).float()
        if self.config.norm_pix_loss:
            target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
        return (logits.float() - target).square().mean(dim=(1, 2))


class SelectiveMAEForImageClassification(SelectiveMAEPreTrainedModel):
    """The encoder with a linear classifier on the class token, or on the mean over patches (`use_mean_pooling`)."""

    def __init__(self, config: SelectiveMAEConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.selective_mae = SelectiveMAEModel(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs,
    ) -> ImageClassifierOutput:
        r"""
        Args:
            pixel_values: `(batch, num_channels, height, width)`.
            labels: Class indices `(batch,)` (or multi-hot floats `(batch, num_labels)` with
                `config.problem_type="multi_label_classification"`).
            output_hidden_states, output_attentions: See [`SelectiveMAEModel.forward`].
        """
        outputs = self.selective_mae(
            pixel_values,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            return_dict=True,
        )
        logits = self.classifier(outputs.pooler_output)
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        return ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class SelectiveMAEBackbone(BackboneMixin, SelectiveMAEPreTrainedModel):
    """The encoder as a backbone: feature maps of the layers in `out_features`, all at the stride of the patches.

    The original's detection code leaves out the class token altogether; here the layers see it, as in pretraining.
    """

    def __init__(self, config: SelectiveMAEConfig) -> None:
        super().__init__(config)
        self.num_features = [config.hidden_size] * (config.num_hidden_layers + 1)
        self.embeddings = SelectiveMAEEmbeddings(config)
        self.encoder = SelectiveMAEEncoder(config)
        self.layernorm = (
            nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if config.apply_layernorm else nn.Identity()
        )
        self.post_init()

    @can_return_tuple
    @filter_output_hidden_states
    def forward(
        self,
        pixel_values: torch.Tensor,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs,
    ) -> BackboneOutput:
        r"""
        Args:
            pixel_values: `(batch, num_channels, height, width)`.
            output_hidden_states, output_attentions: See [`SelectiveMAEModel.forward`].

        Returns:
            `feature_maps`, one `(batch, hidden_size, height / patch_size, width / patch_size)` per stage in
            `out_features`, sides rounded up.
        """
        wants_attentions = self._wants_attentions(output_attentions)
        patches, grid = self.embeddings.patches(pixel_values)
        tokens = torch.cat((self.embeddings.class_token(patches.shape[0], with_position=True), patches), dim=1)
        _, hidden_states, attentions = self.encoder(tokens, keep_all=True)
        features = dict(zip(self.stage_names, hidden_states, strict=True))
        maps = tuple(
            self.layernorm(features[name])[:, 1:].transpose(1, 2).unflatten(2, grid) for name in self.out_features
        )
        return BackboneOutput(
            feature_maps=maps, hidden_states=hidden_states, attentions=attentions if wants_attentions else None
        )


__all__ = [
    "SelectiveMAEBackbone",
    "SelectiveMAEForImageClassification",
    "SelectiveMAEForPreTraining",
    "SelectiveMAEForPreTrainingOutput",
    "SelectiveMAEModel",
    "SelectiveMAEPreTrainedModel",
]
