"""How busy the workers of a whole search are, measured on a real queue and simulated for what no one has at home."""
