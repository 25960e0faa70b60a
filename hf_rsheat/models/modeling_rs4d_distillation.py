"""RS4D as a student of a vision encoder's feature map (arXiv 2606.25324, section on distillation).

Published: the student learns SAM's encoder with an L1 loss, from noised and masked images. Never published: the code,
the formulas, and what exactly is compared. What stands here is our reading: the student's final map against the output
of SAM's neck, which have equal shapes at every published size.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers.utils import ModelOutput, can_return_tuple

from .configuration_rs4d import RS4DConfig
from .input_corruption import corrupt
from .modeling_rs4d import RS4DModel, RS4DPreTrainedModel


@dataclass
class RS4DForDistillationOutput(ModelOutput):
    """
    Args:
        loss: Mean absolute error over all elements, scalar; only with `teacher_features`.
        loss_per_image: The same for every image, `(batch,)`.
        feature_map: The student's map `(batch, teacher_channels, height / 16, width / 16)`, sides rounded up.
        hidden_states: See [`RS4DModel.forward`].
    """

    loss: torch.Tensor | None = None
    loss_per_image: torch.Tensor | None = None
    feature_map: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None


class RS4DForDistillation(RS4DPreTrainedModel):
    """RS4D whose final map imitates a teacher's; a 1x1 projector joins them only where `teacher_channels` differs."""

    accepts_loss_kwargs = False  # the Trainer would take `**kwargs` for a promise to use its token counts

    def __init__(self, config: RS4DConfig) -> None:
        super().__init__(config)
        self.rs4d = RS4DModel(config)
        channels = config.teacher_channels or config.hidden_size
        self.projector = None if channels == config.hidden_size else nn.Conv2d(config.hidden_size, channels, 1)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        teacher_features: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
        mask_order: torch.Tensor | None = None,
        noise_ratio: float = 0.2,
        mask_ratio: float = 0.2,
        output_hidden_states: bool | None = None,
        **kwargs,
    ) -> RS4DForDistillationOutput:
        r"""
        Args:
            pixel_values: `(batch, num_channels, height, width)`, normalised by the image processor, clean.
            teacher_features: What to imitate, `(batch, teacher_channels, height / 16, width / 16)`.
            noise: Standard normal draws like `pixel_values`; no noise if `None`.
            mask_order: A permutation of the patches per image, `(batch, patches)`; no mask if `None`.
            noise_ratio: Standard deviation of the noise, as a share of that of the image.
            mask_ratio: Share of masked patches, 0 to 1.
            output_hidden_states: See [`RS4DModel.forward`].

        Raises:
            ValueError: If the teacher's map has another shape than the student's.
        """
        patch_size = self.config.patch_size
        student_input = corrupt(pixel_values, noise, mask_order, noise_ratio, mask_ratio, patch_size)
        outputs = self.rs4d(student_input, output_hidden_states=output_hidden_states, return_dict=True)
        rows, columns = (-(-size // patch_size) for size in pixel_values.shape[-2:])
        patches = outputs.last_hidden_state[:, -rows * columns :]
        feature_map = patches.transpose(1, 2).unflatten(2, (rows, columns))
        if self.projector is not None:
            feature_map = self.projector(feature_map)
        losses = None if teacher_features is None else distillation_losses(feature_map, teacher_features)
        return RS4DForDistillationOutput(
            loss=None if losses is None else losses.mean(),
            loss_per_image=losses,
            feature_map=feature_map,
            hidden_states=outputs.hidden_states,
        )


def distillation_losses(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Mean absolute difference of two maps `(batch, channels, height, width)` per image, in float32, `(batch,)`.

    Raises:
        ValueError: If their shapes differ.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"The student's map is {tuple(student.shape)}, the teacher's {tuple(teacher.shape)}: `teacher_channels` "
            "sets the channels, and both need images of the size at which their grids agree."
        )
    return (student.float() - teacher.float()).abs().mean(dim=(1, 2, 3))


__all__ = ["RS4DForDistillation", "RS4DForDistillationOutput"]
