"""The documents of corpus.yaml."""

from __future__ import annotations

from typing import Any


def documents(corpus: str | None = None, **other: Any) -> dict[str, Any]:
    """The file that --metadata names, as lm_eval wants it; it hands over the model's arguments too.

    Raises ValueError: none is named.
    """
    if corpus is None:
        raise ValueError('corpus: name a file of JSON lines: --metadata \'{"corpus": "valid.jsonl"}\'')
    from datasets import load_dataset  # comes with lm_eval

    return load_dataset("json", data_files={"test": corpus})
