"""Small benchmarks of single parts, and long runs under faults."""
