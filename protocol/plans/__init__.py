"""Pruning rates, model shapes, plans, candidates and search specs: pure values. Start with rates.py and plan.py."""
