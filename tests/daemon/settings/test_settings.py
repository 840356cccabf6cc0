"""Settings: sources in their order, and one helpful sentence for each mistake."""

import json
import traceback
from pathlib import Path

import pytest
from redis import Redis

from daemon.launch.llm import make_endpoints, secrets_of
from daemon.settings.page import page
from daemon.settings.service import RunSettings
from daemon.settings.settings import setting_names
from daemon.settings.sources import load
from protocol.errors import SettingsError
from tests.support.root import ROOT

MINIMAL = "target: {model: smollm2, rate: 0.3}\n"


def endpoint(**fields: object) -> str:
    """The override that gives one endpoint, with `fields`."""
    return f"llm.endpoints={json.dumps([{'base_url': 'https://llm.example/v1', 'model': 'm', **fields}])}"


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
        ("rounds=3", r"no setting 'rounds'; did you mean 'search.rounds'\?"),
        ("target.rate=30", r"target.rate cannot be '30': it is a share: write 0.3 for 30 %"),
        (
            "llm.endpoints=[{url: http://h/v1, model: m}]",
            r"no setting 'llm.endpoints.0.url'; did you mean 'llm.endpoints.0.base_url'\?",
        ),
        ("serach.name=x", r"no setting 'serach'; did you mean 'search'\?"),
        ("population=3", r"did you mean 'search.population'\?"),
        ("target.rate=0", "target.rate cannot be '0'"),
        ("target.rate=0.91", "target.rate cannot be '0.91'"),
        ("target.rate=.nan", "target.rate cannot be 'nan'"),
        ("target.rate=half", "target.rate cannot be 'half'"),
        ("target.rate=0.1234567", "at most 5 decimals"),
        (
            "target.memory=10GB",
            "give one of rate, rates, parameters and memory, not rate and memory; `--set target.rate=null`",
        ),
        ("target.rate=null", "give one of rate, rates, parameters and memory, such as rate: 0.3"),
        ("target.context=100", "context counts in memory"),
        ("target.memory=10XB", "target.memory cannot be '10XB': write a number and a unit, such as 10GB or 170MB"),
        ("target.model=", "target.model"),
        ("search.name=../x", "search.name '../x' is not allowed"),
        ("search.population=0", "search.population cannot be '0'"),
        ("search.granularity=head", "search.granularity cannot be 'head'"),
        ("search.fitness=loss", "search.fitness cannot be 'loss'"),
        ("search.lowest_rate=0.5", "target.rate 0.3 cannot be reached"),
        ("search.highest_rate=0.2", "target.rate 0.3 cannot be reached"),
        ("worker.lease_seconds=-1", "worker.lease_seconds"),
        ("llm.endpoints=[{base_url: localhost, model: m}]", "llm.endpoints.0.base_url"),
        ("llm.endpoints.0.model=m", "cannot be set alone: give the whole list"),
        ("llm.endpoints=[{base_url: 'http://h/v1', model: m, api_key: OPENAI_API_KEY=sk}]", "give the key alone"),
        ("search=3", "search cannot be '3'"),
        (
            "search.max_evaluations=5",
            r"^search.max_evaluations \(5\) is smaller than the first population \(30\): raise it",
        ),
        ("search.seeds=8", "^search.seeds cannot be '8': input should be a list$"),
        ("llm.endpoints=[{base_ulr: 'http://h/v1', model: m}]", "^there is no setting 'llm.endpoints.0.base_ulr'"),
        ("search.mutations={a: 1}", r"^search.mutations cannot be \"\{'a': 1\}\""),
        ("search.name.first=3", "search.name"),
        ("nonsense", "--set takes key=value"),
        ("target.rate={", "the value of target.rate is not valid YAML"),
        ("search.name=2001-99-99", "the value of search.name is not valid YAML"),
        ("search.seed=" + "9" * 5000, "the value of search.seed is not valid YAML"),
        ("search.name=" + "[" * 20_000, "the value of search.name is not valid YAML"),
    ],
)
def test_a_mistake_gets_one_sentence_that_names_it(config: Path, override: str, sentence: str) -> None:
    with pytest.raises(SettingsError, match=sentence) as caught:
        load(config, [override])
    assert "\n" not in str(caught.value)


def test_settings_are_shown_without_secrets_and_otherwise_as_they_are(config: Path) -> None:
    overrides = ["redis.url=redis://u:password@h:6379", "http.token=0123456789abcdef", "run.folder=me@home"]
    shown = load(config, [*overrides, endpoint(api_key="key-of-the-llm")]).shown()
    assert (shown["redis"]["url"], shown["run"]["folder"]) == ("redis://u:***@h:6379", "me@home")
    assert shown["llm"]["endpoints"][0]["api_key"] == shown["http"]["token"] == "**********"
    keyed = load(config, [endpoint(base_url="https://gateway/v1?api-key=key-of-the-llm")])
    odd = keyed.model_copy(update={"run": RunSettings(folder=Path("/tmp/\udcff"))})
    assert odd.shown()["llm"]["endpoints"][0]["base_url"] == "https://gateway/v1?api-key=***"
    assert odd.shown()["run"]["folder"] == "/tmp/?"
    assert load(config, ["redis.url=redis://h:6379", "run.folder=me@home"]).shown()["run"]["folder"] == "me@home"


def test_tokens_that_are_too_few_for_the_first_population_are_refused_before_anything_is_started(config: Path) -> None:
    says = r"^search.max_tokens \(100\) is smaller than what the first population takes \(30 x 16,376\): raise it"
    with pytest.raises(SettingsError, match=says):
        load(config, ["search.max_tokens=100", "data.fitness_windows=8", "data.seqlen=2048"])


SECRET = "very-secret-1234"
URL = f"redis://:{SECRET}@h"


@pytest.mark.parametrize(
    "override",
    [
        f"redis={URL}",
        f"redis.url=http://u:{SECRET}@h",
        f"redis.url={URL}:port",
        f"llm={SECRET}",
        f"llm.endpoints={SECRET}",
        f"llm.endpoints=[{{base_url: 'http://u:{SECRET}@h/v1', model: m}}]",
        f"llm.endpoints=[{{base_url: 'http://h/v1', model: m, api_key: [{SECRET}]}}]",
        f"llm.endpoints=[{{base_url: 'http://h/v1', model: m, api_key: 'schlüssel-{SECRET}'}}]",
        f"llm.endpoints=[{{api_key: {SECRET}",
        f"llm.reply={SECRET}",
        f"http={SECRET}",
        f"http.token={SECRET} with blanks",
        SECRET,
        f"{URL}?x=1",
    ],
)
def test_no_mistake_shows_a_secret(config: Path, override: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load(config, [override])
    assert SECRET not in "".join(traceback.format_exception(caught.value)), "a log may hold the whole of it"


@pytest.mark.parametrize("text", ["llm: *{}", "llm: {{endpoints: [{{api_key: {}", "- {}", "{}", "a: !{} b"])
def test_a_file_that_is_no_yaml_shows_no_secret(tmp_path: Path, text: str) -> None:
    (tmp_path / "bad.yaml").write_text(text.format(SECRET))
    with pytest.raises(SettingsError, match=r"bad\.yaml is not a YAML mapping of settings") as caught:
        load(tmp_path / "bad.yaml")
    assert SECRET not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize(
    "url", ["http://host:abc/v1", "http://[::1/v1", "http://h:0/v1", "http:///v1", "http://a b/v1", "http://a..b/v1"]
)
def test_an_endpoint_that_is_no_url_is_refused(config: Path, url: str) -> None:
    with pytest.raises(SettingsError, match=r"llm\.endpoints\.0\.base_url has an invalid value: .* not a URL"):
        load(config, [endpoint(base_url=url)])


@pytest.mark.parametrize(
    "url",
    [
        *("redis://[::1", "redis://h:port", "redis://h:0", "redis://a..b", "redis://h?db=x"),
        *("redis://h?no_such_option=1", "unix://", "h:6379"),
    ],
)
def test_a_redis_that_is_no_url_is_refused(config: Path, url: str) -> None:
    with pytest.raises(SettingsError, match=r"redis\.url is not a Redis URL"):
        load(config, [f"redis.url={url}"])


@pytest.mark.parametrize("url", ["redis://[::1]:6379/0", "rediss://u:p@h", "unix:///a/b.sock?db=1", "redis://h/2"])
def test_a_redis_url_is_taken(config: Path, url: str) -> None:
    assert load(config, [f"redis.url={url}"]).redis.url == url


@pytest.mark.parametrize("value", ["http://h/v1", "", "[" * 100_000])
def test_a_variable_that_is_no_json_is_named(config: Path, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("SELFPRUNER_LLM__ENDPOINTS", value)
    with pytest.raises(SettingsError, match="environment variable SELFPRUNER_LLM__ENDPOINTS must hold JSON"):
        load(config)


def test_a_key_and_a_key_file_are_not_given_together(config: Path) -> None:
    with pytest.raises(SettingsError, match="give api_key or api_key_file, not both"):
        load(config, [endpoint(api_key="k", api_key_file="/dev/null")])


@pytest.mark.parametrize("content", [b"\xff\xfe", b"two\nlines", "schlüssel".encode()])
def test_a_key_file_that_holds_no_key_is_refused(config: Path, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "key").write_bytes(content)
    with pytest.raises(SettingsError, match="key' cannot be read") as caught:
        secrets_of(load(config, [endpoint(api_key_file=f"{tmp_path}/key")]))
    assert "lines" not in str(caught.value) and "schl" not in str(caught.value)


def test_a_home_folder_that_is_nobodys_is_named(config: Path) -> None:
    nobodys = "~nobody-of-that-name/file"
    with pytest.raises(SettingsError, match=r"'~nobody-of-that-name/file' begins with ~"):
        secrets_of(load(config, [endpoint(api_key_file=nobodys)]))
    for override in (f"data.fitness={nobodys}", f"data.report={nobodys}"):
        with pytest.raises(SettingsError, match="begins with ~"):
            load(config, [override])
    with pytest.raises(SettingsError, match="is not a path"):
        load(config, ['data.fitness="\\0"'])
    with pytest.raises(SettingsError, match="begins with ~"):
        _ = load(config, ["redis.url=redis://h", f"redis.password_file={nobodys}"]).redis.full_url


def test_every_endpoint_has_a_name_of_its_own(config: Path) -> None:
    def names(*endpoints: str) -> list[str]:
        listed = ", ".join(f"{{base_url: {endpoint}}}" for endpoint in endpoints)
        return [e.name for e in make_endpoints(load(config, [f"llm.endpoints=[{listed}]"]).llm.endpoints)]

    here, there = "'https://a.example/v1'", "'http://b.example:8000/v1'"
    assert names(f"{here}, model: m", f"{there}, model: m") == ["a.example", "b.example:8000"]
    same = names(f"{here}, model: m", f"{here}, model: n", f"{here}, model: n", f"{there}, model: m, name: a.example/m")
    assert same == ["a.example/m#2", "a.example/n", "a.example/n#2", "a.example/m"]
    with pytest.raises(SettingsError, match="two endpoints have the name 'x'"):
        names(f"{here}, model: m, name: x", f"{there}, model: m, name: x")


def test_a_file_that_may_not_be_read_is_named(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refused)  # for root reads whatever there is
    with pytest.raises(SettingsError, match=r"search\.yaml' cannot be read: Permission denied"):
        load(config)


def test_a_variable_of_ours_that_names_nothing_is_refused(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SELFPRUNER_SERCH__NAME", "x")
    with pytest.raises(SettingsError, match=r"SELFPRUNER_SERCH__NAME .*'search.name'"):
        load(config)


def test_a_missing_setting_is_named(tmp_path: Path) -> None:
    empty = tmp_path / "empty.yaml"
    empty.write_text("search: {name: x}\n")
    with pytest.raises(SettingsError, match="the setting target is missing"):
        load(empty)


def test_a_missing_file_is_named() -> None:
    with pytest.raises(SettingsError, match=r"no settings file 'nowhere.yaml'"):
        load(Path("nowhere.yaml"))


def test_every_shipped_config_loads() -> None:
    shipped = sorted(Path("configs").glob("*.yaml"))
    assert {path.name for path in shipped} >= {"quickstart.yaml", "paper.yaml", "ollama.yaml"}
    for path in shipped:
        load(path)


def test_the_page_of_all_settings_is_up_to_date() -> None:
    described = Path("docs/reference/configuration.md").read_text()
    assert described == page()
    missing = [name for name in setting_names() if f"`{name.rpartition('[].')[2]}`" not in described]
    assert not missing


def test_a_key_is_read_from_its_file_and_is_known_to_the_redaction(config: Path, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("sk-very-secret\n")
    settings = load(config, [endpoint(api_key_file=f"{tmp_path}/key"), "redis.url=redis://u:hunter22@h:6379"])
    (made,) = make_endpoints(settings.llm.endpoints)
    assert made.api_key is not None and made.api_key.get_secret_value() == "sk-very-secret"
    assert made.name == "llm.example"
    assert secrets_of(settings) == ["sk-very-secret", "hunter22"]
    assert "sk-very-secret" not in repr(settings)


@pytest.mark.parametrize("grammar", [True, False])
def test_grammars_go_to_the_endpoint_that_takes_them(config: Path, grammar: bool) -> None:
    (made,) = make_endpoints(load(config, [endpoint(grammar=grammar)]).llm.endpoints)
    assert made.grammar == grammar


def test_an_empty_key_file_means_no_key(config: Path, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("\n")
    settings = load(config, [endpoint(api_key_file=f"{tmp_path}/key")])
    assert make_endpoints(settings.llm.endpoints)[0].api_key is None
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
        ("redis://user@host", b"other" * 20_000, "it is larger than 64 KiB"),
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


@pytest.mark.parametrize("proposer", ["evolution", "random", "cma-es", "best-of-n"])
def test_the_agents_of_an_llm_do_not_count_for_other_proposers(proposer: str) -> None:
    for config in ("quickstart", "best", "openai"):
        chosen = load(ROOT / "configs" / f"{config}.yaml", [f"search.proposer={proposer}"]).search
        assert (chosen.initializer, chosen.selector, chosen.mutator, chosen.crossover) == ("llm",) * 4
        assert chosen.asks_llm == (proposer == "best-of-n")
