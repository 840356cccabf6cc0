"""How much is worked on at a time: what measuring and pruning use, and what memory.py computes with."""

KL_TOP_K = 512
"""Tokens kept for each prediction; EvoPress found no use in more. In bfloat16 they take 3 KB a predicted token."""
GRADIENT_SAMPLES, GRADIENT_TOKENS = 10, 64
"""Samples, and tokens of each, for importance by gradients, as in LLM-Pruner: the beginnings of calibration windows."""
SENSITIVITY_WINDOWS, SENSITIVITY_TOKENS = 4, 1024
"""Windows, and tokens in all of them, for the sensitivity of units. The figures only rank units."""
ROWS_PER_CHUNK = 1024
"""Rows of a weight that are in fp32 or fp64 at a time: whole, a large model's would be gigabytes."""
LOGITS_CHUNK_BYTES = {"cpu": 24 * 2**20, "cuda": 2**30}
"""Size of one chunk of fp32 logits. On a CPU larger chunks fall out of its caches, smaller ones starve the matmul."""
