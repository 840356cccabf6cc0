"""What a child process is given of our environment: nothing that it could tell and need not know."""

import os
import re
from collections.abc import Mapping

OURS = "SELFPRUNER_"
"""Settings, which hold keys, tokens and passwords; children get theirs as flags."""
_SECRET = re.compile(r"(^|_)(api_?keys?|keys?|tokens?|password|passwd|secrets?|credentials?|authorization)(_|$)", re.I)
_HUB = re.compile(r"(HF|HUGGING_?FACE)_", re.IGNORECASE)


def for_child(*, loads_models: bool = False, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment without our settings and without secrets. `loads_models`: the hub's token stays."""
    return {
        name: value
        for name, value in environ.items()
        if not name.upper().startswith(OURS) and (not _SECRET.search(name) or (loads_models and _HUB.match(name)))
    }
