"""Expansion of paths as a shell does it."""

from __future__ import annotations

import pytest

from megatron_adalrs.utils.paths import expand_path


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("~/data", "/home/me/data"),
        ("~", "/home/me"),
        ("$DATA/x", "/big/x"),
        ("a/${DATA}b", "a//bigb"),
        ("a~b", "a~b"),
        ("a/~", "a/~"),
        ("cost$5", "cost$5"),
        ("plain", "plain"),
    ],
)
def test_home_and_variables(monkeypatch: pytest.MonkeyPatch, path: str, expected: str) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("DATA", "/big")
    assert expand_path(path) == expected


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("$NO_SUCH/x", "environment variable NO_SUCH is not set"),
        ("${NO_SUCH}", "environment variable NO_SUCH is not set"),
        ("$EMPTY/x", "environment variable EMPTY is not set"),
        ("~no_such_user/x", "~no_such_user is not the home of a known user"),
    ],
)
def test_unknown_names_are_refused(monkeypatch: pytest.MonkeyPatch, path: str, message: str) -> None:
    monkeypatch.delenv("NO_SUCH", raising=False)
    monkeypatch.setenv("EMPTY", "")
    with pytest.raises(ValueError, match=message):
        expand_path(path)
