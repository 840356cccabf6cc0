"""Chunk sizes and sample counts that measuring and pruning use, and that memory.py computes with."""

KL_TOP_K = 512
"""Logits kept for each prediction of the dense model; EvoPress found no benefit in more. They take 3 KB per predicted
token in bfloat16."""
GRADIENT_SAMPLES, GRADIENT_TOKENS = 10, 64
"""Samples and tokens per sample for gradient importance, as in LLM-Pruner: the beginnings of calibration windows."""
SENSITIVITY_WINDOWS, SENSITIVITY_TOKENS = 4, 1024
"""Windows, and tokens in all of them, that measure the sensitivity of units, which only ranks them."""
ROWS_PER_CHUNK = 1024
"""Rows of a weight converted to fp32 or fp64 at a time: all rows of a large model's weight would take gigabytes."""
LOGITS_CHUNK_BYTES = {"cpu": 24 * 2**20, "cuda": 2**30}
"""Bytes of one chunk of fp32 logits. On a CPU, larger chunks do not fit its caches and smaller ones slow the matmul."""
