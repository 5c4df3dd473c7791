"""Convert SentencePiece models to backends of the package tokenizers, with the same ids for any text."""

from __future__ import annotations

from math import isclose
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor
    from tokenizers import Tokenizer as Backend

BLANK = "\u2581"  # SentencePiece writes it for " "
SAMPLE = (
    "Ελληνικά, Кириллица, עברית, العربية, हिन्दी, ไทย, 中文, 日本語かな, 한국어, ქართული, አማርኛ",
    "naïve cafe\u0301 ﬁ ½ ＡＢＣ",
    "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 \x00 \x7f \ufeff no-break\u00a0blank \u2028",
    "def f(x):\n\tif x:\r\n\t\treturn  1   \n\n\n        # \t \t done\n    ",
    "<s>not a marker</s> <unk> <0x41> <|endoftext|>",
    "  lead, trail  ",
    " ",
)


def backend_of(model: bytes) -> tuple[Backend | None, str]:
    """Return a backend that encodes like a SentencePiece model, or None and the reason why there is none.

    The two are compared on a sample and on every piece of the model. They may choose different segmentations
    of a unigram model that are equally likely up to rounding: SentencePiece adds scores in float32, the
    package tokenizers in float64.

    Args:
        model: Content of the .model file.
    """
    from sentencepiece import SentencePieceProcessor

    try:
        from sentencepiece.sentencepiece_model_pb2 import (  # type: ignore[attr-defined]  # made at run time
            ModelProto,
        )
    except Exception as error:  # protobuf has an exception of its own for modules of another version
        return None, f"the package sentencepiece needs another protobuf: {error}"
    proto = ModelProto()
    proto.ParseFromString(model)
    if reason := _unsupported(proto):
        return None, reason
    backend = (_bpe if proto.trainer_spec.model_type == proto.trainer_spec.BPE else _unigram)(proto)
    processor = SentencePieceProcessor(model_proto=model)
    pieces = (piece.piece.replace(BLANK, " ") for piece in proto.pieces if piece.type == piece.NORMAL)
    for text in (*SAMPLE, *pieces):
        if not _is_same(processor, backend, text):
            return None, f"the package tokenizers would encode {text[:40]!r} as other tokens"
    return backend, ""


def _unsupported(proto: Any) -> str:
    """Describe what a backend cannot reproduce; empty if there is nothing."""
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    if trainer.model_type not in (trainer.BPE, trainer.UNIGRAM):
        kind = trainer.ModelType.Name(trainer.model_type).lower()
        return f"SentencePiece models of type {kind} are not supported"
    if normalizer.precompiled_charsmap or proto.denormalizer_spec.precompiled_charsmap:
        return f"it normalizes text ({normalizer.name or 'with its own rules'})"
    if (
        normalizer.remove_extra_whitespaces
        or not normalizer.escape_whitespaces
        or trainer.treat_whitespace_as_suffix
    ):
        return "it has its own rules for whitespace"
    if not trainer.byte_fallback:
        return "it has no byte fallback"
    if any(piece.type == piece.UNUSED for piece in proto.pieces):
        return "it has unused pieces"
    return ""


def _bpe(proto: Any) -> Backend:
    """Build a BPE backend.

    Every pair of pieces that together form a third piece is a merge. As in SentencePiece, merges into pieces
    of higher score come first.
    """
    from tokenizers import Tokenizer as Backend
    from tokenizers import models

    order = {
        piece.piece: (-piece.score, i) for i, piece in enumerate(proto.pieces) if piece.type == piece.NORMAL
    }
    merges = sorted(
        (rank, cut, piece[:cut], piece[cut:])
        for piece, rank in order.items()
        for cut in range(1, len(piece))
        if piece[:cut] in order and piece[cut:] in order
    )
    ids = {piece.piece: i for i, piece in enumerate(proto.pieces)}
    pairs = [(left, right) for *_, left, right in merges]
    model = models.BPE(
        ids, pairs, unk_token=proto.pieces[_unknown(proto)].piece, byte_fallback=True, fuse_unk=True
    )
    return _finished(Backend(model), proto, [], [])


def _unigram(proto: Any) -> Backend:
    """Build a unigram backend.

    The backend would match the names of control pieces and bytes, such as <0x41>, in a text. Therefore "<" is
    replaced by a character that no text has.
    """
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, normalizers

    used = set().union(*(piece.piece for piece in proto.pieces))
    # The search begins with characters that Unicode will never assign. Decoding would change a text that has
    # this character.
    stand_in = next(character for character in map(chr, range(0x10FFFF, 0xFFFF, -1)) if character not in used)
    vocabulary = [
        (piece.piece.replace("<", stand_in) if piece.type == piece.NORMAL else piece.piece, piece.score)
        for piece in proto.pieces
    ]
    backend = Backend(models.Unigram(vocabulary, unk_id=_unknown(proto), byte_fallback=True))
    return _finished(backend, proto, [normalizers.Replace("<", stand_in)], [decoders.Replace(stand_in, "<")])


def _finished(backend: Backend, proto: Any, before: list[Any], after: list[Any]) -> Backend:
    """Add whitespace handling, special tokens and user-defined pieces to a backend.

    Args:
        before: Further normalizers.
        after: Further decoders.
    """
    from tokenizers import AddedToken, decoders, normalizers

    prefix, strip = [], []
    if proto.normalizer_spec.add_dummy_prefix:
        prefix, strip = [normalizers.Prepend(BLANK)], [decoders.Strip(" ", 1, 0)]
    backend.normalizer = normalizers.Sequence([*before, *prefix, normalizers.Replace(" ", BLANK)])
    # Bytes are decoded first, because a piece may look like a byte after its whitespace is restored.
    backend.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Fuse(), decoders.Replace(BLANK, " "), *after, *strip]
    )
    special = [piece.piece for piece in proto.pieces if piece.type in (piece.CONTROL, piece.UNKNOWN)]
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    named = [piece.piece for piece in proto.pieces if piece.type == piece.USER_DEFINED]
    backend.add_tokens([AddedToken(name, special=False, normalized=False) for name in named])
    backend.encode_special_tokens = True  # as in SentencePiece, which matches no control piece in a text
    return backend


def _unknown(proto: Any) -> int:
    return next(i for i, piece in enumerate(proto.pieces) if piece.type == piece.UNKNOWN)


def _is_same(processor: SentencePieceProcessor, backend: Backend, text: str) -> bool:
    theirs, ours = processor.encode(text, out_type=int), backend.encode(text, add_special_tokens=False).ids
    if theirs != ours and not isclose(_score(processor, theirs), _score(processor, ours), rel_tol=1e-5):
        return False
    return bool(backend.decode(ours, skip_special_tokens=False) == processor.decode(theirs))


def _score(processor: SentencePieceProcessor, ids: list[int]) -> float:
    """Return the log-likelihood of a segmentation in a unigram model."""
    return sum(processor.get_score(token) for token in ids)
