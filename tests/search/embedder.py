"""A real, tiny embedding, and a process that indexes with it."""

from __future__ import annotations

import sys
import time
import zlib

import numpy as np
from torch import Tensor

from med3dvlm.scan import Preparation
from med3dvlm.search import How, build_index

DIM = 16


class Histogram:
    """The histogram of a volume's values; of a text, that of its words."""

    reads_text = True

    def __init__(self, label: str = "histogram", mark: str = "aaaa", *, slow: float = 0.0):
        self.label, self.mark, self.slow = label, mark, slow
        self.preparation = Preparation(size=(8, 8, 8), intensity="minmax")
        self.seen = 0

    def fingerprint(self) -> str:
        return self.mark

    def embed_volumes(self, volumes: Tensor) -> np.ndarray:
        time.sleep(self.slow * len(volumes))
        self.seen += len(volumes)
        rows = [np.histogram(volume, bins=DIM, range=(0, 1))[0] for volume in volumes.numpy()]
        return _unit(np.array(rows, np.float32))

    def embed_texts(self, texts: list[str]) -> np.ndarray:
        rows = np.full((len(texts), DIM), 0.1, np.float32)
        for row, text in zip(rows, texts, strict=True):
            for word in text.lower().split():
                row[zlib.crc32(word.strip(".,:").encode()) % DIM] += 1
        return _unit(rows)


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


if __name__ == "__main__":  # SOURCE INDEX SECONDS-A-SCAN
    build_index(
        sys.argv[1],
        Histogram(slow=float(sys.argv[3])),
        sys.argv[2],
        how=How(batch_size=1, save_every=2),
    )
