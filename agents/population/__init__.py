"""The measured candidates, and the submission of proposals. Start with population.py and view.py."""
