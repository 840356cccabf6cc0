"""`selfpruner init`: write a commented file of settings, from flags or from the answers to a few questions."""

import re
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import typer
import yaml
from jinja2 import Environment, StrictUndefined
from pydantic import ValidationError

from daemon.commands import flags
from daemon.settings.errors import validation_sentence
from daemon.settings.settings import Settings, setting_names
from daemon.settings.target import TargetSettings, check_lengths, check_text
from protocol.errors import DataError, SettingsError, UsageError
from protocol.runtime.files import write_atomically
from protocol.runtime.paths import SMOLLM2, check_model, expanded

USUAL_RATE = 0.3
EndpointName = Literal["none", "openai", "vllm", "ollama", "lm-studio", "llama.cpp", "other"]


@dataclass(frozen=True)
class EndpointKind:
    """How a kind of LLM server is named in settings."""

    base_url: str = ""
    llm_model: str = ""
    """The model, if the user names none."""
    about_model: str = ""
    more: Sequence[str] = ()
    """Further lines of the endpoint."""

    def at(self, base_url: str | None, llm_model: str | None, api_key_file: str | None) -> "EndpointKind":
        """Return this kind of server at an address, with a model and a key of the user's."""
        other = (base_url or self.base_url, llm_model or self.llm_model) != (self.base_url, self.llm_model)
        more = [
            line
            for line in self.more
            if not (api_key_file and "api_key_file" in line) and not (other and line.startswith("price"))
        ]
        keyed = [f"api_key_file: {_quoted(api_key_file)}"] if api_key_file else []
        named = {"base_url": base_url or self.base_url}
        if llm_model:
            named |= {"llm_model": llm_model, "about_model": ""}
        return replace(self, **named, more=(*keyed, *more))


KINDS: dict[EndpointName, EndpointKind] = {
    "none": EndpointKind(),
    "openai": EndpointKind(
        "https://api.openai.com/v1",
        "gpt-4o",
        more=(
            "api_key_file: ~/.secrets/openai    # a file that holds only the key",
            "price_in: 2.5                # per million tokens; check the provider's price list",
            "price_out: 10",
        ),
    ),
    "vllm": EndpointKind(
        "http://127.0.0.1:8000/v1",
        "Qwen/Qwen3-8B",
        "        # as in `vllm serve`, or its --served-model-name",
        ("# api_key_file: ~/.secrets/vllm   # the KEY of --api-key",),
    ),
    "ollama": EndpointKind(
        "http://127.0.0.1:11434/v1",
        "qwen2.5:7b",
        "           # the name with its tag, as `ollama list` shows it",
        ("context: 4096                # Ollama cuts longer prompts; OLLAMA_CONTEXT_LENGTH raises it",),
    ),
    "lm-studio": EndpointKind(
        "http://127.0.0.1:1234/v1", "qwen2.5-7b-instruct", "  # the identifier that LM Studio shows"
    ),
    "llama.cpp": EndpointKind(
        "http://127.0.0.1:8080/v1",
        "my-llm",
        "               # llama-server accepts any name",
        ("grammar: true                # shorter replies; not for models that reason",),
    ),
    "other": EndpointKind("http://127.0.0.1:8000/v1", "my-llm", "               # the name that the server expects"),
}


def init(
    file: Annotated[Path, typer.Argument(help="The file to write.")] = Path("selfpruner.yaml"),
    model: Annotated[str | None, typer.Option(help="The model to prune: a hub name, a folder, or `smollm2`.")] = None,
    rate: Annotated[
        float | None, typer.Option(help="The share of the decoder's parameters to remove; 0.3 by default.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Text to score and search on: `wikitext2`, `c4`, `self`, or a text file.")
    ] = None,
    endpoint: Annotated[EndpointName | None, flags.chosen(EndpointName, "The LLM that proposes", "none")] = None,
    llm_model: Annotated[str | None, typer.Option(help="The name of the LLM at its endpoint.")] = None,
    base_url: Annotated[
        str | None, typer.Option(help="The endpoint's address, up to `/v1`, for any OpenAI-compatible server.")
    ] = None,
    api_key_file: Annotated[str | None, typer.Option(help="A file that holds only the endpoint's key.")] = None,
    report_data: Annotated[
        str | None, typer.Option(help="Text of the final figures; by default that of --data.")
    ] = None,
) -> None:
    """Write a commented file of settings. On a terminal, it asks for the model, the rate, the text and the endpoint."""
    path = expanded(file)
    if path.exists():
        raise SettingsError(f"{str(file)!r} exists; name another file")
    if not path.parent.is_dir():
        raise SettingsError(f"{str(file)!r} cannot be written: there is no folder {str(path.parent)!r}")
    asks = sys.stdin.isatty()
    for text in filter(None, (data, report_data)):
        check_text(text)
    if api_key_file:
        _check_key_file(api_key_file)
    if model is None:
        model = _asked("Model to prune (hub name, folder, or smollm2)", SMOLLM2, check_model) if asks else SMOLLM2
    check_model(model)
    if rate is None:
        share = "Share of the decoder's parameters to remove"
        rate = float(_asked(share, str(USUAL_RATE), _check_rate)) if asks else USUAL_RATE
    if data is None:
        usual = "self" if model == SMOLLM2 else "wikitext2"
        data = _asked("Text to search on (wikitext2, c4, self, or a file)", usual, check_text) if asks else usual
    if endpoint is None and base_url:
        endpoint = "other"
    elif endpoint is None:
        question = f"LLM that proposes ({', '.join(KINDS)})"
        endpoint = cast(EndpointName, _asked(question, "none", _check_endpoint)) if asks else "none"
    if endpoint == "none" and (llm_model or base_url or api_key_file):
        raise SettingsError("--llm-model, --base-url and --api-key-file need --endpoint")
    kind = KINDS[endpoint]
    if asks and endpoint == "other" and base_url is None:
        base_url = typer.prompt("Address of the LLM", kind.base_url)
    if asks and endpoint != "none" and llm_model is None:
        llm_model = typer.prompt("Name of the LLM at its endpoint", kind.llm_model)
    if asks and endpoint == "other" and api_key_file is None:
        question = "File with its key (empty: it needs none)"
        api_key_file = _asked(question, "", _check_key_file, show_default=False) or None
    if endpoint == "other" and not (base_url and llm_model):
        missing = [flag for flag, value in (("--base-url", base_url), ("--llm-model", llm_model)) if not value]
        raise SettingsError(f"an endpoint of your own needs {' and '.join(missing)}")
    given = (str(file), model, data, llm_model, base_url, api_key_file, report_data)
    if not "".join(filter(None, given)).isprintable():
        raise SettingsError("names of files, models and texts are one line each")
    kind = kind.at(base_url, llm_model, api_key_file)
    text = settings_text(str(file), model, rate, data, kind, report_data or data)
    try:
        settings = Settings.model_validate(yaml.safe_load(text))
    except ValidationError as error:
        raise SettingsError(validation_sentence(error, setting_names())) from None
    try:
        check_lengths(settings.spec().texts)
    except DataError as error:
        raise DataError(
            f"{error}; or write the settings yourself: the sizes that init writes are for long texts"
        ) from None
    try:
        write_atomically(path, text)
    except OSError as error:
        raise SettingsError(f"{str(file)!r} cannot be written: {error.strerror}") from None
    name = shlex.quote(str(file))
    typer.echo(f"wrote {file}; look through it, check it (selfpruner check {name}), then selfpruner run {name}")


def _asked(question: str, usual: str, check: Callable[[str], object], *, show_default: bool = True) -> str:
    """Ask until the answer passes `check`, which raises UsageError otherwise."""
    while True:
        answer: str = typer.prompt(question, usual, show_default=show_default)
        try:
            check(answer)
        except UsageError as error:
            typer.echo(str(error), err=True)
        else:
            return answer


def _check_rate(rate: str) -> None:
    try:
        TargetSettings.model_validate({"model": SMOLLM2, "rate": rate})
    except ValidationError as error:
        raise SettingsError(validation_sentence(error)) from None


def _check_endpoint(name: str) -> None:
    if name not in KINDS:
        raise SettingsError(f"{name!r} is no endpoint: give {', '.join(KINDS)}")


def _check_key_file(file: str) -> None:
    """Raise SettingsError if there is no such file. The message does not show it, because it may be the key itself."""
    try:
        is_there = not file or (expanded(file).exists() and not expanded(file).is_dir())
    except (OSError, UsageError):  # too long for a path, for example
        is_there = False
    if not is_there:
        raise SettingsError("--api-key-file: there is no such file; write the key into a file, and give its path")


def settings_text(file: str, model: str, rate: float, data: str, endpoint: EndpointKind, report: str) -> str:
    """Return the YAML text of a search that prunes `model` on the text `data`, and reports on the text `report`."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(file).stem).strip("-.") or "search"
    template = resources.files("configs").joinpath("init.yaml.j2").read_text(encoding="utf-8")
    form: dict[str, Any] = {"trim_blocks": True, "lstrip_blocks": True, "keep_trailing_newline": True}
    environment = Environment(undefined=StrictUndefined, autoescape=False, **form)
    return environment.from_string(template).render(
        file=shlex.quote(file),
        name=_quoted(name[:64]),
        model=_quoted(model),
        rate=repr(rate),
        data=_quoted(data),
        report=_quoted(report),
        endpoint=endpoint,
        quoted=_quoted,
    )


def _quoted(text: str) -> str:
    """Return text as a YAML scalar on one line."""
    return yaml.safe_dump(text, width=10**6, allow_unicode=True).removesuffix("\n").removesuffix("\n...")
