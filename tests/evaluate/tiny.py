"""An encoder small enough to be made in a test."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from transformers import BertConfig, BertModel, BertTokenizerFast


def tiny_bert(folder: Path, texts: Iterable[str]) -> Path:
    """A BERT of two layers and 32 positions, untrained, that knows the words of some texts."""
    words = sorted({word.strip(".,;").lower() for text in texts for word in text.split()})
    (folder / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words, ".", ",", ";", "-"])
    )
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words) + 9,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
    )
    BertModel(config).save_pretrained(folder)
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    return folder
