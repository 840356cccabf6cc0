"""The glance at a search on a terminal: its progress, and the best rates beside the sensitivities, as rows of bars."""

import io
from pathlib import Path

import pytest
from redis.asyncio import Redis
from rich.console import Console, RenderableType

from agents.population.population import Evaluation
from daemon.monitor.events import Event
from daemon.monitor.glance import BLOCKS, DIGITS, Glance
from daemon.monitor.remote import RemoteSearch, saved_status
from daemon.monitor.run_screen import Display
from daemon.monitor.status import Status
from daemon.monitor.watch_screen import Screen
from daemon.search.control import ControlWatcher
from daemon.state.store import SearchStore
from protocol.plans.shape import BlockKind
from protocol.queue.control import Control
from protocol.queue.keys import Keys
from protocol.queue.worker_status import WorkerStatus
from tests.support.cli import Cli
from tests.support.observed import every_third_fails, observed
from tests.support.samples import SPEC, STATUS, candidates, measured
from tests.support.servers import eventually

WIDTH, HEIGHT = 80, 24


def glance_at(layers: int, kinds: tuple[BlockKind, ...] = ("attention", "mlp"), evaluations: int = 40) -> Glance:
    """A search in which the rates rise with depth and the sensitivities fall."""
    return Glance(
        measure="kl",
        uniform=2.0,
        evaluations=evaluations,
        improvements=((1, 1.9), (3, 1.5), (20, 1.4)),
        rates={kind: tuple(0.6 * i / (layers - 1) for i in range(layers)) for kind in kinds},
        sensitivity={kind: tuple(0.02 - 0.015 * i / (layers - 1) for i in range(layers)) for kind in kinds},
    )


def drawn(what: RenderableType, encoding: str = "utf-8", **options: object) -> list[str]:
    """The lines on a terminal of eighty columns."""
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    Console(width=WIDTH, file=out, force_terminal=True, **options).print(what)  # type: ignore[arg-type]
    out.seek(0)
    return out.read().splitlines()


def test_a_glance_shows_how_far_the_best_has_come_and_which_layers_are_kept() -> None:
    progress, words, attention, sensitive, mlp, _, legend, agreement = drawn(
        glance_at(8), no_color=True, color_system=None
    )
    assert progress.split() == ["best", "÷", "uniform", "██" + "▂" * 17 + "▁" * 21]
    assert words.strip() == "0.950 to 0.700 in 40 evaluations; below 1 is a gain"
    assert attention.split() == ["attention", "removed", "·▂▃▄▅▆▇█", "0%", "to", "60%"]
    assert sensitive.split() == ["sensitive", "█▇▇▆▅▄▃▃", "up", "to", "0.02"]
    assert mlp.split()[:2] == ["MLP", "removed"] and mlp.index("·") == attention.index("·")
    assert "each bar: 1 layer," in legend and "(· kept whole)" in legend and "pruned little" in agreement


@pytest.mark.parametrize(("layers", "bar"), [(30, "1 layer,"), (44, "1 layer,"), (80, "2 layers,"), (126, "3 layers,")])
@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "ascii"])
def test_each_line_fits_and_a_bar_says_how_many_layers_it_stands_for(layers: int, bar: str, encoding: str) -> None:
    glance = glance_at(layers, evaluations=123_456)
    lines = drawn(glance, encoding, color_system=None)
    assert len(lines) == glance.height and max(map(len, lines)) <= WIDTH and not any("…" in line for line in lines)
    assert f"each bar: {bar}" in lines[-2]
    marks = BLOCKS if encoding == "utf-8" else DIGITS
    assert len(lines[2].split()[2]) == -(-layers // int(bar[0])) and set(lines[2].split()[2]) <= set(marks)


def test_a_bar_of_several_layers_is_their_mean() -> None:
    lines = (
        glance_at(4).model_copy(update={"rates": {"mlp": (0.0, 0.0, 0.5, 0.3)}, "sensitivity": {}}).lines(38, BLOCKS)
    )
    _, _, rates, legend = (line.text for line in lines)
    assert rates.split()[2] == "·▇"  # of 0.4, where the highest layer has 0.5
    assert legend.startswith("each bar: 2 layers")


def test_rates_of_whole_layers_are_one_row() -> None:
    assert [line.split()[0] for line in drawn(glance_at(12, ("layer",)), color_system=None)[2:4]] == [
        "layers",
        "sensitive",
    ]


def test_before_uniform_pruning_is_measured_the_fitness_itself_is_shown() -> None:
    lines = drawn(glance_at(4).model_copy(update={"uniform": None}), color_system=None)
    assert lines[0].startswith("best kl  ") and lines[1].strip() == "1.9000 to 1.4000 in 40 evaluations"


def test_the_first_evaluations_may_have_failed() -> None:
    late = glance_at(4, evaluations=4).model_copy(update={"improvements": ((3, 1.9),)})
    assert drawn(late, color_system=None)[0] == f"{'best ÷ uniform':<20}  ██"


def test_huge_and_negative_figures_are_drawn_on_their_lines() -> None:
    odd = glance_at(4).model_copy(
        update={"improvements": ((1, 1e300), (2, 1e-300)), "sensitivity": {"attention": (-5.0, -1.0, 1e300, 0.0)}}
    )
    lines = drawn(odd, color_system=None)
    assert len(lines) == odd.height and max(map(len, lines)) == WIDTH


def test_bars_have_colours_unless_they_are_not_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert any("\x1b[36m" in line for line in drawn(glance_at(4)))
    monkeypatch.setenv("NO_COLOR", "1")
    assert not any("\x1b[3" in line for line in drawn(glance_at(4)))


@pytest.mark.parametrize("workers", [1, 64])
@pytest.mark.parametrize(("height", "members"), [(HEIGHT, 0), (40, 5)])
def test_the_screen_fits_the_terminal_with_the_glance_above_the_events(height: int, members: int, workers: int) -> None:
    status = STATUS.model_copy(
        update={
            "model": "m" * 200,
            "fitness": "kl",
            "glance": glance_at(80),
            "workers": tuple(
                WorkerStatus(consumer=f"{'long-name' * 9}:{i}", stage="unusable", detail="why " * 99)
                for i in range(workers)
            ),
        }
    )
    screen = Screen()
    screen.take(status, [Event("candidate_failed", {"candidate": "c" * 16, "detail": "x" * 300})] * 30)
    best = [Evaluation(made, measured(12.0 + i, made), i) for i, made in enumerate(candidates(5))]
    lines = [line.rstrip() for line in drawn(screen.render(status, best, height), color_system=None)]
    assert len(lines) < height and max(map(len, lines)) <= WIDTH
    text = "\n".join(lines)
    assert text.index("pruned little") < text.index("workers") < text.index("candidate failed")
    shown = [member for member in best if member.candidate.id in text]
    assert len(shown) == (members if workers == 1 else 0)
    assert ("of 64 workers" in text) == (workers == 64)


def test_a_glance_shows_the_same_in_status_after_the_end_as_the_status_that_was_saved(tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "s").mkdir()
    status = STATUS.model_copy(update={"daemon": None, "finished": True, "glance": glance_at(8)})
    (tmp_path / "s" / "status.json").write_text(status.model_dump_json())
    (tmp_path / "s" / "log.jsonl").touch()
    _, shown, _ = cli.run("status", "--folder", tmp_path)
    assert "attention removed   ·▂▃▄▅▆▇█" in shown
    assert cli.answer("status", "--folder", tmp_path)["glance"]["rates"]["mlp"][-1] == 0.6


async def test_watching_from_redis_alone_gives_the_glance_that_the_daemon_has(
    redis: Redis, keys: Keys, tmp_path: Path
) -> None:
    async with observed(redis, keys, tmp_path) as it:
        assert (await RemoteSearch(redis, keys, SPEC).status()).glance is None
        await it.searched(every_third_fails)
        found = (await RemoteSearch(redis, keys, SPEC).status()).glance
        saved = saved_status(tmp_path)
        assert it.observer.status is not None and saved is not None
        assert found == it.observer.status.glance == saved.glance
    best, proposals = (
        it.search.state.population.best(),
        [e for e in it.search.state.population if e.candidate.is_proposal],
    )
    assert found is not None and best is not None
    assert found.rates == {"layer": best.candidate.rates} and found.sensitivity == {
        "layer": it.search.state.profile.sensitivity
    }
    number, fitness = found.improvements[-1]
    assert proposals[number - 1] == best and fitness == best.outcome.fitness  # type: ignore[union-attr]
    assert found.evaluations == len(proposals)


async def test_a_run_on_a_terminal_shows_the_glance_under_its_progress(
    redis: Redis, keys: Keys, tmp_path: Path
) -> None:
    out = io.StringIO()
    display = Display(Console(width=WIDTH, height=HEIGHT, file=out, force_terminal=True, color_system=None))
    async with observed(redis, keys, tmp_path) as it:
        await it.searched()
        async with display.following(SearchStore(redis, keys, SPEC)):
            display.follow(it.search, ControlWatcher(Control(redis, keys)))
            await eventually(lambda: "pruned little" in out.getvalue())
    text = out.getvalue()
    assert text.rindex("search: round") < text.rindex("best ÷ uniform") < text.rindex("layers    removed")


@pytest.mark.parametrize(
    ("worker", "step"),
    [
        ({"stage": "loading"}, "loading"),
        ({"stage": "measuring sensitivity", "total": 60}, "measuring sensitivity, 0 of 60"),
        (
            {"stage": "measuring sensitivity", "done": 20, "total": 60, "seconds_left": 130},
            "measuring sensitivity, 20 of 60; about 2 min left in this step",
        ),
        (
            {"stage": "scoring", "done": 30, "total": 60, "seconds_left": 14.2},
            "scoring, 30 of 60; about 14 s left in this step",
        ),
        ({"stage": "scoring", "done": 60, "total": 60, "seconds_left": 0}, "scoring, 60 of 60"),
    ],
)
def test_while_the_model_is_prepared_the_status_says_what_is_done_and_how_long_the_step_takes(
    worker: dict[str, object], step: str
) -> None:
    preparing = WorkerStatus.model_validate({"consumer": "host:2:b", **worker})
    failed = WorkerStatus(consumer="host:1:a", stage="unusable")
    status = STATUS.model_copy(update={"workers": (failed, preparing)})
    lines = [[each.strip() for each in line.split(maxsplit=1)] for line in drawn(screen_of(status), color_system=None)]
    assert ["state", "preparing the model"] in lines and ["step", step] in lines
    for stage in ("idle", "evaluating"):
        ready = status.model_copy(update={"workers": (preparing, WorkerStatus(consumer="host:3:c", stage=stage))})
        assert "preparing the model" not in "\n".join(drawn(screen_of(ready), color_system=None))


def screen_of(status: Status) -> RenderableType:
    screen = Screen()
    screen.take(status, ())
    return screen.render(status, ())
