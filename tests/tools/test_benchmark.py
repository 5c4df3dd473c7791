"""The benchmark's larger measurement for real, small: that every figure is there, not what it is."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / "tools"
TINY = "--num-layers 1 --hidden-size 16 --num-attention-heads 2 --seq-length 8 --micro-batch-size 1 --pairs 2"


def test_overhead_compares_a_fixed_rate_with_both_modes_in_every_grid(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(TOOLS))
    monkeypatch.setattr("sys.argv", ["benchmark.py", "--what", "overhead", *TINY.split()])
    specification = importlib.util.spec_from_file_location("benchmark", TOOLS / "benchmark.py")
    benchmark = importlib.util.module_from_spec(specification)
    monkeypatch.setitem(sys.modules, "benchmark", benchmark)
    specification.loader.exec_module(benchmark)
    assert benchmark.main() == 0
    output, errors = capsys.readouterr()
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
