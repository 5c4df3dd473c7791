"""Data and tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import NonNegativeInt, field_serializer, model_validator

from megatron_adalrs.config.base import Group, require
from megatron_adalrs.config.corpora import Corpus, Entries, parse_corpora

SEPARATE = ("train_data_path", "valid_data_path", "test_data_path")
DEFAULT_SPLIT = "969,30,1"
TokenizerKind = Literal["SentencePieceTokenizer", "HuggingFaceTokenizer", "GPT2BPETokenizer", "ByteTokenizer"]


class DataConfig(Group):
    """Data and tokenizer."""

    data_path: Entries | None = None
    """Prefix of the preprocessed corpus: PREFIX.bin and PREFIX.idx, as `megatron-adalrs preprocess` writes
    them; or a blend of several: SIZE PREFIX SIZE PREFIX ... A prefix may be written NAME=PREFIX; its last
    part is
        the name otherwise."""
    train_data_path: Entries | None = None
    """In place of data_path: the corpus or blend to train on, all of it."""
    valid_data_path: Entries | None = None
    """With train_data_path: corpora to validate on, each with a curve of its own, beside their mean: one
    PREFIX, several, or SIZE PREFIX SIZE PREFIX ... for a weighted mean."""
    test_data_path: Entries | None = None
    """With train_data_path: the same for the test at the end."""
    blend_sizes: Literal["weights", "tokens", "epochs"] = "weights"
    """What the sizes of the training data's corpora are: weights of their samples, tokens to take of each, or
    passes over each (times its tokens: that many tokens). A run that is longer or shorter than their sum
    keeps the proportions."""
    split: str | None = None
    """Weights of the train, validation and test parts of data_path; whole documents, no overlap. Default:
    969,30,1."""
    reset_attention_mask: bool = False
    """Tokens do not attend to those of earlier documents in their sample. Takes a mask of seq_length x
    seq_length."""
    reset_position_ids: bool = False
    """Positions count from the beginning of each document in a sample."""
    eod_mask_loss: bool = False
    """What is predicted from an end-of-document token, the first token of another document, does not count in
    the loss: its mean is over the other tokens of the whole global batch."""
    eod_token_id: NonNegativeInt | None = None
    """The end-of-document token. Default: the tokenizer's, else the one noted beside the data."""
    data_cache_path: Path | None = None
    """Folder for the sample indices. Default: a folder `cache` beside the data."""
    tokenizer_type: TokenizerKind | None = None
    """Tokenizer that the data was made with; used for the vocabulary size and its checks. Optional."""
    tokenizer_model: Path | None = None
    """The tokenizer's file (or folder)."""
    vocab_file: Path | None = None
    """GPT2BPETokenizer's vocab.json."""
    merge_file: Path | None = None
    """GPT2BPETokenizer's merges.txt."""

    @property
    def parts(self) -> tuple[tuple[str, tuple[Corpus, ...]], ...]:
        """Corpora in groups, each with the weights of its train, validation and test parts.

        One group, cut by `split`, or one for each of the separate paths that are given.
        """
        if self.data_path is not None:
            corpora = parse_corpora("data_path", self.data_path, needs_sizes=True)
            return ((self.split or DEFAULT_SPLIT, corpora),)
        whole = zip(SEPARATE, ("1,0,0", "0,1,0", "0,0,1"), strict=True)
        return tuple(
            (split, parse_corpora(name, entries, needs_sizes=name == "train_data_path"))
            for name, split in whole
            if (entries := getattr(self, name)) is not None
        )

    @property
    def marks_documents(self) -> bool:
        """Whether anything depends on where documents end."""
        return self.reset_attention_mask or self.reset_position_ids or self.eod_mask_loss

    @property
    def corpora(self) -> tuple[Corpus, ...]:
        """All corpora of the run, those to train on first."""
        return tuple(corpus for _, corpora in self.parts for corpus in corpora)

    @field_serializer("data_path", *SEPARATE)
    def _plain(self, entries: tuple[str, ...] | None) -> str | list[str] | None:
        """As people write it: a single prefix is no list."""
        return entries and (entries[0] if len(entries) == 1 else list(entries))

    @model_validator(mode="after")
    def _files_of_a_kind(self) -> DataConfig:
        for name in ("vocab_file", "merge_file"):
            require(
                getattr(self, name) is None or self.tokenizer_type is not None,
                f"{name}: {getattr(self, name)}: give --tokenizer-type GPT2BPETokenizer too",
            )
        return self

    @model_validator(mode="after")
    def _one_source(self) -> DataConfig:
        if self.data_path is None:
            require(
                self.train_data_path is not None, "data_path: is required, or train_data_path in place of it"
            )
            require(
                self.split is None,
                f"split: {self.split!r} contradicts train_data_path: separate corpora are not split; leave "
                f"one out",
            )
        for name in SEPARATE:
            require(
                self.data_path is None or getattr(self, name) is None,
                f"{name}: contradicts data_path, which is split into all three; give train_data_path in "
                f"place of it",
            )
        assert self.corpora  # each of them can be parsed
        return self
