"""Training of SentencePiece models that keep source code intact."""

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
    """Train a SentencePiece model that gives back any text it encodes, and write it to a file.

    Every byte survives: no normalisation, no added or removed blanks, newline and tab are pieces of their
    own, runs of blanks may become pieces, and what is not in the vocabulary falls back to bytes. The one
    exception is U+2581, which SentencePiece itself uses for the blank. Ids: 0 unknown, 1 beginning, 2 end of
    sentence.

    The same inputs (what `read_documents` reads) give the same file: it is trained on at most `sample_bytes`
    of lines, spread evenly over all. 10 MB take a few seconds with bpe, half a minute with unigram. Raises
    ValueError if the vocabulary is too small for the pieces that are required or too large for the text.
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
    """Every n-th non-empty line, n a power of two such that all together stay within `limit` bytes.

    Long lines are cut. One pass, no randomness, and no need to know how much text there is.
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
