"""Commands of the `megatron-adalrs` program, one module each."""

from __future__ import annotations

from typing import NamedTuple


class Command(NamedTuple):
    """A command, imported only when it is called."""

    module: str
    """Name of a module of this package."""
    summary: str
    """Line in the program's `--help`."""
    function: str = "main"
    """Function of the module to call."""


COMMANDS = {
    "pretrain": Command("pretrain", "Pretrain a GPT, with or without the learning-rate search.", "run"),
    "preprocess": Command("preprocess", "Tokenize a corpus into an indexed dataset."),
    "train-tokenizer": Command("train_tokenizer", "Train a SentencePiece tokenizer on a corpus."),
    "merge": Command("merge", "Concatenate indexed datasets."),
    "check-data": Command("check_data", "Check the files of an indexed dataset, and its tokenizer."),
    "report": Command("report", "Write an HTML report on one or more runs."),
    "evaluate": Command("evaluate", "Compute loss, perplexity and bits per byte of a model on a corpus."),
    "generate": Command("generate", "Complete a prompt with a model."),
    "convert": Command("convert", "Convert checkpoints from and to the Hugging Face format."),
    "replay": Command("replay", "Run the learning-rate search on a recorded training loss."),
    "simulate": Command("simulate", "Simulate the search on a model of the loss, to plan a run."),
    "benchmark": Command("benchmark", "Measure throughput, snapshots, checkpoints and preprocessing."),
    "reproduce": Command("reproduce", "Run the experiments of the AdaLRS paper."),
    "fault-injection": Command(
        "fault_injection", "Kill small runs at random instants and check that they resume."
    ),
    "collect-sources": Command("collect_sources", "Write Python's standard library as a sample corpus."),
}
