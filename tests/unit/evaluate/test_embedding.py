"""The cosine of QueryGen, with a tiny random BERT."""

from __future__ import annotations

from pathlib import Path

import pytest

from redone.errors import ModelError
from redone.evaluate.embedding import Embedder


def make_bert(folder: Path) -> Path:
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder.mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "tea", "shops", "rain", "coats", "in", "##s"]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        initializer_range=1.0,  # the usual 0.02 makes all texts alike
    )
    BertModel(config).save_pretrained(folder)
    return folder


def test_cosine(tmp_path: Path) -> None:
    embedder = Embedder(make_bert(tmp_path / "bert"))
    assert embedder.cosine("tea shops", "tea shops") == pytest.approx(1.0, abs=1e-5)
    apart = embedder.cosine("tea shops", "rain coats in rain")
    assert -1.0 <= apart < 0.99
    assert apart == pytest.approx(embedder.cosine("rain coats in rain", "tea shops"))


def test_no_model_there(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"--embedding .*: no model folder"):
        Embedder(tmp_path)
