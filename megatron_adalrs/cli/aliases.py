"""Spellings of Megatron-LM that the argument parser accepts beside the names of the configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class Alias(NamedTuple):
    """A flag of Megatron-LM and the flag of the configuration that it stands for."""

    flag: str
    replacement: str
    value: str | None = None
    """Value of the replacement; None if the alias itself takes the value."""


class Derived(NamedTuple):
    """A flag of Megatron-LM whose effect depends on other flags."""

    flag: str
    meaning: str
    """Effect, for the documentation."""


ALIASES = (
    Alias("--disable-bias-linear", "--no-add-bias-linear", ""),
    Alias("--encoder-seq-length", "--seq-length"),
    Alias("--layernorm-epsilon", "--norm-epsilon"),
    Alias("--recompute-activations", "--recompute-granularity", "selective"),
    Alias("--use-distributed-optimizer", "--zero-stage", "1"),
    Alias("--use-rotary-position-embeddings", "--position-embedding-type", "rope"),
)
DERIVED = (
    Derived("--finetune", "`--load DIR --finetune` is `--finetune-from DIR`; requires `--load`"),
    Derived("--group-query-attention", "requires `--num-query-groups`, which is sufficient by itself"),
    Derived(
        "--lr-warmup-fraction",
        "sets `--lr-warmup-iters` to this share of `--lr-decay-iters` (or `--train-iters`), rounded down",
    ),
    Derived(
        "--train-samples",
        "sets `--train-iters` to the samples divided by `--global-batch-size`, rounded down",
    ),
)
TOKENIZERS = {"GPTSentencePieceTokenizer": "SentencePieceTokenizer"}
"""Values of --tokenizer-type."""


def expand_aliases(arguments: Sequence[str]) -> list[str]:
    """Replace the aliases that can be translated without a configuration file.

    Raises:
        ValueError: An alias contradicts another flag, or lacks the flag that it requires.
    """
    given = list(arguments)
    for alias in ALIASES:
        given = _expand(given, alias)
    return rename_tokenizer(_expand_finetune(given))


def derive_lengths(arguments: Sequence[str], values: Mapping[str, Any]) -> list[str]:
    """Replace the aliases whose value follows from other fields.

    Args:
        arguments: Command line, after `expand_aliases`.
        values: Fields of the preset and of the configuration file.

    Raises:
        ValueError: An alias contradicts another flag, is not a valid number, or lacks a field that it
            requires.
    """
    given = _require_query_groups(list(arguments), values)
    given = _derive_train_iters(given, values)
    return _derive_warmup(given, values)


def rename_tokenizer(arguments: Sequence[str]) -> list[str]:
    """Replace Megatron-LM's names of tokenizers in the values of --tokenizer-type."""
    found = list(arguments)
    for index, token in enumerate(found):
        name, equals, value = token.partition("=")
        if _plain(name) != "--tokenizer-type":
            continue
        if equals:
            found[index] = f"{name}={TOKENIZERS.get(value, value)}"
        elif index + 1 < len(found):
            found[index + 1] = TOKENIZERS.get(found[index + 1], found[index + 1])
    return found


def _expand(given: list[str], alias: Alias) -> list[str]:
    positions = _positions(given, alias.flag)
    if not positions:
        return given
    if alias.value is None:
        _require_absent(given, alias.flag, alias.replacement)
        return [
            alias.replacement + token[len(alias.flag) :] if index in positions else token
            for index, token in enumerate(given)
        ]
    if any("=" in given[index] for index in positions):
        raise ValueError(f"{alias.flag}: takes no value")
    rest = _without_switch(given, alias.flag)
    opposite = alias.replacement.replace("--no-", "--", 1) if not alias.value else None
    other = _value(rest, alias.replacement) if alias.value else None
    if opposite is not None:
        _require_absent(rest, alias.flag, opposite)
    if other is not None and other != alias.value:
        raise ValueError(f"{alias.flag}: contradicts {alias.replacement} {other}; give only one of them")
    return [*rest, alias.replacement, *([alias.value] if alias.value else [])]


def _expand_finetune(given: list[str]) -> list[str]:
    flag = "--finetune"
    if not _positions(given, flag):
        return given
    _require_absent(given, flag, "--finetune-from")
    rest = _without_switch(given, flag)
    source = _value(rest, "--load")
    if source is None:
        raise ValueError(f"{flag}: requires --load with the checkpoint whose weights the run begins with")
    return [*_without(rest, "--load"), "--finetune-from", source]


def _require_query_groups(given: list[str], values: Mapping[str, Any]) -> list[str]:
    flag = "--group-query-attention"
    if not _positions(given, flag):
        return given
    if _field(given, values, "num_query_groups") is None:
        raise ValueError(f"{flag}: requires --num-query-groups, the number of key-value heads")
    return _without_switch(given, flag)


def _derive_train_iters(given: list[str], values: Mapping[str, Any]) -> list[str]:
    flag = "--train-samples"
    samples = _value(given, flag)
    if samples is None:
        return given
    _require_absent(given, flag, "--train-iters")
    size = _field(given, values, "global_batch_size")
    if size is None:
        raise ValueError(f"{flag}: requires --global-batch-size, the samples in a step")
    steps = int(_number(flag, samples)) // int(_number("--global-batch-size", size))
    if steps < 1:
        raise ValueError(f"{flag}: {samples} samples are less than one step of --global-batch-size {size}")
    return [*_without(given, flag), "--train-iters", str(steps)]


def _derive_warmup(given: list[str], values: Mapping[str, Any]) -> list[str]:
    flag = "--lr-warmup-fraction"
    text = _value(given, flag)
    if text is None:
        return given
    _require_absent(given, flag, "--lr-warmup-iters")
    fraction = _number(flag, text)
    if not 0 <= fraction < 1:
        raise ValueError(f"{flag}: {text}: must be at least 0 and below 1")
    length = _field(given, values, "lr_decay_iters") or _field(given, values, "train_iters")
    if length is None:
        raise ValueError(f"{flag}: requires --train-iters or --lr-decay-iters, of which it is a share")
    steps = int(fraction * _number("--train-iters", length))
    return [*_without(given, flag), "--lr-warmup-iters", str(steps)]


def _plain(token: str) -> str:
    """Return the flag of a token, with hyphens instead of underscores and without a value."""
    flag = token.partition("=")[0]
    return flag.replace("_", "-") if flag.startswith("--") else flag


def _positions(given: Sequence[str], flag: str) -> list[int]:
    return [index for index, token in enumerate(given) if _plain(token) == flag]


def find_value(given: Sequence[str], flag: str) -> str | None:
    """Return the last value of a flag, or None if the flag is not given, or given without a value."""
    positions = _positions(given, flag)
    if not positions:
        return None
    _, equals, value = given[positions[-1]].partition("=")
    following = given[positions[-1] + 1 : positions[-1] + 2]
    if equals:
        return value
    return following[0] if following else None


def _value(given: Sequence[str], flag: str) -> str | None:
    """Return the last value of a flag, or None if the flag is not given.

    Raises:
        ValueError: The flag is given without a value.
    """
    value = find_value(given, flag)
    if value is None and _positions(given, flag):
        raise ValueError(f"{flag}: requires a value")
    return value


def _without_switch(given: Sequence[str], flag: str) -> list[str]:
    """Return the command line without a flag that takes no value."""
    positions = _positions(given, flag)
    return [token for index, token in enumerate(given) if index not in positions]


def _without(given: Sequence[str], flag: str) -> list[str]:
    """Return the command line without a flag that takes a value."""
    removed = set()
    for index in _positions(given, flag):
        removed |= {index} if "=" in given[index] else {index, index + 1}
    return [token for index, token in enumerate(given) if index not in removed]


def _require_absent(given: Sequence[str], flag: str, other: str) -> None:
    if _positions(given, other):
        raise ValueError(f"{flag}: contradicts {other}; give only one of them")


def _field(given: Sequence[str], values: Mapping[str, Any], name: str) -> Any:
    value = _value(given, f"--{name.replace('_', '-')}")
    return values.get(name) if value is None else value


def _number(flag: str, text: Any) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{flag}: {text!r}: must be a number") from None
