"""Loss, perplexity and bits per byte of a model on a corpus: of a run, a checkpoint, or a folder of Hugging Face's.

    python tools/evaluate.py runs/NAME                                 # its newest checkpoint, its own validation part
    python tools/evaluate.py runs/NAME --data-path data/other --part all
    python tools/evaluate.py Qwen2.5-0.5B --data-path data/corpus --part all --seq-length 2048 --json

Every token is predicted once: the documents are read one after the other in windows of --seq-length tokens, each with
the context of its own window. Losses are in nats. Unlike the evaluations of a run, which draw samples in random order,
this is exhaustive, and the same for any two models with the same tokenizer. Between tokenizers, compare the bits per
byte of text. With --documents-apart they are what lm_eval's loglikelihood_rolling finds.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

if TYPE_CHECKING:
    from megatron_adalrs.checkpoint import OpenedModel
    from megatron_adalrs.data.indexed_dataset import IndexedDataset


@dataclass(frozen=True)
class Arguments:
    source: Annotated[Path, tyro.conf.Positional]
    """Run, checkpoint or folder with config.json and safetensors."""
    data_path: str | None = None
    """Prefix of the corpus, as pretrain_gpt.py takes it. Default: the run's own."""
    split: str | None = None
    """Weights of the train, validation and test parts. Default: the run's own, where it is the run's own corpus."""
    part: Literal["train", "valid", "test", "all"] = "valid"
    """Which part of the corpus."""
    seq_length: int | None = None
    """Tokens in a window. Default: those of the model's training, or its most positions, at most 2048."""
    documents_apart: bool = False
    """Every document by itself, as in lm_eval: after an end-of-document token, its own not predicted, windows full."""
    batch_size: int = 8
    """Windows at a time."""
    max_tokens: int | None = None
    """Stop after about so many tokens."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """To compute in. Default: the precision that the model was trained in, or that of its files."""
    tokenizer_type: str | None = None
    """SentencePieceTokenizer, HuggingFaceTokenizer, GPT2BPETokenizer or ByteTokenizer, to count bytes of text. Default:
    the one that belongs to the model."""
    tokenizer_model: str | None = None
    """The tokenizer's file (or folder)."""
    vocab_file: str | None = None
    """GPT2BPETokenizer's vocab.json."""
    merge_file: str | None = None
    """GPT2BPETokenizer's merges.txt."""
    json: bool = False
    """Print one JSON object."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0, or 2 where it was asked for something impossible."""
    given = tyro.cli(Arguments, args=arguments, description=__doc__)
    try:
        figures = evaluated(given)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if given.json:
        print(json.dumps(figures))
    else:
        print(in_words(figures))
    return 0


def in_words(figures: dict[str, Any]) -> str:
    error = "" if figures["loss_error"] is None else f" ± {figures['loss_error']:.4f}"
    bits = "" if figures["bits_per_byte"] is None else f", {figures['bits_per_byte']:.4f} bits a byte"
    return (
        f"{figures['model']} on {figures['data']}\n"
        f"loss {figures['loss']:.4f}{error} nats a token, perplexity {figures['perplexity']:.4g}{bits}, "
        f"{figures['tokens']} tokens in windows of {figures['seq_length']}"
    )


def evaluated(given: Arguments) -> dict[str, Any]:
    """What is printed as JSON.

    Raises:
        ValueError, OSError: a flag asks for something impossible, or something cannot be read.
    """
    for name in ("seq_length", "batch_size", "max_tokens"):
        if (value := getattr(given, name)) is not None and value < 1:
            raise ValueError(f"{name}: {value}: must be at least 1")
    import torch
    from tqdm import tqdm

    from megatron_adalrs.checkpoint import locate_model, open_model
    from megatron_adalrs.data.description import read_description
    from megatron_adalrs.data.indexed_dataset import IndexedDataset
    from megatron_adalrs.data.tokenizer import files_named
    from megatron_adalrs.inference.decoder import max_positions
    from megatron_adalrs.inference.evaluation import evaluate
    from megatron_adalrs.inference.model import best_device, tokenizer_of_corpus, whole_model

    opened = open_model(locate_model(given.source, "model"), "model")
    data_path, split = corpus_of(given, opened)
    indexed = IndexedDataset(data_path)
    documents = documents_of(given, opened, indexed, split)
    tokenizer, reason = tokenizer_of_corpus(opened, data_path, given.tokenizer_type, *files_named(given))
    note = read_description(data_path)
    eod = tokenizer.eod if tokenizer else note.eod if note else None
    if given.documents_apart and eod is None:
        raise ValueError(f"documents_apart: the end-of-document token is unknown: {reason}")
    model = whole_model(opened, getattr(torch, given.dtype) if given.dtype else None, best_device())
    length = given.seq_length or min(opened.model.seq_length, 2048)
    if length > max_positions(model):
        raise ValueError(f"seq_length: {length}: the model has {max_positions(model)} positions")
    last = int(indexed.document_offsets[documents.stop] - indexed.document_offsets[documents.start]) - 1
    # disable=None: a bar only where there is a terminal to draw it on
    total = min(last, given.max_tokens or last)
    with tqdm(total=total, unit="token", unit_scale=True, leave=False, disable=None) as bar:
        found = evaluate(
            model, indexed, documents, length, given.batch_size, given.max_tokens, tokenizer,
            eod if given.documents_apart else None, lambda tokens: bar.update(tokens - bar.n),
        )  # fmt: skip
    if tokenizer is None:
        print(f"bits a byte are unknown: {reason}", file=sys.stderr)
    figures = {
        "loss": found.loss, "loss_error": found.error, "perplexity": found.perplexity,
        "bits_per_byte": found.bits_per_byte, "tokens": found.tokens, "bytes": found.bytes, "seq_length": length,
    }  # fmt: skip
    # JSON has no word for what is not finite.
    figures = {
        name: value if value is not None and math.isfinite(value) else None for name, value in figures.items()
    }
    return {"model": str(opened.path), "step": opened.step, "data": f"{data_path} ({given.part})"} | figures


def documents_of(given: Arguments, opened: OpenedModel, indexed: IndexedDataset, split: str | None) -> range:
    """The documents of the part that is asked for.

    Raises:
        ValueError: it has none, its bounds are unknown, or it has tokens beyond the model's vocabulary.
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
    """Prefix of the corpus, and the weights of its parts, as far as they are known.

    Raises:
        ValueError: the model alone does not tell which corpus is meant.
    """
    from megatron_adalrs.data.gpt_dataset import SPLITS, parse_split

    own = opened.data.parts if opened.data else ()
    # Of separate corpora, those that are of the part.
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
