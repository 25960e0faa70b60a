"""AdamW with the no-decay rules, and the learning rate as a pure function of the step."""

import math

import torch
from torch import nn
from torch.optim import AdamW

from .recipe import Recipe


def build_optimizer(model: nn.Module, recipe: Recipe, device: torch.device) -> AdamW:
    """AdamW in two groups: biases and other 1-D parameters do not decay, everything else does.

    The frequency embeddings and heat capacities are 3-D and decay, as in the released vHeat and RS-vHeat code.
    """
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (kept if parameter.ndim <= 1 or name.endswith(".bias") else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": float(recipe.weight_decay)}, {"params": kept, "weight_decay": 0.0}]
    # On a CPU the fused kernel gains nothing and differs in the last bit from the plain one.
    first, second = recipe.adam_betas
    return AdamW(
        groups,
        lr=float(recipe.learning_rate),
        betas=(float(first), float(second)),
        eps=float(recipe.adam_epsilon),
        fused=device.type == "cuda",
    )


def learning_rate(step: int, recipe: Recipe) -> float:
    """Learning rate of a zero-based step: linear warm-up, then a cosine from the peak to `min_learning_rate`."""
    if step < recipe.warmup_steps:
        return recipe.learning_rate * (step + 1) / recipe.warmup_steps
    progress = (step - recipe.warmup_steps) / max(1, recipe.max_steps - recipe.warmup_steps)
    span = recipe.learning_rate - recipe.min_learning_rate
    return recipe.min_learning_rate + 0.5 * span * (1 + math.cos(math.pi * progress))
