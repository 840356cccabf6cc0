"""The formats that a pruned model is exported in."""

from collections.abc import Sequence
from typing import Literal, get_args

from protocol.errors import SettingsError

Format = Literal["hf", "padded", "gguf"]
"""For transformers and vLLM; for whatever loads the dense model; for llama.cpp."""
Formats = tuple[Format, ...]
"""Of one folder; a GGUF file lies beside the files of another format, which come first."""
FACTS = "selfpruner.json"
"""The file that every export folder has: what it says of itself, and what an older one is known by."""
SAVED_TEXT = "measured-text.json"
"""The file of an export that holds the tokens it was measured on, where the dense model wrote them."""
GgufType = Literal["f16", "q8_0", "q6_k", "q5_k_m", "q5_1", "q5_0", "q4_k_m", "q4_1", "q4_0"]
"""How the weights of a GGUF are stored, by llama.cpp's names for it."""
Engine = Literal["transformers", "llama.cpp", "vllm"]
"""What runs a model where its speed is measured."""


def formats_of(names: Sequence[str]) -> Formats:
    """These formats, each once. Raises SettingsError for one that there is not, and for two of the same files."""
    known: Formats = get_args(Format)
    for name in names:
        if name not in known:
            raise SettingsError(f"--format cannot be {name!r}: there are {', '.join(known)}")
    if "hf" in names and "padded" in names:
        raise SettingsError("--format hf and --format padded would write the same files: export twice")
    return tuple(fmt for fmt in known if fmt in names)


def gguf_type_of(formats: Formats, given: GgufType | None) -> GgufType:
    """How a GGUF file among `formats` is stored. Raises SettingsError where a type is given and no such file made."""
    if given is not None and "gguf" not in formats:
        raise SettingsError(
            f"--gguf-type {given} is not read here: {' and '.join(formats)} has no GGUF file; add --format gguf"
        )
    return given or "f16"


def only_for_llama_cpp(folder: str) -> str:
    """What is said of a `folder` that holds no more than a GGUF file, where a model is to be measured."""
    return (
        f"the folder {folder!r} is a pruned export for llama.cpp, which cannot be measured here; "
        "pass the hf or the padded export of the same model"
    )
