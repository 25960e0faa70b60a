"""Momentum contrast: two encoders, of which one follows the other slowly, and the keys that queries must tell apart.

MoCo v1 (He et al. 2020, arXiv 1911.05722) brings the momentum encoder and the queue, v2 (Chen et al. 2020, arXiv
2003.04297) the projector, v3 (Chen et al. 2021, arXiv 2104.02057) keys of the same batch, both directions, and the
predictor. There is no batch norm in the heads here, so that neither batch nor processes need to be shuffled or shared.
"""

import copy
import math

import torch
from accelerate import PartialState
from accelerate.utils import gather, pad_across_processes
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel


def _head(width_in: int, width_hidden: int, width_out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width_in, width_hidden), nn.ReLU(), nn.Linear(width_hidden, width_out))


class MomentumContrast(PreTrainedModel):
    """A backbone with a projector, and a momentum copy of both; the queue of keys, if there is one.

    The momentum copy and the queue are part of the state dict and so of every checkpoint. The copy is always in
    evaluation: keys are made without drop path.

    Args:
        encoder: The backbone; its pooled output `(batch, width)` is what is contrasted.
        width: Width of the pooled output.
        hidden_width: Hidden width of projector and predictor.
        key_width: Width of queries and keys.
        queue_size: Keys of earlier batches to tell queries apart from; 0 takes those of the same batch instead, and
            adds a predictor to the queries, as in MoCo v3.
    """

    supports_gradient_checkpointing = True
    # Attention is the encoder's affair, which has been asked already.
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True
    encoder: PreTrainedModel
    queue: torch.Tensor

    def __init__(
        self, encoder: PreTrainedModel, width: int, hidden_width: int, key_width: int, queue_size: int
    ) -> None:
        super().__init__(encoder.config)
        self.encoder = encoder
        self.projector = _head(width, hidden_width, key_width)
        self.predictor = nn.Identity() if queue_size else _head(key_width, hidden_width, key_width)
        self.momentum_encoder = copy.deepcopy(encoder).requires_grad_(False)
        self.momentum_projector = copy.deepcopy(self.projector).requires_grad_(False)
        self.register_buffer("queue", functional.normalize(torch.randn(queue_size, key_width), dim=-1))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: the encoders have their weights, the heads PyTorch's."""

    def train(self, mode: bool = True) -> "MomentumContrast":
        super().train(mode)
        self.momentum_encoder.eval()
        return self

    def forward(self, views: list[dict], both: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries of the first view and keys of the second; with `both` also the other way round.

        Args:
            views: Two sets of inputs of the backbone, the two views of every image.
            both: Whether each view is query and key.

        Returns:
            Queries and keys, float32 `(directions, batch, key_width)` of unit length.
        """
        directions = ((0, 1), (1, 0)) if both else ((0, 1),)
        queries = [self.predictor(self.projector(self.encoder(**views[q]).pooler_output)) for q, _ in directions]
        with torch.no_grad():
            keys = [self.momentum_projector(self.momentum_encoder(**views[k]).pooler_output) for _, k in directions]
        return _unit(queries), _unit(keys)

    @torch.no_grad()
    def follow(self, momentum: float) -> None:
        """Move the momentum copy: `copy = momentum * copy + (1 - momentum) * weights`."""
        for copied, trained in (
            (self.momentum_encoder, self.encoder),
            (self.momentum_projector, self.projector),
        ):
            torch._foreach_lerp_(list(copied.parameters()), list(trained.parameters()), 1 - momentum)

    @torch.no_grad()
    def enqueue(self, keys: torch.Tensor) -> None:
        """Append keys `(n, key_width)` to the queue; as many of the oldest leave it."""
        self.queue.copy_(torch.cat([self.queue, keys])[-len(self.queue) :])


def _unit(vectors: list[torch.Tensor]) -> torch.Tensor:
    return functional.normalize(torch.stack(vectors).float(), dim=-1)


def momentum_at(step: int, max_steps: int, first: float, last: float) -> float:
    """Momentum of a zero-based step: along half a cosine from `first` to `last`, as in MoCo v3."""
    return last - (last - first) * (1 + math.cos(math.pi * step / max_steps)) / 2


def info_nce(
    queries: torch.Tensor, positives: torch.Tensor, negatives: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy of finding each query's own key among `negatives` (MoCo, equation 1).

    Args:
        queries: `(n, width)` of unit length.
        positives: The key of each query, `(n, width)`.
        negatives: Keys of other images, `(m, width)`.
        temperature: Divides the cosine similarities.

    Returns:
        Losses `(n,)` and whether the own key was the nearest `(n,)`.
    """
    own = (queries * positives).sum(-1, keepdim=True)
    logits = torch.cat([own, queries @ negatives.T], dim=1) / temperature
    target = logits.new_zeros(len(logits), dtype=torch.long)
    return functional.cross_entropy(logits, target, reduction="none"), logits.argmax(1) == 0


def info_nce_in_batch(
    queries: torch.Tensor, keys: torch.Tensor, first: int, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same among the keys of the whole batch (MoCo v3, algorithm 1).

    Args:
        queries: This process's, `(n, width)` of unit length.
        keys: Those of all processes, `(m, width)`; that of query i is `first + i`.
        first: Keys of the processes before this one.
        temperature: Divides the cosine similarities.

    Returns:
        Losses `(n,)` and whether the own key was the nearest `(n,)`.
    """
    logits = queries @ keys.T / temperature
    target = first + torch.arange(len(queries), device=queries.device)
    return functional.cross_entropy(logits, target, reduction="none"), logits.argmax(1) == target


@torch.no_grad()
def gather_keys(keys: torch.Tensor, used: bool) -> tuple[torch.Tensor, int]:
    """The keys of all processes in the order of the global batch, and how many come before this process's.

    Args:
        keys: This process's, `(directions, n, width)`; n may differ between processes.
        used: False for those of a stand-in, which are left out.
    """
    state = PartialState()
    own = keys.shape[1] if used else 0
    if state.num_processes == 1:
        return keys[:, :own], 0
    counts = gather(torch.tensor([own], device=keys.device)).tolist()
    padded = gather(pad_across_processes(keys.transpose(0, 1).contiguous(), dim=0))
    parts = [part[:count] for part, count in zip(padded.chunk(state.num_processes), counts, strict=True)]
    return torch.cat(parts).transpose(0, 1), sum(counts[: state.process_index])
