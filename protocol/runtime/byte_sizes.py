"""Byte sizes as text."""

GB = 1e9


def gigabytes(amount: int) -> str:
    """Return `amount` bytes as text, such as `1.5 GB` or `20.0 MB`."""
    return f"{amount / GB:.1f} GB" if amount >= 0.05 * GB else f"{amount / 1e6:.1f} MB"
