"""Training of lossless SentencePiece models."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from megatron_adalrs.preprocessing.documents import read_documents
from megatron_adalrs.utils.atomic_files import atomic_write

_LINE_CHARACTERS = 1000  # SentencePiece ignores lines above 4192 bytes


def train_sentencepiece(
    inputs: Iterable[Path | str],
    output_model: Path | str,
    vocab_size: int,
    *,
    model_type: Literal["bpe", "unigram"] = "bpe",
    sample_bytes: int = 10_000_000,
    json_key: str = "text",
    file_glob: str = "**/*.txt",
    num_threads: int = 2,
) -> None:
    """Train a SentencePiece model whose decoding returns the encoded text, and write it to a file.

    Text is not normalized and no spaces are added or removed; newline and tab are pieces of their own,
    several spaces may form a piece, and unknown characters are encoded as bytes. The only exception is
    U+2581, which SentencePiece uses for the space. Ids: 0 unknown, 1 beginning of sentence, 2 end of
    sentence.

    The model is trained on at most `sample_bytes` of lines, spread evenly over the inputs, and is
    deterministic.

    Raises:
        ValueError: If the vocabulary is too small for the required pieces or too large for the text.
    """
    from sentencepiece import SentencePieceTrainer

    texts = (text for source in inputs for text in read_documents(Path(source), json_key, file_glob))
    lines = _evenly_chosen_lines(texts, sample_bytes)
    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            vocab_size=vocab_size,
            model_type=model_type,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            user_defined_symbols=["\n", "\t"],
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=num_threads,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(
            f"vocab size {vocab_size}: SentencePiece cannot train it on this text: {error}"
        ) from error
    with atomic_write(output_model) as stream:
        stream.write(model.getvalue())


def _evenly_chosen_lines(texts: Iterable[str], limit: int) -> list[str]:
    """Return every n-th non-empty line, where n is a power of two that keeps the total within `limit` bytes.

    Long lines are divided. The selection needs one pass and no random numbers.
    """
    lines = (line for text in texts for line in text.split("\n") if line)
    pieces = (line[i : i + _LINE_CHARACTERS] for line in lines for i in range(0, len(line), _LINE_CHARACTERS))
    chosen: list[str] = []
    size, stride = 0, 1
    for number, piece in enumerate(pieces):
        if number % stride == 0:
            chosen.append(piece)
            size += len(piece.encode())
            if size > limit:
                chosen, stride = chosen[::2], 2 * stride
                size = sum(len(kept.encode()) for kept in chosen)
    return chosen
