"""How busy the workers of a whole search are, measured on a real queue and simulated for larger machines."""
