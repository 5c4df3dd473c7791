"""A whole model in this process, from wherever one is kept, and the tokenizer that it speaks."""

from __future__ import annotations

import os

import torch

from megatron_adalrs.checkpoint import OpenedModel
from megatron_adalrs.checkpoint.fitting import require_one_tokenizer
from megatron_adalrs.data.preprocess import read_description
from megatron_adalrs.data.tokenizer import Tokenizer, build_tokenizer
from megatron_adalrs.model.documents import ONE_DOCUMENT, Documents
from megatron_adalrs.model.gpt import GPT, write_weights


def whole_model(opened: OpenedModel, dtype: torch.dtype | None = None, device: str = "cpu") -> GPT:
    """The model, ready to compute with, without dropout and gradients. Documents within a sample are what they were in
    its training.

    Args:
        dtype: None: what the model computes with where it was trained.

    Raises:
        ValueError: a tensor cannot be read.
    """
    documents = Documents.of(opened.data) if opened.data else ONE_DOCUMENT
    # As far as it goes, which may be further than the samples that it was trained on.
    config = opened.model.model_copy(update={"seq_length": opened.model.max_positions})
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype or opened.dtype("final_norm.weight"))
    try:
        with torch.device(device):
            model = GPT(config, opened.vocab_size, documents=documents)
    finally:
        torch.set_default_dtype(before)
    write_weights(model, opened.weights)
    return model.eval().requires_grad_(False)


def best_device() -> str:
    """cuda where there is one and DS_ACCELERATOR does not say otherwise, else cpu."""
    return "cuda" if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR", "cuda") == "cuda" else "cpu"


def tokenizer_of(opened: OpenedModel, kind: str | None, path: str | None) -> Tokenizer:
    """The tokenizer that is asked for, or else the one that is known to belong to the model.

    Raises:
        ValueError: none is known, it cannot be read, or it has tokens that the model lacks.
        FileNotFoundError: its file is not there.
    """
    if kind:
        tokenizer = build_tokenizer(kind, path)
    elif path:
        raise ValueError(f"tokenizer_model: {path}: give --tokenizer-type too")
    else:
        tokenizer = _own_tokenizer(opened)
    if tokenizer.vocab_size > opened.vocab_size:
        raise ValueError(
            f"tokenizer_type: the tokenizer has {tokenizer.vocab_size} tokens, the model of {opened.path} "
            f"{opened.vocab_size}"
        )
    return tokenizer


def tokenizer_of_corpus(
    opened: OpenedModel, prefix: str, kind: str | None, path: str | None
) -> tuple[Tokenizer | None, str]:
    """The tokenizer that gives back the text of a corpus, or None and why there is none.

    Raises:
        ValueError, FileNotFoundError: the one that is asked for cannot be had, or the corpus was made with another one
            than that or than the data of the model's run.
    """
    note = read_description(prefix)
    made = note.tokenizer_sha256 if note else None
    require_one_tokenizer(f"data_path: {prefix}: {opened.path}", opened.tokenizer_sha256, made)
    try:
        tokenizer = tokenizer_of(opened, kind, path)
        if made not in (None, tokenizer.sha256):
            named = path or kind or f"the tokenizer of {opened.path}"
            raise ValueError(
                f"tokenizer_model: {named} (SHA-256 {tokenizer.sha256:.12}) is not what made {prefix} ({made:.12})"
            )
    except (ValueError, OSError) as error:
        if kind or path:
            raise
        return None, str(error)
    return tokenizer, ""


def _own_tokenizer(opened: OpenedModel) -> Tokenizer:
    known = opened.tokenizer()
    if known.kind == "ByteTokenizer":
        return build_tokenizer("ByteTokenizer")
    for name, kind in (("tokenizer.json", "HuggingFaceTokenizer"), ("tokenizer.model", "SentencePieceTokenizer")):
        if name in known.files:
            return build_tokenizer(kind, known.files[name])
    raise ValueError(f"tokenizer_type: {opened.path} names no tokenizer; give --tokenizer-type and --tokenizer-model")
