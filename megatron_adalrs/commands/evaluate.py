"""Compute loss, perplexity and bits per byte of a model on a corpus.

    megatron-adalrs evaluate runs/NAME         # newest checkpoint, validation part of the run's corpus
    megatron-adalrs evaluate runs/NAME --data-path data/other --part all
    megatron-adalrs evaluate Qwen2.5-0.5B --data-path data/corpus --part all --seq-length 2048 --json

The model is that of a run, a checkpoint or a Hugging Face folder. Every token is predicted exactly once: the
documents are concatenated and cut into windows of --seq-length tokens, and a token sees the earlier tokens of
its window. Losses are in nats. The evaluations during training draw random samples instead. Losses of models
with the same tokenizer can be compared; for different tokenizers, compare the bits per byte of text. With
--documents-apart the bits per byte equal those of lm_eval's loglikelihood_rolling.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import tyro

from megatron_adalrs.cli.program import TokenizerFlags, parse_flags, reports_errors

if TYPE_CHECKING:
    from tqdm import tqdm

    from megatron_adalrs.checkpoint import OpenedModel
    from megatron_adalrs.data.indexed_dataset import IndexedDataset


@dataclass(frozen=True)
class Arguments(TokenizerFlags):
    source: Annotated[Path, tyro.conf.Positional]
    """Run directory, checkpoint, or folder with config.json and safetensors."""
    data_path: str | None = None
    """Prefix of the corpus (PREFIX.bin and PREFIX.idx). Default: the corpus of the run."""
    split: str | None = None
    """Weights of the train, validation and test parts. Default: those of the run, if the corpus is the
    run's."""
    part: Literal["train", "valid", "test", "all"] = "valid"
    """Part of the corpus to evaluate on."""
    seq_length: int | None = None
    """Tokens in a window. Default: the model's sequence length, at most 2048."""
    documents_apart: bool = False
    """Evaluate each document separately, as lm_eval does. Its context begins with an end-of-document token,
    its own end-of-document token is not predicted, and every window is filled with earlier tokens of the
    document."""
    batch_size: int = 8
    """Windows in a batch."""
    max_tokens: int | None = None
    """Stop after about this number of tokens."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Precision of the computation. Default: that of the training, or of the model's files."""
    json: bool = False
    """Print a JSON object."""


@reports_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """Evaluate the model and print the result.

    Returns:
        0, or 2 if a flag is not valid or a file cannot be read.
    """
    flags = parse_flags(Arguments, __doc__, arguments)
    figures = evaluate_model(flags)
    print(json.dumps(figures) if flags.json else as_text(figures))
    return 0


def as_text(figures: dict[str, Any]) -> str:
    """Return the result in two lines of text."""
    error = "" if figures["loss_error"] is None else f" ± {figures['loss_error']:.4f}"
    bits = "" if figures["bits_per_byte"] is None else f", {figures['bits_per_byte']:.4f} bits per byte"
    return (
        f"{figures['model']} on {figures['data']}\n"
        f"loss {figures['loss']:.4f}{error} nats per token, perplexity {figures['perplexity']:.4g}{bits}, "
        f"{figures['tokens']} tokens in windows of {figures['seq_length']}"
    )


def evaluate_model(given: Arguments) -> dict[str, Any]:
    """Evaluate the model and return what --json prints.

    Raises:
        ValueError: A flag is not valid, or the corpus does not fit the model.
        OSError: A file cannot be read.
    """
    for name in ("seq_length", "batch_size", "max_tokens"):
        if (value := getattr(given, name)) is not None and value < 1:
            raise ValueError(f"{name}: {value}: must be at least 1")
    import torch
    from tqdm import tqdm

    from megatron_adalrs.checkpoint import locate_model, open_model
    from megatron_adalrs.data.description import read_description
    from megatron_adalrs.data.indexed_dataset import IndexedDataset
    from megatron_adalrs.data.tokenizer import tokenizer_paths
    from megatron_adalrs.inference.decoder import max_positions
    from megatron_adalrs.inference.evaluation import evaluate
    from megatron_adalrs.inference.model import best_device, tokenizer_of_corpus, whole_model

    opened = open_model(locate_model(given.source, "model"), "model")
    data_path, split = corpus_of(given, opened)
    indexed = IndexedDataset(data_path)
    indexed.require_text()
    documents = documents_of(given, opened, indexed, split)
    tokenizer, reason = tokenizer_of_corpus(opened, data_path, given.tokenizer_type, *tokenizer_paths(given))
    note = read_description(data_path)
    eod = tokenizer.eod if tokenizer else note.eod if note else None
    if given.documents_apart and eod is None:
        raise ValueError(f"documents_apart: the end-of-document token is unknown: {reason}")
    model = whole_model(opened, getattr(torch, given.dtype) if given.dtype else None, best_device())
    length = given.seq_length or min(opened.model.seq_length, 2048)
    if length > max_positions(model):
        raise ValueError(f"seq_length: {length}: the model has {max_positions(model)} positions")
    last = int(indexed.document_offsets[documents.stop] - indexed.document_offsets[documents.start]) - 1
    # disable=None draws the bar only on a terminal
    total = min(last, given.max_tokens or last)
    with tqdm(total=total, unit="token", unit_scale=True, leave=False, disable=None) as bar:
        found = evaluate(
            model,
            indexed,
            documents,
            length,
            given.batch_size,
            given.max_tokens,
            tokenizer,
            eod if given.documents_apart else None,
            lambda tokens: _advance(bar, tokens),
        )
    if tokenizer is None:
        print(f"bits per byte are unknown: {reason}", file=sys.stderr)
    figures = {
        "loss": found.loss,
        "loss_error": found.error,
        "perplexity": found.perplexity,
        "bits_per_byte": found.bits_per_byte,
        "tokens": found.tokens,
        "bytes": found.bytes,
        "seq_length": length,
    }
    # JSON cannot express numbers that are not finite.
    figures = {
        name: value if value is not None and math.isfinite(value) else None for name, value in figures.items()
    }
    return {"model": str(opened.path), "step": opened.step, "data": f"{data_path} ({given.part})"} | figures


def _advance(bar: tqdm[NoReturn], tokens: int) -> None:
    bar.update(tokens - bar.n)


def documents_of(given: Arguments, opened: OpenedModel, indexed: IndexedDataset, split: str | None) -> range:
    """Return the documents of the chosen part of the corpus.

    Raises:
        ValueError: The part is empty, the split is unknown, or a token is outside the model's vocabulary.
    """
    from megatron_adalrs.data.gpt_dataset import SPLITS, check_vocabulary, split_documents

    check_vocabulary(indexed.prefix, opened.vocab_size)
    if given.part == "all":
        documents = range(indexed.num_documents)
    elif split is None:
        raise ValueError(f"split: unknown for {indexed.prefix}; give --split, or --part all")
    else:
        documents = split_documents(split, indexed.num_documents)[SPLITS.index(given.part)]
    if not documents:
        raise ValueError(f"part: the {given.part} part of {indexed.prefix} is empty with split {split}")
    return documents


def corpus_of(given: Arguments, opened: OpenedModel) -> tuple[str, str | None]:
    """Return the prefix of the corpus and, if they are known, the weights of its parts.

    Raises:
        ValueError: --data-path is not given, and the model does not have exactly one corpus.
    """
    from megatron_adalrs.data.gpt_dataset import SPLITS, parse_split

    own = opened.data.parts if opened.data else ()
    # Among separate corpora, those of the chosen part.
    of_part = [
        group for group in own if given.part == "all" or parse_split(group[0])[SPLITS.index(given.part)]
    ]
    known = {corpus.prefix: split for split, corpora in of_part or own for corpus in corpora}
    if given.data_path is not None:
        return given.data_path, given.split or known.get(given.data_path)
    if len(known) != 1:
        several = f"has several: {', '.join(known)}" if known else "is not of a run of ours"
        raise ValueError(f"data_path: {opened.path} {several}; give --data-path")
    ((prefix, split),) = known.items()
    return prefix, given.split or split


if __name__ == "__main__":
    sys.exit(main())
