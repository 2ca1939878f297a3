"""Question quality: diversity of the wording, and the shares of well-posed and correctly answered questions.

The Vendi score (Friedman and Dieng 2023, arXiv 2210.02410) of n texts is the exponential of the entropy of the eigenvalues of
K / n, K their cosine similarities: 1 for n equal texts, n for n unrelated ones. Their vectors see wording, not meaning.
"""

from __future__ import annotations

import itertools
import re
import zlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

DIMENSIONS = 1024
WORD = re.compile(r"\w+|[^\w\s]")


def hashed_ngrams(texts: Sequence[str]) -> np.ndarray:
    """Unit vectors [n, DIMENSIONS] of counts of words, word pairs and character triples, hashed with signs."""
    vectors_n_d = np.zeros((len(texts), DIMENSIONS))
    for row, text in enumerate(texts):
        text = text[:4000].casefold()
        words = WORD.findall(text)
        grams = [*words, *map(" ".join, itertools.pairwise(words))]
        grams += [text[i : i + 3] for i in range(len(text) - 2)]
        for gram, count in Counter(grams).items():
            code = zlib.crc32(gram.encode("utf-8", "surrogatepass"))
            vectors_n_d[row, code % DIMENSIONS] += count if code >> 31 else -count
    norms_n = np.linalg.norm(vectors_n_d, axis=1)
    vectors_n_d[norms_n == 0, 0] = 1.0
    return vectors_n_d / np.where(norms_n == 0, 1.0, norms_n)[:, None]


def vendi_score(vectors_n_d: np.ndarray) -> float:
    """exp of the entropy of the eigenvalues of the similarities / n. vectors: rows of unit length, at least one."""
    small_first = vectors_n_d if vectors_n_d.shape[0] <= vectors_n_d.shape[1] else vectors_n_d.T
    values = np.linalg.eigvalsh(small_first @ small_first.T / vectors_n_d.shape[0])
    values = values[values > 1e-12]
    return float(np.exp(-np.sum(values * np.log(values))))


def step_vendi(texts: Sequence[str]) -> float:
    """Vendi score of at least one text, rounded: the last bits of a sum in another order (other threads) change no metric."""
    return round(vendi_score(hashed_ngrams(texts)), 6)


def label_share(rows: Sequence[dict[str, Any]], key: str) -> float | None:
    """Share of the rows with a label `key` in which it is true; None where none has one."""
    labels = [row[key] for row in rows if isinstance(row.get(key), bool)]
    return sum(labels) / len(labels) if labels else None
