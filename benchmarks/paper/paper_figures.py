"""The paper's own figures, Tables 1 to 7 of "Towards Efficient Automatic Self-Pruning of Large Language Models".

Rates are shares, accuracies are percentages. None means that the paper has no figure (LLM-Pruner on LLaMA-2-70B). The
means of Table 2 agree with Tables 8 to 11. In other places the paper contradicts itself:

- Table 7, LLaMA-2-7B at 20 %: 115.39 tokens/s are 1.38 times 83.77, but the speed-up is given as 1.23. All other
  speed-ups are the ratios of their tokens/s.
- §4.3 says that Self-Pruner beats LLM-Pruner by 14.59 points on LLaMA-2-7B at 50 %. In Table 2 this is the difference
  to Wanda-sp; the difference to LLM-Pruner is 10.90.
- §4.4 mentions four LLMs but names three, and refers to Table 5 instead of Table 4.
- The memory in Table 7 is that of the weights alone, two bytes per parameter, in GiB: 6.74 B parameters are 12.55 "GB".

The paper states neither the window length of its perplexities nor which version of Vicuna it pruned; we assume v1.5.
"""

MODELS = (
    "LLaMA-1-7B",
    "LLaMA-1-13B",
    "LLaMA-2-7B",
    "LLaMA-2-13B",
    "LLaMA-2-70B",
    "LLaMA-3-8B",
    "LLaMA-3.1-8B",
    "Vicuna-13B",
)
"""The models in the order of the columns."""
HUB_NAMES = {
    "huggyllama/llama-7b": "LLaMA-1-7B",
    "huggyllama/llama-13b": "LLaMA-1-13B",
    "meta-llama/Llama-2-7b-hf": "LLaMA-2-7B",
    "meta-llama/Llama-2-13b-hf": "LLaMA-2-13B",
    "meta-llama/Llama-2-70b-hf": "LLaMA-2-70B",
    "meta-llama/Meta-Llama-3-8B": "LLaMA-3-8B",
    "meta-llama/Llama-3.1-8B": "LLaMA-3.1-8B",
    "meta-llama/Meta-Llama-3.1-8B": "LLaMA-3.1-8B",
    "lmsys/vicuna-13b-v1.5": "Vicuna-13B",
}
"""Hub names of the paper's models."""
Grid = dict[float, dict[str, tuple[float | None, ...]]]
PERPLEXITY: Grid = {
    0: {
        "Dense": (5.68, 5.09, 5.12, 4.57, 3.12, 6.05, 6.18, 5.94),
    },
    0.2: {
        "LLM-Pruner": (9.87, 7.72, 10.48, 8.00, None, 12.02, 12.77, 9.95),
        "Wanda-sp": (13.46, 7.74, 12.01, 7.45, 4.27, 12.61, 11.35, 9.45),
        "Self-Pruner": (9.07, 7.32, 9.92, 6.46, 4.24, 10.35, 10.37, 7.94),
    },
    0.3: {
        "LLM-Pruner": (18.42, 11.47, 17.90, 11.64, None, 20.94, 21.17, 13.97),
        "Wanda-sp": (21.02, 10.74, 24.53, 14.01, 5.10, 37.46, 27.00, 16.10),
        "Self-Pruner": (16.64, 9.92, 16.25, 10.26, 5.00, 16.80, 16.79, 11.08),
    },
    0.4: {
        "LLM-Pruner": (35.82, 21.73, 46.32, 21.68, None, 39.32, 44.27, 26.95),
        "Wanda-sp": (40.79, 27.53, 38.65, 69.86, 6.74, 71.97, 58.49, 144.68),
        "Self-Pruner": (30.17, 14.44, 28.52, 16.92, 5.95, 33.57, 41.46, 18.07),
    },
    0.5: {
        "LLM-Pruner": (111.00, 51.14, 253.13, 55.81, None, 111.90, 121.54, 71.18),
        "Wanda-sp": (411.06, 82.87, 249.18, 90.90, 16.78, 205.21, 160.49, 183.44),
        "Self-Pruner": (59.11, 23.24, 53.63, 41.95, 9.08, 68.40, 64.56, 46.47),
    },
}
"""Table 1, WikiText-2: rate -> method -> one figure for each of MODELS."""
ACCURACY: Grid = {
    0: {
        "Dense": (66.30, 68.40, 66.82, 69.28, 73.81, 70.21, 70.64, 69.73),
    },
    0.2: {
        "LLM-Pruner": (60.14, 64.34, 60.19, 64.24, None, 56.50, 57.45, 65.06),
        "Wanda-sp": (63.12, 65.41, 62.33, 66.28, 72.84, 59.90, 62.16, 66.91),
        "Self-Pruner": (64.80, 66.23, 63.44, 67.15, 73.11, 61.71, 63.61, 68.18),
    },
    0.3: {
        "LLM-Pruner": (53.76, 59.31, 51.89, 58.95, None, 51.80, 52.45, 57.92),
        "Wanda-sp": (59.02, 61.71, 57.66, 60.94, 72.66, 40.91, 47.19, 62.35),
        "Self-Pruner": (61.79, 64.22, 60.79, 64.34, 73.01, 56.74, 58.09, 65.90),
    },
    0.4: {
        "LLM-Pruner": (46.56, 54.02, 46.63, 50.59, None, 41.93, 42.75, 51.74),
        "Wanda-sp": (43.98, 56.76, 52.86, 38.81, 69.71, 38.43, 40.06, 39.08),
        "Self-Pruner": (58.26, 63.15, 57.59, 63.22, 71.97, 53.30, 53.88, 63.35),
    },
    0.5: {
        "LLM-Pruner": (41.96, 47.25, 40.45, 42.12, None, 39.15, 40.61, 43.77),
        "Wanda-sp": (37.88, 43.09, 36.76, 39.50, 60.63, 37.80, 38.43, 39.50),
        "Self-Pruner": (52.96, 58.38, 51.35, 58.52, 70.01, 46.13, 46.99, 54.64),
    },
}
"""Table 2, mean accuracy of the seven tasks in percent, in the same form as PERPLEXITY."""
OF_TABLES_3_TO_6 = "LLaMA-2-7B"
ABLATION_RATE = 0.3
ABLATION = {
    "w/o initialization": (17.43, 59.30),
    "w/o mutation": (17.65, 58.98),
    "w/o crossover": (17.59, 59.15),
    "Self-Pruner": (16.25, 60.79),
}
"""Table 3, at ABLATION_RATE: perplexity and accuracy."""
LLMS: dict[str, tuple[float, float]] = {"gpt-3.5": (17.44, 58.94), "gpt-4": (17.13, 59.87), "gpt-4o": (16.25, 60.79)}
"""Table 4, at ABLATION_RATE."""
OWL = {0.3: (21.40, 59.08), 0.5: (81.56, 39.06)}
"""Table 5, OWL's rows. Its other rows are in Tables 1 and 2."""
LORA = {0.3: (11.87, 63.01), 0.5: (25.32, 59.78)}
"""Table 6, rows after LoRA. Its other rows are in Tables 1 and 2."""
SPEED = {
    "LLaMA-2-7B": {
        0.0: (6.74, 12.55, 83.77, 1.00),
        0.2: (5.47, 10.20, 115.39, 1.23),
        0.3: (4.77, 8.88, 123.66, 1.48),
        0.4: (4.13, 7.80, 137.11, 1.64),
        0.5: (3.50, 6.55, 152.24, 1.82),
    },
    "LLaMA-2-70B": {
        0.0: (68.98, 128.48, 18.44, 1.00),
        0.2: (55.53, 103.43, 22.13, 1.20),
        0.3: (48.56, 90.40, 25.63, 1.39),
        0.4: (41.59, 77.50, 28.58, 1.55),
        0.5: (34.75, 64.64, 31.31, 1.70),
    },
}
"""Table 7, with vLLM on an A100: parameters in billions, memory in GiB, tokens per second, speed-up."""


def paper_model(name: str) -> str | None:
    """Return the paper's name of a hub model; None if the paper did not prune it."""
    return {hub.lower(): ours for hub, ours in HUB_NAMES.items()}.get(name.lower())


def figure_in(grid: Grid, model: str | None, method: str | None, rate: float) -> float | None:
    """Return a figure of PERPLEXITY or ACCURACY; None for a model, method or rate without one."""
    row = grid.get(rate, {}).get(method or "")
    return row[MODELS.index(model)] if row and model in MODELS else None
