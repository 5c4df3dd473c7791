"""Random damage to files, as Hypothesis strategies: bytes flipped, removed, inserted, repeated."""

from __future__ import annotations

from hypothesis import strategies as st

STRANGE = [b"\xff" * 8, b"\0" * 8, b"\xff" * 7 + b"\x7f", b"-1", b"9" * 40, b"[" * 5000]
"""Numbers at the limits of their types, and deeper nesting than a parser accepts."""


@st.composite
def mutated(draw: st.DrawFn, whole: bytes, most: int = 3) -> bytes:
    """Draw `whole` after one to `most` mutations."""
    content = whole
    for _ in range(draw(st.integers(1, most))):
        place = draw(st.integers(0, len(content)))
        kind = draw(st.sampled_from(["flip", "set", "cut", "insert", "remove", "splice", "repeat"]))
        length = draw(st.integers(1, 16))
        if kind == "flip" and place < len(content):
            content = (
                content[:place]
                + bytes([content[place] ^ 1 << draw(st.integers(0, 7))])
                + content[place + 1 :]
            )
        elif kind == "set":
            strange = draw(st.sampled_from(STRANGE))
            content = content[:place] + strange + content[place + len(strange) :]
        elif kind == "cut":
            content = content[:place]
        elif kind == "insert":
            content = content[:place] + draw(st.binary(min_size=1, max_size=16)) + content[place:]
        elif kind == "remove":
            content = content[:place] + content[place + length :]
        elif kind == "splice":
            source = draw(st.integers(0, len(whole)))
            content = content[:place] + whole[source : source + length] + content[place + length :]
        else:
            content = content[:place] + content[max(0, place - length) : place] + content[place:]
    return content


def bytes_like(text: str) -> st.SearchStrategy[bytes]:
    """Draw damaged text, or random bytes."""
    return st.one_of(mutated(text.encode()), st.binary(max_size=50))
