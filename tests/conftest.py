"""Options and fixtures of the whole suite."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")

from tests.data.corpora import counting_corpus
from tests.helpers.ranks import Ranks


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--system", action="store_true", help="also run tests that need Debian packages or rights"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--system"):
        for item in items:
            if item.get_closest_marker("system"):
                item.add_marker(pytest.mark.skip(reason="needs system packages: run ./tests/run.sh --system"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create the corpus of `counting_corpus` and return its prefix; some modules override this."""
    return counting_corpus(tmp_path_factory.mktemp("data") / "counting")


@pytest.fixture(scope="session")
def one_rank() -> Iterator[Ranks]:
    """A process of its own that is a world of one: what several ranks are compared with."""
    ranks = Ranks(1)
    yield ranks
    ranks.close()


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[Ranks]:
    """Two gloo ranks, started at the first use and shared by all tests."""
    ranks = Ranks(2)
    yield ranks
    ranks.close()


@pytest.fixture(scope="session")
def four_ranks() -> Iterator[Ranks]:
    """Four gloo ranks; idle processes cost memory only."""
    ranks = Ranks(4)
    yield ranks
    ranks.close()


@pytest.fixture(scope="session")
def eight_ranks() -> Iterator[Ranks]:
    """Eight gloo ranks, for a mesh of three axes."""
    ranks = Ranks(8)
    yield ranks
    ranks.close()
