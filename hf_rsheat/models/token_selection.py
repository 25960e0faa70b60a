"""Which tokens a masked autoencoder encodes and which it reconstructs: SelectiveMAE's scheme (arXiv 2406.11933).

Half of the encoded tokens are seeds; two rounds then add tokens that are near the selected ones (cosine of the patch
embeddings), far from them, or random, depending on how far training has come. Of the rest a part is reconstructed and
the others are ignored. Works on `(batch, length, dim)` tokens of any backbone; plain torch, no Hugging Face imports.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

# Shares of training at which the phases "near" and "far" have ended (epochs 300 and 600 of the published 800).
NEAR_END, FAR_END = 0.375, 0.75
PHASES = ("near", "near_to_far", "far", "far_to_random", "random")
CRITERIA = ("uniform", "hog")


class SelectionStage(NamedTuple):
    """How tokens are added.

    Attributes:
        phase: One of `PHASES`.
        share: In the two mixed phases, the share of a round still chosen as in the phase before, 1 to 0.
    """

    phase: str
    share: float = 1.0


class TokenCounts(NamedTuple):
    """Numbers of seeds, of tokens added in each round, and of reconstructed tokens."""

    seeds: int
    rounds: tuple[int, int]
    reconstructed: int


class TokenSelection(NamedTuple):
    """What was selected.

    Attributes:
        encode_ids: `(batch, encoded)` in the order of selection: seeds, first round, second round.
        reconstruct_ids: `(batch, reconstructed)`, ascending; disjoint from `encode_ids`.
        mask: bool `(batch, length)`, true where reconstructed; encoded and ignored tokens are both false.
    """

    encode_ids: torch.Tensor
    reconstruct_ids: torch.Tensor
    mask: torch.Tensor


def stage_at(epoch: float, total_epochs: float = 800, smooth_epochs: float = 20) -> SelectionStage:
    """The stage at an epoch: near, far, random, with a linear transition of `smooth_epochs` before each change.

    The defaults are the original's schedule, which it applies whatever the length of training. As shares of training
    the transitions end at 0.375 and 0.75; pass the share as `epoch` with `total_epochs=1, smooth_epochs=0.025`.

    Raises:
        ValueError: For a negative epoch or a transition that is longer than its phase.
    """
    if epoch < 0 or total_epochs <= 0 or not 0 <= smooth_epochs <= (FAR_END - NEAR_END) * total_epochs:
        raise ValueError(
            "The schedule needs epoch >= 0, total_epochs > 0 and smooth_epochs of at most "
            f"{FAR_END - NEAR_END} * total_epochs, got {epoch}, {total_epochs} and {smooth_epochs}."
        )
    for end, phase, transition in ((NEAR_END, "near", "near_to_far"), (FAR_END, "far", "far_to_random")):
        begun = epoch - (end * total_epochs - smooth_epochs)
        if begun <= 0 and epoch < end * total_epochs:
            return SelectionStage(phase)
        if epoch < end * total_epochs:
            return SelectionStage(transition, 1 - begun / smooth_epochs)
    return SelectionStage("random")


def token_counts(length: int, encode_ratio: float, reconstruct_ratio: float) -> TokenCounts:
    """Counts for `length` tokens, truncated as in the original; at least one seed and one reconstructed token.

    Raises:
        ValueError: If the ratios are out of range or ask for more tokens than there are.
    """
    if not (0 < encode_ratio < 1 and 0 < reconstruct_ratio <= 1):
        raise ValueError(f"Ratios must be within (0, 1), got {encode_ratio} to encode, {reconstruct_ratio} to restore.")
    encoded = int(length * encode_ratio)
    seeds, added = encoded // 2, encoded - int(length * (encode_ratio / 2))
    if seeds == 0:  # grids of a few tokens, where the original's formula leaves nothing to start from
        seeds, added = 1, max(encoded - 1, 0)
    reconstructed = max(1, int(length * reconstruct_ratio))
    if seeds + added + reconstructed > length:
        raise ValueError(
            f"{length} tokens are too few to encode {seeds + added} and reconstruct {reconstructed}: "
            "use a larger image, smaller patches or smaller ratios."
        )
    return TokenCounts(seeds, (added // 2, added - added // 2), reconstructed)


def permutation_lengths(length: int, counts: TokenCounts, stage: SelectionStage) -> tuple[int, ...]:
    """Lengths of the permutations that the two rounds draw; none where the stage is not random."""
    if stage.phase not in ("far_to_random", "random"):
        return ()
    lengths, left = [], length - counts.seeds
    for number in counts.rounds:
        lengths.append(left - _earlier(stage, number))
        left -= number
    return tuple(lengths)


def _earlier(stage: SelectionStage, number: int) -> int:
    """How many of a round's tokens are chosen as in the phase before the current one."""
    if stage.phase in ("near", "far"):
        return number
    return 0 if stage.phase == "random" else int(stage.share * number)


@torch.no_grad()
def select_tokens(
    tokens: torch.Tensor,
    stage: SelectionStage | str,
    encode_ratio: float,
    reconstruct_ratio: float,
    criterion: str = "uniform",
    *,
    scores: torch.Tensor | None = None,
    seed_ids: torch.Tensor | None = None,
    permutations: Sequence[torch.Tensor] | None = None,
    reconstruct_choice: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
) -> TokenSelection:
    """Select the tokens to encode and to reconstruct. No gradient flows through the selection.

    Args:
        tokens: `(batch, length, dim)`, patch embeddings with positions, without a class token.
        stage: From [`stage_at`], or the name of a pure phase ("near", "far", "random").
        encode_ratio: Share of tokens to encode (1 - mask ratio).
        reconstruct_ratio: Share of tokens to reconstruct.
        criterion: "uniform" draws seeds and reconstructed tokens uniformly. This is what the original's released code
            does: its HOG score is standardised and averaged over the same axis and hence zero everywhere. "hog" is the
            method of the paper: the tokens with the highest `scores`.
        scores: `(batch, length)` importance of each token, for "hog" (see `hog_scores`).
        seed_ids: `(batch, seeds)` instead of drawn seeds.
        permutations: One `(n,)` per round, of [`permutation_lengths`], instead of drawn ones; all images share them,
            each in its own order of similarity.
        reconstruct_choice: `(batch, reconstructed)` positions among the tokens left after both rounds, as ordered by
            them, instead of drawn ones.
        generator: Source of everything that is drawn: seeds, permutations, reconstruction, in this order.

    Raises:
        ValueError: For unknown names, missing scores, ratios that do not fit, or injected draws of a wrong shape.
    """
    stage = SelectionStage(stage) if isinstance(stage, str) else stage
    _check(stage, criterion, scores)
    batch, length, _ = tokens.shape
    counts = token_counts(length, encode_ratio, reconstruct_ratio)
    ranking = scores if criterion == "hog" else None
    if seed_ids is None:
        seed_ids = _pick(batch, length, counts.seeds, ranking, tokens.device, generator)
    seed_ids = seed_ids.to(tokens.device, torch.int64)
    _check_shape("seed_ids", seed_ids, (batch, counts.seeds))
    encode_ids, left = _expand(tokens, seed_ids, counts, stage, permutations, generator)
    if reconstruct_choice is None:
        ranking = None if ranking is None else ranking.gather(1, left)
        reconstruct_choice = _pick(batch, left.shape[1], counts.reconstructed, ranking, tokens.device, generator)
    reconstruct_choice = reconstruct_choice.to(tokens.device, torch.int64)
    _check_shape("reconstruct_choice", reconstruct_choice, (batch, counts.reconstructed))
    reconstruct_ids = left.gather(1, reconstruct_choice).sort(dim=1).values
    return TokenSelection(encode_ids, reconstruct_ids, token_mask(reconstruct_ids, length))


def token_mask(ids: torch.Tensor, length: int) -> torch.Tensor:
    """Bool `(batch, length)` that is true at the given ids `(batch, n)`."""
    return torch.zeros(ids.shape[0], length, dtype=torch.bool, device=ids.device).scatter(1, ids, True)


def _check(stage: SelectionStage, criterion: str, scores: torch.Tensor | None) -> None:
    if stage.phase not in PHASES:
        raise ValueError(f"Unknown phase {stage.phase!r}; phases are {', '.join(PHASES)}.")
    if criterion not in CRITERIA:
        raise ValueError(f"Unknown criterion {criterion!r}; criteria are {', '.join(CRITERIA)}.")
    if criterion == "hog" and scores is None:
        raise ValueError("Criterion 'hog' ranks tokens by `scores`: pass hog_scores(pixel_values, patch_size).")


def _check_shape(name: str, value: torch.Tensor, shape: tuple[int, ...]) -> None:
    if tuple(value.shape) != shape:
        raise ValueError(f"`{name}` must be of shape {shape} here, got {tuple(value.shape)}.")


def _pick(
    batch: int,
    length: int,
    number: int,
    ranking: torch.Tensor | None,
    device: torch.device,
    generator: torch.Generator | None,
) -> torch.Tensor:
    """`(batch, number)` of `length` positions: the highest in the ranking, or drawn uniformly, without repetition."""
    if ranking is not None:
        return ranking.topk(number, dim=1).indices
    weights = torch.full((batch, length), 1 / length, device=device)
    return torch.multinomial(weights, number, generator=generator)


def _expand(
    tokens: torch.Tensor,
    seed_ids: torch.Tensor,
    counts: TokenCounts,
    stage: SelectionStage,
    permutations: Sequence[torch.Tensor] | None,
    generator: torch.Generator | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add tokens to the seeds; returns all selected ids and the ids that are left, in the original's order."""
    batch, length, _ = tokens.shape
    # In float64: reduced-precision modes (TF32, autocast) round it to ties, and the order would depend on the device.
    dtype = torch.float32 if tokens.device.type == "mps" else torch.float64
    directions = tokens.to(dtype)
    directions = directions / directions.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(dtype).tiny)
    selected, newest = [seed_ids], seed_ids
    left = token_mask(seed_ids, length).to(torch.uint8).argsort(dim=1, stable=True)[:, : length - counts.seeds]
    nearness = torch.full((batch, length), -torch.inf, dtype=dtype, device=tokens.device)
    for index, number in enumerate(counts.rounds):
        if number == 0:
            continue
        similarity = _rows(directions, newest) @ directions.transpose(1, 2)
        nearness = torch.maximum(nearness, similarity.amax(dim=1))
        order = left.gather(1, nearness.gather(1, left).argsort(dim=1, stable=True))
        permutation = None if permutations is None or len(permutations) == 0 else permutations[index]
        newest, left = _choose(order, number, stage, permutation, generator)
        selected.append(newest)
    return torch.cat(selected, dim=1), left


def _rows(values: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Rows `(batch, n, dim)` of `(batch, length, dim)`."""
    return values.gather(1, ids[..., None].expand(-1, -1, values.shape[-1]))


def _choose(
    order: torch.Tensor,
    number: int,
    stage: SelectionStage,
    permutation: torch.Tensor | None,
    generator: torch.Generator | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose `number` of the ids `(batch, m)` sorted from far to near; returns the chosen ones and the others."""
    available = order.shape[1]
    earlier = _earlier(stage, number)
    if stage.phase in ("near", "near_to_far", "far"):
        near = 0 if stage.phase == "far" else earlier
        far = number - near
        chosen = torch.cat((order[:, available - near :], order[:, :far]), dim=1)
        return chosen, order[:, far : available - near]
    others = available - earlier
    if permutation is None:
        permutation = torch.randperm(others, generator=generator, device=order.device)
    permutation = permutation.to(order.device, torch.int64)
    _check_shape("permutations", permutation, (others,))
    drawn, rest = permutation[: number - earlier], permutation[number - earlier :]
    if stage.phase == "far_to_random":
        rest = rest.sort().values
    chosen = torch.cat((order[:, :earlier], order[:, earlier:][:, drawn]), dim=1)
    return chosen, order[:, earlier:][:, rest]


def fixed_draws(
    batch: int,
    length: int,
    stage: SelectionStage,
    encode_ratio: float,
    reconstruct_ratio: float,
    device: torch.device | None = None,
) -> dict:
    """Keyword arguments of [`select_tokens`] for all it would draw: evenly spread, the same for all images."""
    counts = token_counts(length, encode_ratio, reconstruct_ratio)
    left = length - counts.seeds - sum(counts.rounds)
    return {
        "seed_ids": _spread(length, device)[: counts.seeds].expand(batch, -1),
        "permutations": [_spread(n, device) for n in permutation_lengths(length, counts, stage)],
        "reconstruct_choice": _spread(left, device)[: counts.reconstructed].expand(batch, -1),
    }


def _spread(length: int, device: torch.device | None) -> torch.Tensor:
    """A permutation of which every beginning is spread over the whole range (multiples of the golden ratio, ranked)."""
    steps = torch.arange(1, length + 1, dtype=torch.float32, device=device) * 0.6180339887
    return (steps % 1).argsort()
