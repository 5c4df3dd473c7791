"""An exported tokenizer is what transformers' AutoTokenizer takes, with the end that lm_eval puts before a text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from transformers import AutoTokenizer

from megatron_adalrs.data.tokenizer import HuggingFaceTokenizer
from megatron_adalrs.huggingface.companions import complete_tokenizer
from megatron_adalrs.huggingface.families import GPT2, LLAMA, QWEN2, Family

TEXT = "Größe 東京 🙂, don't  I'LL: 12345\n    def f(x):\n\treturn x <|endoftext|> end\n"
IDS = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": None}


def exported(folder: Path, family: Family, **settings: Any) -> Path:
    """A model folder without weights, of a tokenizer that splits texts as GPT-2 does; Qwen2 would part the digits."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<|endoftext|>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    backend.train_from_iterator([TEXT * 3], trainer)
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"model_type": family.model_type, "vocab_size": 320} | IDS))
    if settings:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize("family", [GPT2, LLAMA, QWEN2], ids=lambda family: family.model_type)
def test_autotokenizer_takes_what_the_model_was_trained_with(tmp_path: Path, family: Family) -> None:
    folder = exported(tmp_path / "model", family)
    ours = HuggingFaceTokenizer(folder)
    complete_tokenizer(folder, family, IDS, 48)
    # Whatever is said, transformers takes Qwen2's own class for a folder of a Qwen2 model.
    theirs = AutoTokenizer.from_pretrained(folder / "tokenizer" if family is QWEN2 else folder)
    assert (folder / "tokenizer").exists() == (family is QWEN2)
    assert theirs(TEXT)["input_ids"] == ours.encode(TEXT)
    assert theirs.decode(ours.encode(TEXT)) == TEXT
    assert (theirs.eos_token, theirs.eos_token_id, theirs.bos_token) == ("<|endoftext|>", ours.eod, None)
    assert theirs.model_max_length == 48


def test_what_is_said_already_stays(tmp_path: Path) -> None:
    said = exported(tmp_path / "said", LLAMA, eos_token="!")
    before = (said / "tokenizer_config.json").read_bytes()
    complete_tokenizer(said, LLAMA, IDS, 48)
    assert (said / "tokenizer_config.json").read_bytes() == before
    own = exported(tmp_path / "own", QWEN2, tokenizer_class="Qwen2Tokenizer")
    foreign = exported(tmp_path / "foreign", QWEN2, tokenizer_class="LlamaTokenizerFast")
    for folder in (own, foreign):
        complete_tokenizer(folder, QWEN2, IDS, 48)
    assert not (own / "tokenizer").exists()
    assert sorted(path.name for path in (foreign / "tokenizer").iterdir()) == [
        "tokenizer.json",
        "tokenizer_config.json",
    ]


@pytest.mark.parametrize(
    ("tokenizer", "end", "name"),
    [
        ({"added_tokens": [], "model": {"vocab": [["a", -1.0], ["</s>", -2.0]]}}, 1, "</s>"),
        ({"added_tokens": [{"id": 7, "content": "<eos>"}], "model": {"vocab": {"a": 0}}}, 7, "<eos>"),
        ({"added_tokens": [], "model": {"vocab": {"a": 0}}}, 7, None),
        ({"added_tokens": [], "model": {"vocab": {"a": 0}}}, [0], None),
        ({"added_tokens": [], "model": "none"}, 0, None),
        ([], 0, None),
    ],
    ids=["pieces", "added", "not there", "several", "damaged", "no object"],
)
def test_the_end_is_named_where_it_is_known(tmp_path: Path, tokenizer: Any, end: Any, name: str | None) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    complete_tokenizer(tmp_path, LLAMA, {"eos_token_id": end}, 48)
    config = tmp_path / "tokenizer_config.json"
    assert (json.loads(config.read_text())["eos_token"] if config.exists() else None) == name
