"""Uploads an exported folder to the Hugging Face Hub, with a card that names the repository and its figures."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, EvalResult, HfApi, ModelCard, get_token
from huggingface_hub.errors import HfHubHTTPError, HTTPError  # type: ignore[attr-defined]
from huggingface_hub.repocard_data import eval_results_to_model_index

from gpu_worker.export.card import render_card
from gpu_worker.export.facts import ExportFacts, read_facts
from gpu_worker.export.folder import check_weights, formats_in
from protocol.errors import SelfPrunerError, SettingsError
from protocol.results.commands import PushResult

REPOSITORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
CARD = "README.md"
NAMES = {"wikitext2": "WikiText-2", "c4": "C4", "self": "text that the dense model wrote"}
ON_THE_HUB = {"wikitext2": "Salesforce/wikitext", "c4": "allenai/c4"}
SPLITS = {"fitness": "validation", "report": "test"}


def push_once(folder: Path, repository: str, *, public: bool = False, license_: str | None = None) -> PushResult:
    """Upload the exported `folder` to the model repository `USER/NAME`, which is created, private unless `public`.

    The uploaded card has the repository's name in its commands, and its perplexities as the hub's metadata; the
    folder's own card stays as it is. Raises UsageError for what is no export, for an invalid name and without a token,
    SelfPrunerError if the hub refuses or cannot be reached.
    """
    if not REPOSITORY.fullmatch(repository):
        raise SettingsError(f"{repository!r} is not a repository's name: give USER/NAME")
    check_weights(folder, formats_in(folder))
    facts = read_facts(folder)
    if get_token() is None:
        raise SettingsError("there is no Hugging Face token: set HF_TOKEN, or run `hf auth login`")
    card = hub_card(folder, facts, repository, license_)
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and _is_own(path, folder)]
    added = [
        CommitOperationAdd(path.relative_to(folder).as_posix(), card.encode() if path == folder / CARD else path)
        for path in files
    ]
    api = HfApi(library_name="self-pruner")
    try:
        api.create_repo(repository, private=not public, exist_ok=True)
        commit = api.create_commit(repository, added, commit_message="Upload a model pruned by Self-Pruner")
    except ValueError as error:  # the hub's rules for names are stricter than REPOSITORY
        raise SettingsError(f"{repository!r} is not a repository's name: {_first_line(error)}") from error
    except HfHubHTTPError as error:
        raise SelfPrunerError(f"the Hugging Face Hub refuses {repository}: {_first_line(error)}") from error
    except HTTPError as error:
        raise SelfPrunerError(f"the Hugging Face Hub cannot be reached: {_first_line(error)}") from error
    except OSError as error:
        raise SelfPrunerError(f"{folder} cannot be uploaded: {_first_line(error)}") from error
    return PushResult(
        repository=repository,
        url=str(commit.repo_url),
        public=public,
        files=len(files),
        bytes=sum(path.stat().st_size for path in files),
    )


def _is_own(path: Path, folder: Path) -> bool:
    """Return whether a file is one of the export: not hidden, nor in a hidden folder such as `.git`, nor a link."""
    relative = path.relative_to(folder)
    parents = [folder / part for part in relative.parents]
    return not any(part.startswith(".") for part in relative.parts) and not any(
        each.is_symlink() for each in (path, *parents)
    )


def hub_card(folder: Path, facts: ExportFacts, repository: str, license_: str | None = None) -> str:
    """Return the folder's card as the hub should have it."""
    gguf = next((path.name for path in sorted(folder.glob("*.gguf"))), None)
    card: Any = ModelCard(
        render_card(facts, formats_in(folder), name=repository, gguf=gguf), ignore_metadata_errors=True
    )
    if license_ is not None:
        card.data.license = license_
    if results := list(_results(facts)):
        name = repository.partition("/")[2]
        card.data.model_name = name
        card.data["model-index"] = eval_results_to_model_index(name, results)
    return str(card)


def _results(facts: ExportFacts) -> Iterator[EvalResult]:
    """Yield the perplexities of the pruned model as the hub's metadata."""
    for role, text, measured in (
        ("fitness", facts.spec.fitness, facts.pruned),
        ("report", facts.spec.report, facts.pruned_report),
    ):
        if text is None or measured is None:
            continue
        named = Path(text.source).name
        yield EvalResult(
            task_type="text-generation",
            dataset_type=ON_THE_HUB.get(text.source, "other"),
            dataset_name=f"{NAMES.get(text.source, named)} ({role} text)",
            dataset_split=SPLITS[role] if text.source in ON_THE_HUB else None,
            metric_type="perplexity",
            metric_value=round(measured.perplexity, 4),
            metric_name=f"perplexity on {measured.tokens:,} tokens, in windows of {text.seqlen}",
        )


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2]) or type(error).__name__
