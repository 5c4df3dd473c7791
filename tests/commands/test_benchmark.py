"""`megatron-adalrs benchmark` with small models: all figures are there; their values are not checked."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable

import pytest

from tests.helpers.programs import Done, called

TINY = "--num-layers 1 --hidden-size 16 --num-attention-heads 2 --seq-length 8 --micro-batch-size 1 --pairs 2"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    return called("benchmark", monkeypatch, capsys)


def test_overhead_compares_modes_with_a_fixed_rate(benchmark: Callable[..., Done]) -> None:
    code, output, errors = benchmark("--what", "overhead", *TINY.split())
    assert code == 0
    results = json.loads(output)
    cells = {f"dp{ranks}_zero{stage}": ranks for ranks in (1, 2) for stage in range(4)}
    assert [name for name in results if name.startswith("dp")] == list(cells)
    assert all(name in errors for name in cells)
    for name, ranks in cells.items():
        cell = results[name]
        assert len(cell["ranks"]) == ranks
        for rank in cell["ranks"]:
            # A model this small is mostly padding to shards.
            assert rank["bytes"] == pytest.approx(rank["bytes_estimated_before_the_run"], rel=0.2)
        for mode in ("paper", "robust"):
            assert cell[f"overhead_{mode}"] > -1 and cell[f"decision_{mode}"] > 0
            search = cell["searches"][mode]
            assert search["captures"] > 1 and search["restores"] > 1
            assert 0 < search["snapshots_of_run"] < 1
    assert results["dp2_zero1"]["ranks"][0]["bytes"] < 0.6 * results["dp1_zero1"]["ranks"][0]["bytes"]


def test_steps_and_snapshots_have_a_baseline(benchmark: Callable[..., Done]) -> None:
    code, output, _ = benchmark(*TINY.split(), "--threads", "1")
    results = json.loads(output)
    assert code == 0
    assert list(results) == ["model", "torch", "step", "watching", "snapshot", "saving"]
    assert results["step"]["speed_against_plain_loop"] > 0
    assert results["snapshot"]["bytes"] > 0


def test_preprocessing_is_compared_with_plain_loops(
    benchmark: Callable[..., Done],
) -> None:
    code, output, _ = benchmark(
        "--what", "preprocessing", "--corpus-mb", "1.2", "--pairs", "1", "--workers", "2"
    )
    results = json.loads(output)
    assert code == 0
    assert results["workers"] == 2 and results["blocks"] == 3
    assert results["corpus"]["tokens"] > results["corpus"]["documents"] > 0
    assert set(results["tokens_per_second"]) == {"plain_loop", "one_worker", "workers", "plain_loops"}
    for name, value in results.items():
        if "against" in name or "after" in name:
            assert value > 0
    assert {name for name in results if "cpu_time" in name} == {
        "one_worker_against_plain_loop_in_cpu_time",
        "workers_against_plain_loops_in_cpu_time",
    }


def test_preprocessing_needs_batches_and_workers(benchmark: Callable[..., Done]) -> None:
    small = benchmark("--what", "preprocessing", "--corpus-mb", "1", "--workers", "2")
    assert small.returncode == 2
    assert small.stderr == "error: corpus_mb 1: has 3 batches; two for each of 2 workers are required\n"
    alone = benchmark("--what", "preprocessing", "--workers", "1")
    assert alone.returncode == 2
    assert alone.stderr == "error: workers 1: at least 2 are required, to compare with one\n"


def test_an_order_is_built_and_opened(benchmark: Callable[..., Done]) -> None:
    code, output, _ = benchmark("--what", "index", "--tokens", "100000", "--documents", "100")
    results = json.loads(output)
    assert code == 0
    assert (results["tokens"], results["documents"]) == (100_000, 100)
    for step in ("write_idx", "open_idx", "build", "open_cached"):
        assert results[step]["seconds"] > 0 and results[step]["memory_bytes"] >= 0


def test_fewer_tokens_than_documents_are_refused(benchmark: Callable[..., Done]) -> None:
    refused = benchmark("--what", "index", "--tokens", "10", "--documents", "11")
    assert refused == (2, "", "error: documents 11: required 1 to tokens(10)\n")


def test_a_missing_temporary_folder_is_reported(
    benchmark: Callable[..., Done], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere")
    refused = benchmark("--what", "index")
    assert refused.returncode == 2
    assert (
        refused.stderr.startswith("error: ")
        and "/nowhere" in refused.stderr
        and refused.stderr.count("\n") == 1
    )
