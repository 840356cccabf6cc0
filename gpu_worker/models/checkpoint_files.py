"""Checks a checkpoint's files before any of them is read: file type, size, and paths that they refer to.

A folder may come from an untrusted source. Without these checks, reading could block on a pipe, an index could lead out
of the folder, and a config that declares far more weights than are stored would fill memory with random numbers.
"""

import json
import stat
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import safe_open

from gpu_worker.models.errors import quoted
from gpu_worker.models.machine import gigabytes
from protocol.errors import ModelError

INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
"""Files that map each weight to its file."""
WEIGHTS = ("model.safetensors", INDEXES[0], "pytorch_model.bin", INDEXES[1])
"""A folder that contains a complete model has one of these files. transformers reads the first that is there."""
ADAPTER = "adapter_config.json"
WEIGHTS_READ = ("*.safetensors", "pytorch_model*.bin")
VOCABULARIES = ("tokenizer.json", "tokenizer.model*", "*.model", "*.spm", "tekken.json", "vocab*.json", "vocab*.txt")
"""Files of which a tokenizer has at least one."""
TEXTS_READ = (
    *("config.json", "config.*.json", "generation_config.json", "*.index.json"),
    *("tokenizer*.json", *VOCABULARIES),
    *("merges*.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*"),
)
"""File names that transformers opens for a model and its tokenizer. Other files in the folder, such as logs or dangling
links, are ignored."""
MAX_FILE_BYTES = {"config.json": 2**20, "tokenizer.json": 2**27}
"""Limits in bytes for single files, several times the largest known sizes: Gemma's tokenizer.json has 33 MB."""
MAX_TEXT_BYTES = 2**25
"""Limit in bytes for all other files without weights."""
MAX_HEADER_BYTES = 2**25
"""Limit in bytes for the header of a safetensors file. The header of a thousand tensors has 100 kB."""
LFS_POINTER = b"version https://git-lfs"
"""How a file begins that git has put in place of a large one."""
MAX_PARAMETER_RATIO = 2
"""Largest allowed ratio of declared to stored parameters. Missing weights are reported after loading; this limit keeps
the loader from filling memory before that."""


def check_files(name: str, folder: Path) -> None:
    """Raise ModelError if a file of the checkpoint `name` in `folder` is not safe to read.

    Checks only files that transformers opens. Links to regular files are followed, because the hub's cache consists of
    such links.
    """
    files = [path for path in sorted(folder.iterdir()) if not path.is_dir()]
    texts = [path for path in files if _is_one_of(path, TEXTS_READ)]
    for path in (*texts, *folder.glob("additional_chat_templates/*.jinja")):
        size, largest = _ordinary_size(name, path), MAX_FILE_BYTES.get(path.name, MAX_TEXT_BYTES)
        _check_no_pointer(name, path)
        if size > largest:
            raise ModelError(f"the file {path.name!r} of {name!r} has {size:,} bytes; at most {largest:,} are allowed")
    for path in files:
        if _is_one_of(path, WEIGHTS_READ):
            _check_weights(name, path)
    if (folder / ADAPTER).exists() and not any((folder / file).exists() for file in WEIGHTS):
        raise ModelError(adapter_sentence(name))
    for path in texts:
        if path.match("*.index.json"):
            preferred = WEIGHTS[: WEIGHTS.index(path.name)] if path.name in WEIGHTS else WEIGHTS
            check_index(name, path, must_be_complete=not any((folder / file).exists() for file in preferred))


def has_tokenizer(folder: Path) -> bool:
    """Return whether the folder holds the vocabulary of a tokenizer."""
    return any(_is_one_of(path, VOCABULARIES) for path in folder.iterdir())


def _is_one_of(path: Path, patterns: tuple[str, ...]) -> bool:
    return any(path.match(pattern) for pattern in patterns)


def adapter_sentence(name: str) -> str:
    """Return the error message for an adapter without a model, whose config could name any model from anywhere."""
    return f"{name!r} holds only an adapter ({ADAPTER}) and no model; merge it into its base model"


def check_index(name: str, index: Path, *, must_be_complete: bool) -> None:
    """Raise ModelError unless the index refers only to files in its own folder; all of them, if it must be complete."""
    written = _read_json(name, index)
    where = written.get("weight_map") if isinstance(written, Mapping) else None
    if not isinstance(where, Mapping) or not all(isinstance(file, str) for file in where.values()):
        raise ModelError(f"the file {index.name!r} of {name!r} does not say which file each weight is in")
    for file in sorted(set(where.values())):
        if not is_inside(file):
            raise ModelError(f"the file {index.name!r} of {name!r} names {quoted(file)}, which is outside the folder")
        if (index.parent / file).exists():
            _check_weights(name, index.parent / file)
        elif must_be_complete:
            raise ModelError(f"the folder {name!r} lacks {quoted(file)}, which {index.name} names; download it again")


def is_inside(file: str) -> bool:
    """Return whether a relative file name stays inside the folder that it is joined to."""
    path = PurePosixPath(file)
    return bool(file) and file.isprintable() and "\\" not in file and not path.is_absolute() and ".." not in path.parts


def check_stored(name: str, folder: Path, asked: int) -> None:
    """Raise ModelError if `folder` has no weights, or far fewer in safetensors files than the config declares.

    `asked` is the number of parameters that the config declares.
    """
    if not any(_is_one_of(path, WEIGHTS_READ) or path.name in WEIGHTS for path in folder.iterdir()):
        raise ModelError(f"the folder {name!r} holds no weights (*.safetensors)")
    files = sorted(folder.glob("*.safetensors"))
    stored = sum(count for file in files for count in _sizes(name, file))
    if files and asked > MAX_PARAMETER_RATIO * stored:
        raise ModelError(
            f"the config of {name!r} asks for {asked:,} parameters where its files hold {stored:,}; "
            "pass a model whose config matches its weights"
        )


def _sizes(name: str, file: Path) -> Iterator[int]:
    """Yield the number of elements of each tensor in a safetensors file. The library checks the header."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
    if length > MAX_HEADER_BYTES:
        raise ModelError(f"the file {file.name!r} of {name!r} claims a header of {length:,} bytes")
    with safe_open(file, framework="numpy") as weights:
        for key in weights.keys():  # noqa: SIM118  (not a dict)
            count = 1
            for size in weights.get_slice(key).get_shape():
                count *= size
            yield count


def _ordinary_size(name: str, path: Path) -> int:
    """Return the size of a file in bytes. Raises ModelError for a pipe, a device, a folder or a dangling link."""
    try:
        status = path.stat()
    except OSError as error:
        raise ModelError(f"the file {path.name!r} of {name!r} cannot be read ({error.strerror})") from error
    if not stat.S_ISREG(status.st_mode):
        raise ModelError(f"{path.name!r} of {name!r} is not an ordinary file")
    return status.st_size


def _check_no_pointer(name: str, path: Path) -> None:
    """Raise ModelError if git has put a pointer in place of the file."""
    with path.open("rb") as opened:
        if opened.read(len(LFS_POINTER)) == LFS_POINTER:
            raise ModelError(
                f"the file {path.name!r} of {name!r} is a pointer of git's; run `git lfs pull` in the folder"
            )


def _check_weights(name: str, path: Path) -> None:
    """Raise ModelError for weights that are not a regular file, or that unpack to more than the file's size.

    torch.save writes zip archives without compression, so a compressed archive is not from torch.
    """
    size = _ordinary_size(name, path)
    _check_no_pointer(name, path)
    if path.suffix == ".safetensors" or not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as records:
            unpacked = sum(record.file_size for record in records.infolist())
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise ModelError(f"the file {path.name!r} of {name!r} is damaged ({error})") from error
    if unpacked > size:
        raise ModelError(f"the file {path.name!r} of {name!r} would unpack to {gigabytes(unpacked)}")


def _read_json(name: str, path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ModelError(f"the file {path.name!r} of {name!r} is no JSON") from error
