"""Configuration of data and tokenizer."""

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
    """Prefix of the preprocessed corpus PREFIX.bin and PREFIX.idx, as written by `megatron-adalrs
    preprocess`, or a blend of several: SIZE PREFIX SIZE PREFIX ... NAME=PREFIX names a corpus; without a
    name, the last part of its path is used. PREFIX.bin and PREFIX.idx mean PREFIX."""
    train_data_path: Entries | None = None
    """Corpus or blend to train on, instead of data_path; all of it is used for training."""
    valid_data_path: Entries | None = None
    """With train_data_path: corpora for validation, one PREFIX or several, or SIZE PREFIX SIZE PREFIX ... for
    a weighted mean. Each corpus has its own curve beside the mean."""
    test_data_path: Entries | None = None
    """With train_data_path: corpora for the test at the end of the run, in the same form."""
    blend_sizes: Literal["weights", "tokens", "epochs"] = "weights"
    """Meaning of the sizes of the training corpora: weights of their samples, tokens to take from each, or
    passes over each. A run that is longer or shorter than their sum keeps the proportions."""
    split: str | None = None
    """Weights of the train, validation and test splits of data_path, which consist of whole documents and do
    not overlap. Default: 969,30,1."""
    reset_attention_mask: bool = False
    """Prevent attention between different documents in a sample. Needs a mask of seq_length x seq_length."""
    reset_position_ids: bool = False
    """Restart position ids at the beginning of each document in a sample."""
    eod_mask_loss: bool = False
    """Exclude predictions made from an end-of-document token, whose target is the first token of another
    document, from the loss. The loss is the mean over the other tokens of the global batch."""
    eod_token_id: NonNegativeInt | None = None
    """Id of the end-of-document token. Default: that of the tokenizer, else that recorded with the data."""
    data_cache_path: Path | None = None
    """Folder for the sample indices. Default: a folder `cache` next to the data."""
    tokenizer_type: TokenizerKind | None = None
    """Tokenizer that the data was encoded with. It determines and checks the vocabulary size."""
    tokenizer_model: Path | None = None
    """File or folder of the tokenizer."""
    vocab_file: Path | None = None
    """vocab.json of GPT2BPETokenizer."""
    merge_file: Path | None = None
    """merges.txt of GPT2BPETokenizer."""

    @property
    def parts(self) -> tuple[tuple[str, tuple[Corpus, ...]], ...]:
        """Groups of corpora, each with the weights of its train, validation and test splits.

        There is one group that is divided by `split`, or one group for each of the separate paths.
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
        """Whether masks, positions or the loss depend on document boundaries."""
        return self.reset_attention_mask or self.reset_position_ids or self.eod_mask_loss

    @property
    def corpora(self) -> tuple[Corpus, ...]:
        """All corpora of the run, training corpora first."""
        return tuple(corpus for _, corpora in self.parts for corpus in corpora)

    @property
    def corpora_by_field(self) -> dict[str, tuple[Corpus, ...]]:
        """Corpora of each field that names some."""
        if self.data_path is not None:
            return {"data_path": self.corpora}
        named = [name for name in SEPARATE if getattr(self, name) is not None]
        return {name: corpora for name, (_, corpora) in zip(named, self.parts, strict=True)}

    @field_serializer("data_path", *SEPARATE)
    def _plain(self, entries: tuple[str, ...] | None) -> str | list[str] | None:
        """Write a single prefix as a string instead of a list."""
        if entries is None:
            return None
        return entries[0] if len(entries) == 1 else list(entries)

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
                self.train_data_path is not None, "data_path: is required, or train_data_path instead of it"
            )
            require(
                self.split is None,
                f"split: {self.split!r} contradicts train_data_path: separate corpora are not split; give "
                f"only one of them",
            )
        for name in SEPARATE:
            require(
                self.data_path is None or getattr(self, name) is None,
                f"{name}: contradicts data_path, which is split into all three; give train_data_path "
                f"instead of it",
            )
        assert self.corpora  # parses every entry
        return self
