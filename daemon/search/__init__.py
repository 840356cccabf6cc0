"""Algorithm 1 of the paper: select, mutate, cross over, collect. Start with search.py."""
