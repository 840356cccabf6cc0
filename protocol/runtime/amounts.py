"""Amounts in words."""

GB = 1e9


def gigabytes(amount: int) -> str:
    """`amount` bytes for people."""
    return f"{amount / GB:.1f} GB" if amount >= 0.05 * GB else f"{amount / 1e6:.1f} MB"
