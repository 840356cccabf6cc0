"""Logs, files, locks, paths, signals and secrets of a process. Start with logs.py."""
