"""Typed errors. Each message says what was wrong and what to do next."""

import difflib
from collections.abc import Iterable


class HFRSHeatError(Exception):
    """Base class of every error this package raises on purpose."""


class ConfigurationError(HFRSHeatError, ValueError):
    """A recipe, option or config field is unknown, of the wrong type or out of range."""


class DataError(HFRSHeatError, ValueError):
    """Input data cannot be used (nothing readable, wrong layout, missing labels)."""


class CheckpointError(HFRSHeatError, ValueError):
    """A checkpoint is damaged, incomplete, or its tensors do not fit the model."""


class CacheError(HFRSHeatError, ValueError):
    """Cached teacher features are missing, stale or damaged; they were not used."""


class UnsafeCheckpointError(CheckpointError):
    """A pickle names a global that reading weights never needs; nothing of it was executed."""


class VerificationError(HFRSHeatError, ValueError):
    """A model folder is not what it says it is; nothing of it was loaded."""


class TransferError(HFRSHeatError, OSError):
    """A download or an upload failed; what arrived is kept, and the message says how to continue."""


class TrainingError(HFRSHeatError, RuntimeError):
    """Training cannot go on (a loss that is not finite); the message says how to continue."""


class CheckpointWriteError(HFRSHeatError, OSError):
    """A checkpoint could not be written; the one before is intact, and the message says what was needed."""


class RunInUseError(HFRSHeatError, RuntimeError):
    """Another process is writing to the run folder."""


class RunInterrupted(HFRSHeatError, RuntimeError):
    """A signal stopped the run; its last step is saved.

    Attributes:
        status: What the process should exit with: 143 after SIGTERM, 130 after SIGINT.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message, status)  # both, so that the error can be pickled
        self.status = status

    def __str__(self) -> str:
        return str(self.args[0])


class BenchmarkError(HFRSHeatError, RuntimeError):
    """A measured ratio is worse than the stored one, or what was measured is not what should have been."""


class MissingExtraError(HFRSHeatError, ImportError):
    """An optional dependency is not installed; the message names the extra to install."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs {package}: run `pip install 'hf_rsheat[{extra}]'`.")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Sentence that names the closest known name, or all of them."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else f"known names are {', '.join(known)}."
