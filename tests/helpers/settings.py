"""Settings that tests of small runs share; nothing here imports torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

ONE_LAYER = {"num_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "seq_length": 16}
TWO_LAYERS = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "seq_length": 16}
TINY_QWEN2 = TWO_LAYERS | {
    "preset": "qwen2-tiny",
    "num_query_groups": 2,
    "untie_embeddings_and_output_weights": False,
    "make_vocab_size_divisible_by": 3,
}
"""Tied weights, shared key-value heads, biases on some projections, and a padded vocabulary."""
SHORT_ROBUST_SEARCH = {
    "mode": "robust",
    "alpha": 2.0,
    "search_start": 0.3,
    "search_end": 0.9,
    "trial_steps": 4,
    "return_steps": 10,
    "restart_steps": 12,
    "max_discarded": 9.0,
}
"""Robust search in a run of 60 steps."""


def counting_data(data: Path, split: str = "8,1,1") -> dict[str, Any]:
    """Return the fields of a corpus that `counting_corpus` has written."""
    return {"vocab_size": 50, "data_path": str(data), "split": split}
