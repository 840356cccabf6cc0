"""The formats that a pruned model is exported in."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from protocol.errors import SettingsError

Format = Literal["hf", "padded", "gguf"]
"""`hf` is for transformers and vLLM, `padded` for programs that load the dense model, `gguf` for llama.cpp."""
Formats = tuple[Format, ...]
"""The formats of one folder. A GGUF file may accompany the files of another format, which is then listed first."""
FACTS = "selfpruner.json"
"""The file in every export folder that describes it. An older export is recognised by it."""
SAVED_TEXT = "measured-text.json"
"""The file of an export with the tokens it was measured on, if the dense model generated them."""
SEARCH_CHARTS = ("search.svg", "rates.svg")
"""The files of an export with charts of the search that found its rates: its progress, and its best rates."""
GgufType = Literal["f16", "q8_0", "q6_k", "q5_k_m", "q5_1", "q5_0", "q4_k_m", "q4_1", "q4_0"]
"""llama.cpp's name of the type in which the weights of a GGUF file are stored."""
Engine = Literal["transformers", "llama.cpp", "vllm"]
"""The program that runs a model to measure its speed."""


@dataclass(frozen=True)
class Destination:
    """Folder and formats of an export."""

    folder: Path
    formats: Formats
    gguf_type: GgufType = "f16"
    """Type of the GGUF file, if one is written."""
    force: bool = False
    """Replace an older export."""


def formats_of(names: Sequence[str]) -> Formats:
    """Return the named formats, each once. Raises SettingsError for unknown names, and for two with the same files."""
    known: Formats = get_args(Format)
    for name in names:
        if name not in known:
            raise SettingsError(f"--format cannot be {name!r}: use one of {', '.join(known)}")
    if "hf" in names and "padded" in names:
        raise SettingsError("--format hf and --format padded would write the same files: export twice")
    return tuple(fmt for fmt in known if fmt in names)


def gguf_type_of(formats: Formats, given: GgufType | None) -> GgufType:
    """Return the type of a GGUF file among `formats`. Raises SettingsError if a type is given without that format."""
    if given is not None and "gguf" not in formats:
        raise SettingsError(
            f"--gguf-type {given} has no effect here: {' and '.join(formats)} has no GGUF file; add --format gguf"
        )
    return given or "f16"


def only_for_llama_cpp(folder: str) -> str:
    """Return the error message if a model is to be measured but its `folder` has only a GGUF file."""
    return (
        f"the folder {folder!r} is a pruned export for llama.cpp, which cannot be measured here; "
        "pass the hf or the padded export of the same model"
    )
