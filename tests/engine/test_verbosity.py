"""Messages of DeepSpeed and PyTorch are shown if they are asked for."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator

import pytest

from megatron_adalrs.engine import show_library_messages

LIBRARIES = ("DeepSpeed", "torch.distributed")


@pytest.fixture(autouse=True)
def unchanged_levels() -> Iterator[None]:
    levels = {name: logging.getLogger(name).level for name in LIBRARIES}
    with warnings.catch_warnings():
        yield
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


@pytest.mark.parametrize(("verbose", "level"), [(False, logging.ERROR), (True, logging.INFO)])
def test_library_messages_follow_verbose(verbose: bool, level: int) -> None:
    show_library_messages(verbose)
    assert all(logging.getLogger(name).level == level for name in LIBRARIES)


def test_warnings_of_torch_are_quiet(recwarn: pytest.WarningsRecorder) -> None:
    warnings.simplefilter("always")
    show_library_messages(False)
    for module in ("torch.distributed.x", "torchish", "deepspeed"):
        warnings.warn_explicit(module, UserWarning, "x.py", 1, module=module)
    assert [str(warning.message) for warning in recwarn] == ["torchish"]
