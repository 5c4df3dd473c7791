"""The experiments of `megatron-adalrs reproduce`: corpora, plan of runs, runner, results, tables, plots and
page."""
