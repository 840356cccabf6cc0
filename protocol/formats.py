"""The formats that a pruned model is exported in."""

from typing import Literal

Format = Literal["hf", "padded", "gguf"]
"""For transformers and vLLM; for whatever loads the dense model; for llama.cpp."""
KEPT_TEXT = "measured-text.json"
"""The file of an export that holds the tokens it was measured on, where the dense model wrote them."""
GgufType = Literal["f16", "q8_0", "q6_k", "q5_k_m", "q5_1", "q5_0", "q4_k_m", "q4_1", "q4_0"]
"""How the weights of a GGUF are stored, by llama.cpp's names for it."""
Engine = Literal["transformers", "llama.cpp", "vllm"]
"""What runs a model where its speed is measured."""
