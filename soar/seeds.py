"""Seeds: every random stream is derived from the run seed and its place in the loop, so that no state of one is saved."""

import hashlib

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX2 = np.uint64(0x94D049BB133111EB)


def derive(*place: int | str) -> int:
    """A 63-bit seed for a place such as (run_seed, "student", step, dataset, repeat)."""
    text = "/".join(str(part) for part in place)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(*place: int | str) -> np.random.Generator:
    """numpy generator for a place."""
    return np.random.default_rng(derive(*place))


def _mix(x: np.ndarray) -> np.ndarray:
    """splitmix64 finaliser (Steele, Lea, Flood 2014), elementwise on uint64."""
    x = (x ^ (x >> np.uint64(30))) * _MIX1
    x = (x ^ (x >> np.uint64(27))) * _MIX2
    return x ^ (x >> np.uint64(31))


def uniforms(seed_B: np.ndarray, steps: int) -> np.ndarray:
    """Uniform numbers in [0, 1), float32 [B, steps]: entry (b, t) depends on seed_B[b] and t alone, not on its batch."""
    counter_T = np.arange(1, steps + 1, dtype=np.uint64)
    with np.errstate(over="ignore"):
        base_B = _mix(seed_B.astype(np.uint64) + _GOLDEN)
        bits_B_T = _mix(base_B[:, None] + counter_T[None, :] * _GOLDEN)
    return (bits_B_T >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)


def skip(seed: int, rows: int) -> int:
    """The seed whose row i is row `rows` + i of `seed`, so that attempts can be drawn in several calls."""
    return (seed + rows * int(_GOLDEN)) % 2**64


def row_seeds(seed: int, rows: int) -> np.ndarray:
    """One seed a row, uint64 [rows]; row i's depends on (seed, i) alone."""
    with np.errstate(over="ignore"):
        return _mix(np.uint64(seed) + np.arange(rows, dtype=np.uint64) * _GOLDEN)
