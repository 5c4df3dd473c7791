"""SentencePiece models as the backend of a tokenizer.json, with the same ids for any text."""

from __future__ import annotations

from math import isclose
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor
    from tokenizers import Tokenizer as Backend

BLANK = "\u2581"  # SentencePiece's for " "
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
    """A backend that encodes as a SentencePiece model does, or else None and the reason.

    It was compared on a sample and on every piece of the model. Two segmentations of a unigram model that are
    equally likely but for rounding may be told apart otherwise: SentencePiece adds up in float32, the package
    tokenizers in float64.

    Args:
        model: content of the .model file.
    """
    from sentencepiece import SentencePieceProcessor

    try:
        from sentencepiece.sentencepiece_model_pb2 import ModelProto
    except (
        Exception
    ) as error:  # protobuf raises one of its own where it is not of the version that made this module
        return None, f"the package sentencepiece needs another protobuf: {error}"
    proto = ModelProto()
    proto.ParseFromString(model)
    if reason := _unlike_any(proto):
        return None, reason
    backend = (_bpe if proto.trainer_spec.model_type == proto.trainer_spec.BPE else _unigram)(proto)
    processor = SentencePieceProcessor(model_proto=model)
    pieces = (piece.piece.replace(BLANK, " ") for piece in proto.pieces if piece.type == piece.NORMAL)
    for text in (*SAMPLE, *pieces):
        if not _alike(processor, backend, text):
            return None, f"the package tokenizers would encode {text[:40]!r} as other tokens"
    return backend, ""


def _unlike_any(proto: Any) -> str:
    """What a backend cannot be made to do, in words; empty: nothing."""
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    if trainer.model_type not in (trainer.BPE, trainer.UNIGRAM):
        return f"a SentencePiece model of type {trainer.ModelType.Name(trainer.model_type).lower()} has none"
    if normalizer.precompiled_charsmap or proto.denormalizer_spec.precompiled_charsmap:
        return f"it normalises text ({normalizer.name or 'by rules of its own'})"
    if (
        normalizer.remove_extra_whitespaces
        or not normalizer.escape_whitespaces
        or trainer.treat_whitespace_as_suffix
    ):
        return "it has rules of its own for blanks"
    if not trainer.byte_fallback:
        return "it has no bytes to fall back to"
    if any(piece.type == piece.UNUSED for piece in proto.pieces):
        return "it has unused pieces"
    return ""


def _bpe(proto: Any) -> Backend:
    """Every pair of pieces that make a third is a merge; those of better scores come first, as in
    SentencePiece."""
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
    """The backend would find the names of control pieces and bytes, such as <0x41>, in texts: "<" has another
    name."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, normalizers

    used = set().union(*(piece.piece for piece in proto.pieces))
    # Beginning with characters that Unicode promises never to assign. A text with this one would not come
    # back.
    stand_in = next(character for character in map(chr, range(0x10FFFF, 0xFFFF, -1)) if character not in used)
    vocabulary = [
        (piece.piece.replace("<", stand_in) if piece.type == piece.NORMAL else piece.piece, piece.score)
        for piece in proto.pieces
    ]
    backend = Backend(models.Unigram(vocabulary, unk_id=_unknown(proto), byte_fallback=True))
    return _finished(backend, proto, [normalizers.Replace("<", stand_in)], [decoders.Replace(stand_in, "<")])


def _finished(backend: Backend, proto: Any, before: list[Any], after: list[Any]) -> Backend:
    """With blanks, special tokens and user-defined pieces; `before`, `after`: further steps to take with
    texts."""
    from tokenizers import AddedToken, decoders, normalizers

    prefix, strip = [], []
    if proto.normalizer_spec.add_dummy_prefix:
        prefix, strip = [normalizers.Prepend(BLANK)], [decoders.Strip(" ", 1, 0)]
    backend.normalizer = normalizers.Sequence([*before, *prefix, normalizers.Replace(" ", BLANK)])
    # Bytes come first: pieces that look like bytes once their blanks are back are none.
    backend.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Fuse(), decoders.Replace(BLANK, " "), *after, *strip]
    )
    special = [piece.piece for piece in proto.pieces if piece.type in (piece.CONTROL, piece.UNKNOWN)]
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    named = [piece.piece for piece in proto.pieces if piece.type == piece.USER_DEFINED]
    backend.add_tokens([AddedToken(name, special=False, normalized=False) for name in named])
    backend.encode_special_tokens = True  # as SentencePiece, which finds no control piece in a text
    return backend


def _unknown(proto: Any) -> int:
    return next(i for i, piece in enumerate(proto.pieces) if piece.type == piece.UNKNOWN)


def _alike(processor: SentencePieceProcessor, backend: Backend, text: str) -> bool:
    theirs, ours = processor.encode(text, out_type=int), backend.encode(text, add_special_tokens=False).ids
    if theirs != ours and not isclose(_score(processor, theirs), _score(processor, ours), rel_tol=1e-5):
        return False
    return backend.decode(ours, skip_special_tokens=False) == processor.decode(theirs)


def _score(processor: SentencePieceProcessor, ids: list[int]) -> float:
    """Of a segmentation: its logarithmic likelihood in a unigram model."""
    return sum(processor.get_score(token) for token in ids)
