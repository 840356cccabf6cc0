"""Whether the Hugging Face hub can be reached, asked once and briefly: its own clients retry for half a minute."""

import urllib.error
import urllib.request
from functools import cache

from huggingface_hub import constants

TIMEOUT_SECONDS = 5.0
"""Seconds that the hub has to answer."""


@cache
def hub_reachable() -> bool:
    """Whether the hub answers, through the proxy where one is set. False in offline mode (`HF_HUB_OFFLINE=1`)."""
    if constants.HF_HUB_OFFLINE:
        return False
    request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS).close()
    except urllib.error.HTTPError:
        return True  # it answered, if only to refuse
    except OSError:
        return False
    return True


def set_datasets_offline() -> None:
    """From now on let `datasets` read only what is on this machine.

    Half a minute of retries otherwise: `local_files_only` does not reach the look-up of a repository's files.
    """
    import datasets  # half a second that only those pay who read data from the hub

    datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
