"""A small run on bytes for tests of evaluation and generation."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_adalrs.preprocessing.preprocess import Recipe, preprocess
from tests.checkpoint.test_checkpoint import trained, values
from tests.helpers.ranks import Ranks

SENTENCE = "abcdefghijklmnopqrstuvwxyz\n"


def run_on_bytes(one_rank: Ranks, folder: Path) -> Path:
    """Train until the model has memorized the only line of its corpus."""
    texts = folder / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": SENTENCE * 8}) + "\n" for _ in range(40)))
    preprocess(texts, folder / "corpus", Recipe("ByteTokenizer"))
    run = folder / "run"
    config = values(
        folder / "corpus",
        run,
        preset="llama-tiny",
        hidden_size=32,
        num_attention_heads=4,
        seq_length=32,
        max_position_embeddings=64,
        vocab_size=None,
        lr=2e-2,
        train_iters=120,
        hidden_dropout=0.0,
        eval_iters=5,
    )
    assert one_rank.run(trained, config) == [0]
    return run
