"""Self-Pruner as a Python library: make LLMs smaller, and read what a search has found.

    import selfpruner

    pruned = selfpruner.prune("smollm2", rate=0.3, out="small")
    model, tokenizer = selfpruner.load("small")
    selfpruner.run(pruned.search).frame()

Only the names listed in `__all__` are public; every other module of this project may change between versions. The
functions do what the commands of the same names do. They can be called while an event loop runs, as in a notebook.
"""

from daemon.monitor.drawing import Drawing
from daemon.monitor.follower import Progress
from daemon.monitor.summary import Summary
from protocol.errors import SelfPrunerError, UsageError
from protocol.results.commands import ExportResult, PruneResult, PushResult
from selfpruner.models import load, push
from selfpruner.runs import Run, run
from selfpruner.searches import prune, search

__all__ = [
    "Drawing",
    "ExportResult",
    "Progress",
    "PruneResult",
    "PushResult",
    "Run",
    "SelfPrunerError",
    "Summary",
    "UsageError",
    "load",
    "prune",
    "push",
    "run",
    "search",
]
