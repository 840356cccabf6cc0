"""The measured candidates, and how a proposal is handed in. Start with population.py and view.py."""
