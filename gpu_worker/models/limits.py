"""Chunk sizes and sample counts that measuring and pruning use, and that memory.py computes with."""

KL_TOP_K = 512
"""Number of logits kept for each prediction of the dense model; EvoPress found no benefit in more. With their tokens,
they take 3 KB per prediction in bfloat16."""
GRADIENT_SAMPLES, GRADIENT_TOKENS = 10, 64
"""Number of samples, and of tokens per sample, for gradient importance, as in LLM-Pruner. Samples are the beginnings of
calibration windows."""
SENSITIVITY_WINDOWS = 16
"""Number of windows that the tokens of a sensitivity come from. Many short windows show more than a few long ones: the
first attention block of SmolLM2 does great harm in some windows and little in most."""
ROWS_PER_CHUNK = 1024
"""Number of rows of a weight converted to fp32 or fp64 at a time. All rows of a large model's weight would take
gigabytes."""
LOGITS_CHUNK_BYTES = {"cpu": 24 * 2**20, "cuda": 2**30}
"""Maximum bytes of one chunk of fp32 logits, by device type. On a CPU, larger chunks do not fit its caches, and smaller
chunks slow the matmul."""
