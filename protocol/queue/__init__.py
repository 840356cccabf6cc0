"""Candidates and outcomes on their way through Redis. Start with keys.py, then streams.py and jobs.py."""
