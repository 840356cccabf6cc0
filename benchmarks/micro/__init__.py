"""Benchmarks of single parts (speed, memory or accuracy), and long runs under faults."""
