"""The commands of `selfpruner`, their flags and tables. Start with run.py, or pruning.py for those without a search."""
