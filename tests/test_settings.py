"""Settings: sources in their order, and one helpful sentence for each mistake."""

from pathlib import Path

import pytest
from redis import Redis

from daemon.llm import make_endpoint, secrets_of
from daemon.settings import load, setting_names
from daemon.settings_page import page
from protocol.errors import SettingsError

MINIMAL = "target: {model: smollm2, rate: 0.3}\n"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "search.yaml"
    path.write_text(MINIMAL + "search: {name: from-file, seed: 1, rounds: 5}\n")
    return path


def test_flags_overrule_the_environment_which_overrules_the_file(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SELFPRUNER_SEARCH__SEED", "2")
    monkeypatch.setenv("SELFPRUNER_SEARCH__ROUNDS", "6")
    settings = load(config, ["search.seed=3"])
    assert (settings.search.name, settings.search.rounds, settings.search.seed) == ("from-file", 6, 3)


def test_what_the_search_minimises_is_part_of_its_spec() -> None:
    chosen = load(None, ["target.model=m", "target.rate=0.3", "search.fitness=kl"]).spec()
    assert chosen.measure == "kl"


def test_defaults_are_the_papers() -> None:
    search = load(None, ["target.model=m", "target.rate=0.3"]).search
    assert (search.population, search.mutations, search.crossovers, search.rounds) == (30, 10, 10, 20)
    assert (search.granularity, search.split, search.fitness) == ("layer", "equal", "perplexity")


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("search.nmae=x", r"no setting 'search.nmae'; did you mean 'search.name'\?"),
        ("population=3", r"did you mean 'search.population'\?"),
        ("target.rate=0", "target.rate cannot be '0'"),
        ("target.rate=0.91", "target.rate cannot be '0.91'"),
        ("target.rate=.nan", "target.rate cannot be 'nan'"),
        ("target.rate=half", "target.rate cannot be 'half'"),
        ("target.rate=0.1234567", "at most 5 decimals"),
        ("target.model=", "target.model"),
        ("search.name=../x", "search.name '../x' is not allowed"),
        ("search.population=0", "search.population cannot be '0'"),
        ("search.granularity=head", "search.granularity cannot be 'head'"),
        ("search.fitness=loss", "search.fitness cannot be 'loss'"),
        ("search.lowest_rate=0.5", "target.rate 0.3 cannot be reached"),
        ("search.highest_rate=0.2", "target.rate 0.3 cannot be reached"),
        ("worker.lease_seconds=-1", "worker.lease_seconds"),
        ("llm.endpoints=[{base_url: localhost, model: m}]", "llm.endpoints.0.base_url"),
        ("search=3", "search cannot be '3'"),
        ("search.name.first=3", "search.name"),
        ("nonsense", "--set takes key=value"),
        ("target.rate={", "no YAML"),
    ],
)
def test_a_mistake_gets_one_sentence_that_names_it(config: Path, override: str, sentence: str) -> None:
    with pytest.raises(SettingsError, match=sentence) as caught:
        load(config, [override])
    assert "\n" not in str(caught.value)


def test_a_variable_of_ours_that_names_nothing_is_refused(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SELFPRUNER_SERCH__NAME", "x")
    with pytest.raises(SettingsError, match=r"SELFPRUNER_SERCH__NAME .*'search.name'"):
        load(config)


def test_a_missing_setting_is_named(tmp_path: Path) -> None:
    empty = tmp_path / "empty.yaml"
    empty.write_text("search: {name: x}\n")
    with pytest.raises(SettingsError, match="the setting target is missing"):
        load(empty)


@pytest.mark.parametrize("text", ["- a list\n", "a: [unclosed\n", "just words\n"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text(text)
    with pytest.raises(SettingsError):
        load(bad)


def test_a_missing_file_is_named() -> None:
    with pytest.raises(SettingsError, match=r"no settings file 'nowhere.yaml'"):
        load(Path("nowhere.yaml"))


def test_every_shipped_config_loads() -> None:
    shipped = sorted(Path("configs").glob("*.yaml"))
    assert {path.name for path in shipped} >= {"quickstart.yaml", "paper.yaml", "local-llm.yaml"}
    for path in shipped:
        load(path)


def test_the_page_of_all_settings_is_up_to_date() -> None:
    described = Path("docs/configuration.md").read_text()
    assert described == page()
    missing = [name for name in setting_names() if f"`{name}`" not in described]
    assert not missing


def test_a_key_is_read_from_its_file_and_is_known_to_the_redaction(config: Path, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("sk-very-secret\n")
    endpoints = f"[{{base_url: 'https://llm.example/v1', model: m, api_key_file: {tmp_path / 'key'}}}]"
    settings = load(config, [f"llm.endpoints={endpoints}", "redis.url=redis://u:hunter22@h:6379"])
    endpoint = make_endpoint(settings.llm.endpoints[0])
    assert endpoint.api_key is not None and endpoint.api_key.get_secret_value() == "sk-very-secret"
    assert endpoint.name == "llm.example"
    assert secrets_of(settings) == ["sk-very-secret", "hunter22"]
    assert "sk-very-secret" not in repr(settings)


def test_an_empty_key_file_means_no_key(config: Path, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("\n")
    endpoints = f"[{{base_url: 'https://llm.example/v1', model: m, api_key_file: {tmp_path / 'key'}}}]"
    settings = load(config, [f"llm.endpoints={endpoints}"])
    assert make_endpoint(settings.llm.endpoints[0]).api_key is None
    assert secrets_of(settings) == []


def test_the_password_of_redis_is_read_from_its_file_and_is_known_to_the_redaction(
    config: Path, tmp_path: Path
) -> None:
    (tmp_path / "password").write_text("with spaces/and@signs\n")
    settings = load(config, ["redis.url=redis://user@host:6379/0", f"redis.password_file={tmp_path / 'password'}"])
    assert settings.redis.full_url == "redis://user:with%20spaces%2Fand%40signs@host:6379/0"
    with Redis.from_url(settings.redis.full_url) as client:
        assert client.connection_pool.connection_kwargs["password"] == "with spaces/and@signs"
    assert set(secrets_of(settings)) == {"with spaces/and@signs", "with%20spaces%2Fand%40signs"}
    assert "spaces" not in repr(settings)


@pytest.mark.parametrize(
    ("url", "content", "sentence"),
    [
        ("redis://user@host", None, "cannot be read: No such file"),
        ("redis://user@host", b"\n", "is empty"),
        ("redis://user@host", b"\xff\xfe", "it is not UTF-8 text"),
        ("redis://user:hunter22@host", b"other", "redis.url has a password already"),
        ("", b"other", "redis.password_file is set, but redis.url is missing"),
    ],
)
def test_a_password_file_that_cannot_be_used_is_an_error_that_shows_no_password(
    config: Path, tmp_path: Path, url: str, content: bytes | None, sentence: str
) -> None:
    if content is not None:
        (tmp_path / "password").write_bytes(content)
    settings = load(config, [f"redis.password_file={tmp_path / 'password'}", *([f"redis.url={url}"] if url else [])])
    with pytest.raises(SettingsError, match=sentence) as caught:
        _ = settings.redis.full_url
    assert "hunter22" not in str(caught.value) and "other" not in str(caught.value)


def test_relative_paths_of_texts_become_absolute_and_named_texts_stay(config: Path) -> None:
    spec = load(config, ["data.fitness=texts/a.txt", "data.calibration=self"]).spec()
    assert spec.fitness.source == str(Path("texts/a.txt").absolute())
    assert spec.calibration.source == "self"
    assert spec.report is None
