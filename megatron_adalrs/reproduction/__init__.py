"""The parts of tools/reproduce_paper.py: corpora, plan of runs, runner, results, tables, plots and page."""
