"""Experiments of `megatron-adalrs reproduce`: plan, corpora, runner, results, tables, plots and report."""
