"""Measures one part at a time: its speed, memory or accuracy; and long runs under faults."""
