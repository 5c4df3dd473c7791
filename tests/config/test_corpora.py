"""`--data-path` and its like: one prefix, pairs of sizes and prefixes, names."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from megatron_adalrs.cli.arguments import config_from_values, parse_arguments
from megatron_adalrs.config import DataConfig
from megatron_adalrs.config.corpora import Corpus, change_prefixes

VALUES = {"preset": "gpt2-tiny", "seq_length": 8, "train_iters": 10, "lr": 1e-3}


def data(**values: Any) -> DataConfig:
    return config_from_values(VALUES | values).data


def test_one_prefix_is_what_it_was() -> None:
    config = data(data_path="data/corpus")
    assert config.parts == (("969,30,1", (Corpus("corpus", "data/corpus", 1.0),)),)
    assert data(data_path="c", split="8,1,1").parts[0][0] == "8,1,1"
    assert config_from_values(VALUES | {"data_path": "data/corpus"}).to_flat()["data_path"] == "data/corpus"


def test_a_blend_with_names() -> None:
    expected = (Corpus("code", "data/a", 0.7), Corpus("b", "data/b", 2e9), Corpus("c", "x=y/c", 0.0))
    entries = [0.7, "code=data/a", 2e9, "data/b", 0, "./x=y/c"]
    (_, corpora), *rest = data(data_path=entries).parts
    assert not rest
    assert corpora == (*expected[:2], Corpus("c", "./x=y/c", 0.0))
    assert data(data_path=[1, "a"]).corpora == (Corpus("a", "a", 1.0),)


def test_flags_match_the_written_configuration() -> None:
    flags = (
        "--preset gpt2-tiny --seq-length 8 --train-iters 10 --lr 1e-3 --train-data-path 1 a 3 b "
        "--valid-data-path c n=d"
    )
    config = parse_arguments(f"{flags} --train-data-path 1 a 3 b --valid-data-path c n=d".split())
    assert [corpus.name for corpus in config.data.corpora] == ["a", "b", "c", "n"]
    assert [split for split, _ in config.data.parts] == ["1,0,0", "0,1,0"]
    again = config_from_values(yaml.safe_load(yaml.safe_dump(config.to_flat())))
    assert again == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "data_path: is required, or train_data_path instead of it"),
        ({"data_path": []}, "data_path: names no corpus"),
        (
            {"data_path": [1, "a", "b"]},
            "data_path: 3 entries (1 a b): required one prefix, or as many numbers as",
        ),
        (
            {"data_path": ["a", "b"]},
            "data_path: 'a' before b is not a number: required SIZE PREFIX SIZE PREFIX",
        ),
        ({"data_path": [1, "a", "x", "b"]}, "data_path: 'x' before b is not a number"),
        ({"data_path": [-1, "a", 1, "b"]}, "size -1 of a: required a finite number that is not negative"),
        ({"data_path": ["nan", "a", 1, "b"]}, "size nan of a: required a finite number that is not negative"),
        ({"data_path": ["inf", "a", 1, "b"]}, "size inf of a: required a finite number that is not negative"),
        ({"data_path": [0, "a", 0, "b"]}, "data_path: all sizes are 0: required at least one above"),
        (
            {"data_path": [1, "x/a", 1, "y/a"]},
            "data_path: 2 corpora are called 'a': required different corpora",
        ),
        ({"data_path": [1, "m=a", 1, "n=a"]}, "data_path: 2 corpora are at 'a': required different corpora"),
        ({"data_path": {"a": 1}}, "data_path: {'a': 1}: input should be a valid tuple"),
        ({"valid_data_path": "a"}, "data_path: is required, or train_data_path instead of it"),
        ({"data_path": "a", "train_data_path": "b"}, "train_data_path: contradicts data_path"),
        ({"data_path": "a", "test_data_path": "b"}, "test_data_path: contradicts data_path"),
        ({"train_data_path": "a", "split": "1,0,0"}, "split: '1,0,0' contradicts train_data_path"),
        (
            {"train_data_path": "a", "valid_data_path": ["b", "0.5", "c"]},
            "'0.5' stands among prefixes without sizes",
        ),
        ({"train_data_path": "a", "valid_data_path": ["1", "b", "c"]}, "valid_data_path: 3 entries (1 b c)"),
        ({"train_data_path": ["a", "b"]}, "train_data_path: 'a' before b is not a number"),
        (
            {"train_data_path": "a", "valid_data_path": ["x/b", "y/b"]},
            "valid_data_path: 2 corpora are called 'b'",
        ),
        (
            {"data_path": "a", "blend_sizes": "bytes"},
            "blend_sizes: 'bytes': input should be 'weights', 'tokens'",
        ),
    ],
)
def test_mistakes_are_one_sentence(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        data(**values)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_negative_size_as_flag_is_refused_by_us() -> None:
    flags = "--preset gpt2-tiny --seq-length 8 --train-iters 10 --lr 1e-3 --data-path -1 a 2 b"
    with pytest.raises(ValueError, match="size -1 of a: required a finite number that is not negative"):
        parse_arguments(flags.split())


@pytest.mark.parametrize("entry", ["x/a.bin", "x/a.idx", "x/a"])
def test_a_file_of_the_pair_means_its_prefix(entry: str) -> None:
    (corpus,) = data(data_path=entry).corpora
    assert (corpus.name, corpus.prefix) == ("a", "x/a")


def test_a_blend_in_one_string_is_split() -> None:
    in_one = data(data_path="0.3 x/a  0.7 web=x/b.bin").corpora
    assert in_one == data(data_path=["0.3", "x/a", "0.7", "web=x/b"]).corpora
    assert [corpus.prefix for corpus in data(data_path="my files/a").corpora] == ["my files/a"]
    assert change_prefixes(["0.3 a 0.7 web=b"], str.upper) == ("0.3", "A", "0.7", "web=B")
