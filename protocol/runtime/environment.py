"""The environment of child processes: ours without settings and secrets."""

import os
import re

SETTINGS_PREFIX = "SELFPRUNER_"
"""Prefix of settings, which may hold keys, tokens and passwords. Child processes get their settings as flags."""
_SECRET = re.compile(r"(^|_)(api_?keys?|keys?|tokens?|password|passwd|secrets?|credentials?|authorization)(_|$)", re.I)
_HUB = re.compile(r"(HF|HUGGING_?FACE)_", re.IGNORECASE)


THREADS = {"OMP_WAIT_POLICY": "PASSIVE"}
"""Environment variables of a process that runs a model; one that is already set is kept. OpenMP's threads must not
spin, because spinning threads lose most of their time when another program, such as a local LLM, uses the cores."""


def child_environment(*, loads_models: bool = False, own: tuple[str, ...] = ()) -> dict[str, str]:
    """Return the environment without our settings and secrets.

    With `loads_models`, the hub's token is kept, and so is every variable whose name begins with one of `own`.
    """
    return {
        name: value
        for name, value in os.environ.items()
        if not name.upper().startswith(SETTINGS_PREFIX)
        and (not _SECRET.search(name) or (loads_models and _HUB.match(name)) or name.upper().startswith(own))
    }
