"""How strongly a student's input is corrupted at which step: pure functions, and one small state.

The paper of RS4D (arXiv 2606.25324) calls its noise and masking adaptive; neither formula nor schedule was published.
The names of the authors' logs give ratios of 0, 10, 20 and 30 % and call 20 % noise with 20 % masking the default.
Everything else here is ours.

A schedule gives a *strength*, which multiplies both ratios: 1 means the ratios as they were set.
"""

from dataclasses import dataclass
from typing import Literal

from huggingface_hub.dataclasses import strict

Kind = Literal["constant", "linear", "adaptive"]


@dataclass(frozen=True)
class AdaptiveState:
    """What the adaptive schedule remembers.

    Args:
        strength: The strength now.
        total: Sum of the losses of the current window.
        steps: Their number.
        previous: Mean loss of the window before; None in the first.
    """

    strength: float = 1.0
    total: float = 0.0
    steps: int = 0
    previous: float | None = None


@strict
@dataclass(kw_only=True)
class CorruptionSchedule:
    """The strength of noise and masks over a run.

    Args:
        schedule: `constant`: 1 throughout. `linear`: from the low to the high end of `strength_range` over the run.
            `adaptive`: starts at 1; after each window of steps it goes up if the mean loss has fallen by more than
            `adaptive_fall` since the window before, and down if not, within `strength_range`.
        strength_range: Bounds of the strength; the default leads from 10 % to 30 % where 20 % was set, the span of the
            published runs.
        adaptive_window: Steps over which losses are averaged.
        adaptive_change: What a window adds to or takes from the strength.
        adaptive_fall: Relative fall of the loss that counts as falling; less is a stall.
    """

    schedule: Kind = "constant"
    strength_range: tuple[float | int, float | int] = (0.5, 1.5)
    adaptive_window: int = 50
    adaptive_change: float | int = 0.1
    adaptive_fall: float | int = 0.01

    def validate_strength_range(self) -> None:
        low, high = self.strength_range
        if not 0 <= low <= 1 <= high:
            raise ValueError(f"'strength_range' must be low <= 1 <= high, low at least 0, got {[low, high]}")

    def validate_adaptive(self) -> None:
        if self.adaptive_window < 1:
            raise ValueError(f"'adaptive_window' must be at least 1 step, got {self.adaptive_window}")
        if not self.adaptive_change > 0:
            raise ValueError(f"'adaptive_change' must be positive, got {self.adaptive_change}")
        if not 0 <= self.adaptive_fall < 1:
            raise ValueError(f"'adaptive_fall' must be in [0, 1), got {self.adaptive_fall}")

    def strength(self, progress: float, state: AdaptiveState) -> float:
        """The strength at a share of the run, 0 to 1."""
        if self.schedule == "adaptive":
            return state.strength
        if self.schedule == "linear":
            low, high = self.strength_range
            return low + (high - low) * progress
        return 1.0

    def advance(self, state: AdaptiveState, loss: float) -> AdaptiveState:
        """The state after a step with this loss (over the global batch)."""
        total, steps = state.total + loss, state.steps + 1
        if steps < self.adaptive_window:
            return AdaptiveState(state.strength, total, steps, state.previous)
        mean = total / steps
        if state.previous is None:
            return AdaptiveState(state.strength, previous=mean)
        falling = mean < state.previous * (1 - self.adaptive_fall)
        low, high = self.strength_range
        strength = state.strength + (self.adaptive_change if falling else -self.adaptive_change)
        return AdaptiveState(float(min(max(strength, low), high)), previous=mean)
