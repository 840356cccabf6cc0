"""Candidates and outcomes in Redis. Start with keys.py, then streams.py and jobs.py."""
