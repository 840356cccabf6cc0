"""Flags that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

from protocol.allocation import Method
from protocol.plan import Split
from protocol.shape import Granularity
from protocol.spec import Importance, Scoring

Set = Annotated[list[str] | None, typer.Option("--set", help="One setting, such as target.rate=0.3; repeatable.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]
SearchName = Annotated[str, typer.Option("--search", help="The search's name.")]
RedisUrl = Annotated[
    str | None,
    typer.Option("--redis-url", envvar="SELFPRUNER_REDIS__URL", help="Left out: the embedded server of the search."),
]
Folder = Annotated[
    Path, typer.Option("--folder", envvar="SELFPRUNER_RUN__FOLDER", help="Where `selfpruner run` keeps searches.")
]

Data = Annotated[str | None, typer.Option(help="The text to measure on: `wikitext2`, `self`, or a text file.")]
CalibrationData = Annotated[str | None, typer.Option(help="The text to score on; as --data if left out.")]
ReportData = Annotated[str | None, typer.Option(help="A second text to measure on.")]
Windows = Annotated[int | None, typer.Option(min=1, help="Windows of --data; all if left out.")]
CalibrationWindows = Annotated[int, typer.Option(min=1, help="Windows of --calibration-data.")]
ReportWindows = Annotated[int | None, typer.Option(min=1, help="Windows of --report-data; all if left out.")]
Seqlen = Annotated[int, typer.Option(min=16, help="Tokens of a window.")]
Seed = Annotated[int, typer.Option(help="Chooses the windows.")]

Rate = Annotated[float | None, typer.Option(help="The pruning rate β.")]
Allocate = Annotated[Method | None, typer.Option(help="An allocation without search.")]
Rates = Annotated[Path | None, typer.Option(help="A search's best.json, or any JSON file with `rates`.")]
GranularityFlag = Annotated[Granularity | None, typer.Option("--granularity", help="What a rate applies to.")]
SplitFlag = Annotated[Split | None, typer.Option("--split", help="How heads and MLP share a layer's rate.")]
MultipleOf = Annotated[int | None, typer.Option(min=1, help="MLP widths are multiples of so many channels.")]
ImportanceFlag = Annotated[Importance | None, typer.Option("--importance", help="How heads and channels are scored.")]
ScoringFlag = Annotated[
    Scoring | None, typer.Option("--scoring", help="Once on the dense model, or layer by layer on the pruned one.")
]
FirstLayers = Annotated[int | None, typer.Option(min=0, help="llm-pruner: so many layers at the bottom stay whole.")]
LastLayers = Annotated[int | None, typer.Option(min=0, help="llm-pruner: so many layers at the top stay whole.")]
OutlierThreshold = Annotated[float, typer.Option(help="owl: M, how many times the mean an outlier exceeds.")]
OutlierRange = Annotated[float, typer.Option(help="owl: λ, how far a layer's rate may be from β.")]
