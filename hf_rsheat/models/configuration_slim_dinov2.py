"""Configuration of a DINOv2 (arXiv 2304.07193) whose MLPs may have any hidden width."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import Dinov2Config


@strict
class SlimDinov2Config(Dinov2Config):
    r"""Configuration of [`SlimDinov2Model`]: [`Dinov2Config`], which knows whole MLP ratios only, with widths.

    Args:
        head_dim (`int`, *optional*): Width of an attention head; `hidden_size` over the number of heads if `None`.
        intermediate_size (`int`, *optional*): Hidden width of the MLPs; what `mlp_ratio` gives if `None`.
    """

    model_type = "slim_dinov2"

    head_dim: int | None = None
    intermediate_size: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.intermediate_size is None:
            self.intermediate_size = mlp_width(self)
        if min(self.head_dim, self.intermediate_size) < 1:
            raise ValueError(f"Widths must be positive, got {self.head_dim} and {self.intermediate_size}.")
        super().__post_init__(**kwargs)

    @classmethod
    def of(cls, config: Dinov2Config) -> "SlimDinov2Config":
        """The same model, not slimmed yet."""
        fields = {
            name: value for name, value in config.to_dict().items() if name not in ("model_type", "architectures")
        }
        return cls(**fields)


def mlp_width(config: Dinov2Config) -> int:
    """Hidden width of DINOv2's MLPs: hidden size times ratio; of SwiGLU two thirds of it, rounded up to eights."""
    width = int(config.hidden_size * config.mlp_ratio)
    return (int(width * 2 / 3) + 7) // 8 * 8 if config.use_swiglu_ffn else width


__all__ = ["SlimDinov2Config"]
