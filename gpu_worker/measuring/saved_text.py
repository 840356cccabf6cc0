"""The tokens that an export was measured on, kept in its folder where nobody else could have them.

Text that the dense model wrote cannot be written again by the pruned one. JSON, for loaders of models take every file
of safetensors in a folder for weights.
"""

import json
from pathlib import Path

import torch
from torch import Tensor

from protocol.errors import DataError
from protocol.plans.spec import TextSpec
from protocol.results.formats import SAVED_TEXT


def save_text(windows: Tensor, folder: Path) -> None:
    """Write the tokens (long, [n, seqlen]) into an export's folder."""
    (folder / SAVED_TEXT).write_text(json.dumps({"tokens": windows.tolist()}, separators=(",", ":")), encoding="utf-8")


def load_saved_text(file: Path, text: TextSpec, vocabulary: int) -> Tensor:
    """The tokens (long, [n, seqlen]) that `save_text` wrote of `text`, all below `vocabulary`; DataError otherwise."""
    try:
        tokens = torch.tensor(json.loads(file.read_text(encoding="utf-8"))["tokens"])
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, RecursionError) as error:
        raise DataError(f"{file} does not hold the text that was measured ({error}): give --data") from error
    as_told = tokens.dtype == torch.long and tuple(tokens.shape) == (text.windows, text.seqlen)
    if not as_told or tokens.min() < 0 or tokens.max() >= vocabulary:
        raise DataError(f"{file} does not hold the text that the folder says was measured: give --data")
    return tokens
