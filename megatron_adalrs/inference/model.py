"""Load a model into this process, and find its tokenizer."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from megatron_adalrs.checkpoint import OpenedModel
from megatron_adalrs.checkpoint.compatibility import require_same_tokenizer
from megatron_adalrs.checkpoint.tokenizer_files import require_matching_tokenizer
from megatron_adalrs.data.description import read_description, recorded_tokenizer, require_tokenizer
from megatron_adalrs.data.gpt_dataset import check_vocabulary
from megatron_adalrs.data.tokenizer import TOKENIZER_FILES, DataTokenizer, Tokenizer, build_tokenizer
from megatron_adalrs.huggingface.companion_files import tokenizer_digests, tokenizer_in
from megatron_adalrs.model.document_mask import NO_DOCUMENT_MASKING, DocumentMasking
from megatron_adalrs.model.gpt import GPT
from megatron_adalrs.model.initialization import write_weights


def whole_model(opened: OpenedModel, dtype: torch.dtype | None = None, device: str = "cpu") -> GPT:
    """Load a model in evaluation mode and without gradients.

    Documents in a sample are masked as they were in the training of the model.

    Args:
        dtype: Precision of the computation. Default: that of the training, or of the model's files.

    Raises:
        ValueError: A tensor cannot be read.
    """
    documents = DocumentMasking.of(opened.data) if opened.data else NO_DOCUMENT_MASKING
    # All positions of the model, which may be more than its training samples had.
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
    """Return "cuda" if there is a device and DS_ACCELERATOR does not select another, else "cpu"."""
    return (
        "cuda" if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR", "cuda") == "cuda" else "cpu"
    )


def tokenizer_of(opened: OpenedModel, kind: str | None, *paths: Path | None) -> Tokenizer:
    """Build the given tokenizer, or that of the model if none is given.

    Args:
        kind: Kind of the tokenizer, see `build_tokenizer`.
        *paths: Files of the tokenizer, see `build_tokenizer`.

    Raises:
        ValueError: No tokenizer is known, it cannot be read, or its vocabulary is larger than the model's.
        FileNotFoundError: A file does not exist.
    """
    if kind:
        tokenizer = build_tokenizer(kind, *paths)
    elif any(paths):
        name, path = next((name, path) for name, path in zip(TOKENIZER_FILES, paths, strict=True) if path)
        raise ValueError(f"{name}: {path}: give --tokenizer-type too")
    else:
        tokenizer = _own_tokenizer(opened)
    if tokenizer.vocab_size > opened.vocab_size:
        raise ValueError(
            f"tokenizer_type: the tokenizer has {tokenizer.vocab_size} tokens, the model of {opened.path} "
            f"{opened.vocab_size}"
        )
    return tokenizer


def tokenizer_of_corpus(
    opened: OpenedModel, prefix: str, kind: str | None, *paths: Path | None
) -> tuple[Tokenizer | None, str]:
    """Build the tokenizer that decodes a corpus.

    Args:
        kind: Kind of the tokenizer, see `build_tokenizer`. Default: the tokenizer of the model.
        *paths: Files of the tokenizer, see `build_tokenizer`.

    Returns:
        The tokenizer and an empty string, or None and the reason why there is none.

    Raises:
        ValueError, OSError: The given tokenizer cannot be built, or the corpus is known to be made with
            another tokenizer than the given one or the model's.
    """
    asked = tokenizer_of(opened, kind, *paths) if kind or any(paths) else None
    note = read_description(prefix)
    of_data = None
    if asked and kind:
        of_data = DataTokenizer(kind, asked.sha256, str(next(filter(None, paths), kind)), paths)
        if note:
            require_tokenizer(prefix, note, asked, f"tokenizer_type: {of_data.source}")
    elif note:
        of_data = recorded_tokenizer(prefix, note)
    if of_data:
        require_same_tokenizer(f"data_path: {prefix}: {opened.path}", opened.tokenizer_sha256, of_data.sha256)
        require_matching_tokenizer(opened.companions, opened.model, of_data, "data_path")
    try:
        tokenizer = asked or tokenizer_of(opened, None)
        check_vocabulary(prefix, tokenizer.vocab_size)
    except (ValueError, OSError) as error:
        if asked:
            raise
        return None, str(error)
    # Tokenizers of two kinds cannot be compared unless one file names the digest of the other.
    if of_data and of_data.sha256 not in (
        tokenizer.sha256,
        *tokenizer_digests(opened.tokenizer().files).values(),
    ):
        return None, f"{prefix} was made with a {of_data.kind}; give --tokenizer-type and its files"
    return tokenizer, ""


def _own_tokenizer(opened: OpenedModel) -> Tokenizer:
    known = opened.tokenizer()
    if known.kind == "ByteTokenizer":
        return build_tokenizer("ByteTokenizer")
    found = tokenizer_in(known.files, opened.model)
    if found is None:
        raise ValueError(
            f"tokenizer_type: {opened.path} names no tokenizer; give --tokenizer-type and its files"
        )
    return found
