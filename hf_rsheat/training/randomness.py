"""Random numbers as pure functions of what they are for.

A draw of a sample follows from (seed, epoch, sample index), a draw of a step from (seed, step, rank). Neither depends
on the number of workers, on prefetching, or on whether the run was interrupted.
"""

import zlib

import numpy as np


def _sequence(purpose: str, key: tuple[int, ...]) -> np.random.SeedSequence:
    # crc32 rather than hash(): the latter is salted per process.
    return np.random.SeedSequence([zlib.crc32(purpose.encode()), *key])


def generator(purpose: str, *key: int) -> np.random.Generator:
    """Generator for one purpose and one key of non-negative integers; the same key gives the same numbers anywhere."""
    return np.random.Generator(np.random.PCG64(_sequence(purpose, key)))


def derive_seed(purpose: str, *key: int) -> int:
    """63-bit seed for generators that take an integer, e.g. `torch.manual_seed`."""
    return int(_sequence(purpose, key).generate_state(1, np.uint64)[0] >> np.uint64(1))
