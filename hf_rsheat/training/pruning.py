"""Data pruning without bias: epochs that leave out some of the images the model does well on.

InfoBatch (arXiv 2303.04947, ICLR 2024), as SelectiveMAE's pretraining uses it: of the samples whose latest loss is
below the mean, an epoch leaves out a share `r` at random and counts the others `1 / (1 - r)` times. The sum of the
gradients over an epoch keeps its expected value while the epoch is shorter, so that the mean gradient of a step is
larger. Towards the end of the training nothing is left out.
"""

import logging

import numpy as np
import torch
from accelerate import Accelerator

from .randomness import generator
from .recipe import Recipe
from .sampler import GlobalBatchSampler

logger = logging.getLogger(__name__)


def draw_weights(scores: np.ndarray, ratio: float, rng: np.random.Generator) -> np.ndarray:
    """How often every sample counts in an epoch; 0 leaves it out.

    Args:
        scores: Latest loss of every sample, `(samples,)`; NaN where there is none yet, which keeps the sample.
        ratio: Share of the samples below the mean loss to leave out, rounded down to whole samples.
        rng: Draws which ones.

    Returns:
        float32 `(samples,)`. Samples below the mean that stay count as often as makes up for those left out, rounding
        included, so that the expected weight of every sample is 1.
    """
    weights = np.ones(len(scores), np.float32)
    seen = np.isfinite(scores)
    if not seen.any():
        return weights
    low = np.flatnonzero(seen & (scores < scores[seen].mean(dtype=np.float64)))
    left_out = rng.choice(low, int(len(low) * ratio), replace=False)
    weights[low] = len(low) / max(1, len(low) - len(left_out))
    weights[left_out] = 0
    return weights


class Pruning:
    """The losses of all samples, and what they decide: which samples an epoch holds and how much each counts.

    All processes hold the same scores when an epoch is drawn, so they draw the same.

    Args:
        sampler: Told at the start of every epoch which samples it holds.
        samples: Number of samples.
        recipe: Its `prune_ratio` and `prune_until`; epochs that would reach beyond the latter hold all samples.
    """

    def __init__(self, sampler: GlobalBatchSampler, samples: int, recipe: Recipe) -> None:
        self._sampler = sampler
        self._ratio = float(recipe.prune_ratio)
        self._last_step = recipe.prune_until * recipe.max_steps
        self._seed = recipe.seed
        self._start = (0, 0)
        self._pending: list[tuple[list[int], torch.Tensor]] = []
        self.scores = np.full(samples, np.nan, np.float32)
        self.weights = np.ones(samples, np.float32)

    def plan(self, step: int) -> int:
        """Begin an epoch where one is due.

        Returns:
            The step at which this has to be called again, since the samples of that step follow from losses still to
            come: nothing may be read beyond it before.
        """
        epoch, position = self._sampler.locate(step)
        if position == 0:
            self._begin(epoch, step)
        return self._sampler.end_of_epoch(step)

    def _begin(self, epoch: int, step: int) -> None:
        self._start = (epoch, step)
        self.weights = draw_weights(self.scores, self._ratio, generator("pruning", self._seed, epoch))
        self._sampler.begin(epoch, step, self.weights > 0)
        if self._sampler.end_of_epoch(step) > self._last_step:
            self.weights = np.ones_like(self.weights)
            self._sampler.begin(epoch, step, self.weights > 0)
        kept = int(np.count_nonzero(self.weights))
        logger.debug("Epoch %d: %d of %d samples.", epoch, kept, len(self.weights))

    def weights_of(self, indices: list[int], device: torch.device) -> torch.Tensor:
        """How much the samples of a batch count, float32 `(samples,)`."""
        return torch.from_numpy(self.weights[indices]).to(device)

    def record(self, indices: list[int], losses: torch.Tensor) -> None:
        """Note this process's losses `(samples,)`; they stay on the device until `gather`."""
        self._pending.append((indices, losses.detach()))

    def gather(self, accelerator: Accelerator) -> None:
        """Share the losses noted since the last time; called on every process, at least once an epoch."""
        found = torch.zeros(2, len(self.scores))
        for indices, losses in self._pending:
            found[0, indices] = losses.float().cpu()
            found[1, indices] = 1
        self._pending.clear()
        # Each sample is on one process only, so that the sums are exact.
        scores, seen = accelerator.reduce(found.to(accelerator.device), "sum").cpu().numpy()
        self.scores = np.where(seen > 0, scores, self.scores)

    def state(self) -> dict[str, torch.Tensor]:
        """What a checkpoint keeps."""
        return {
            "scores": torch.from_numpy(self.scores),
            "weights": torch.from_numpy(self.weights),
            "start": torch.tensor(self._start),
        }

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """Continue in the epoch of a checkpoint, with the samples it drew."""
        self.scores, self.weights = state["scores"].numpy(), state["weights"].numpy()
        epoch, step = state["start"].tolist()
        self._start = (epoch, step)
        self._sampler.begin(epoch, step, self.weights > 0)
