"""How fast a worker measures candidates, beside what its matrix products alone take and beside the naive way."""
