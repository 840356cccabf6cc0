"""Saves the tokens that an export was measured on in its folder, if the dense model wrote them.

The pruned model cannot write the same text again. The file is JSON because model loaders read every safetensors file in
a folder as weights.
"""

import json
from pathlib import Path

import torch
from torch import Tensor

from protocol.errors import DataError
from protocol.plans.spec import TextSpec
from protocol.results.formats import SAVED_TEXT


def save_text(windows: Tensor, folder: Path) -> None:
    """Write the tokens (long, [n, seqlen]) into an export folder."""
    (folder / SAVED_TEXT).write_text(json.dumps({"tokens": windows.tolist()}, separators=(",", ":")), encoding="utf-8")


def load_saved_text(file: Path, text: TextSpec, vocabulary: int) -> Tensor:
    """Return the tokens (long, [n, seqlen]) that `save_text` wrote. Raises DataError if they do not match `text`."""
    try:
        tokens = torch.tensor(json.loads(file.read_text(encoding="utf-8"))["tokens"])
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, RecursionError) as error:
        raise DataError(f"{file} does not hold the text that was measured ({error}): give --data") from error
    is_expected = tokens.dtype == torch.long and tuple(tokens.shape) == (text.windows, text.seqlen)
    if not is_expected or tokens.min() < 0 or tokens.max() >= vocabulary:
        raise DataError(f"{file} does not match the text that the folder says was measured: give --data")
    return tokens
