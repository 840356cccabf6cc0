"""Checks once, briefly, whether the Hugging Face Hub is reachable, because its own clients retry for half a minute."""

import urllib.error
import urllib.request
from functools import cache

from huggingface_hub import constants

TIMEOUT_SECONDS = 5.0
"""Seconds to wait for the hub's answer."""


@cache
def hub_reachable() -> bool:
    """Return whether the hub answers (through a proxy if one is set). False in offline mode (`HF_HUB_OFFLINE=1`)."""
    if constants.HF_HUB_OFFLINE:
        return False
    request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS).close()
    except urllib.error.HTTPError:
        return True  # the hub answered, even if it refused the request
    except OSError:
        return False
    return True


def set_datasets_offline() -> None:
    """Make `datasets` use only local data from now on.

    Otherwise `datasets` retries for half a minute, because `local_files_only` has no effect on the look-up of a
    repository's files.
    """
    import datasets  # takes half a second, needed only for data from the hub

    datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
