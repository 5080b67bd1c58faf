"""Cosine of two texts by a local embedding model: the half of QueryGen's released score that needs one."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from redone.config.check import WEIGHT_PATTERNS
from redone.errors import ModelError

MAX_TOKENS = 512


class Embedder:
    """First-token pooling, as bge-large-en-v1.5 is meant to be used; on the CPU."""

    def __init__(self, path: str | Path) -> None:
        """Raises ModelError when the folder holds no model that transformers can load."""
        import torch
        from transformers import AutoModel, AutoTokenizer

        folder = Path(path)
        if not (folder / "config.json").is_file() or not any(
            next(folder.glob(pattern), None) for pattern in WEIGHT_PATTERNS
        ):
            raise ModelError(f"--embedding {path}: no model folder with config.json and weights there")
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(folder)
            self._model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
        except (OSError, ValueError, KeyError) as error:
            raise ModelError(f"--embedding {path}: transformers cannot load it ({error})") from error
        self._torch = torch
        self._vector = lru_cache(maxsize=4096)(self._embed)

    def cosine(self, first: str, second: str) -> float:
        """In [-1, 1]."""
        return float(self._torch.dot(self._vector(first), self._vector(second)).clamp(-1.0, 1.0))

    def _embed(self, text: str) -> Any:
        batch = self._tokenizer([text], truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
        with self._torch.no_grad():
            hidden = self._model(**batch).last_hidden_state[0, 0]
        return self._torch.nn.functional.normalize(hidden, dim=0)
