"""`python -m daemon.local.end_with_parent PARENT COMMAND …`: run a command, which gets SIGTERM when its parent dies.

PARENT is the parent's process id. This process cannot look it up itself, because after a kill of the parent it would
get the id of a new parent.

Linux keeps this setting (PR_SET_PDEATHSIG) across exec. On other systems the command simply runs.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    """Ask for SIGTERM at the parent's death, then become the command."""
    parent, *command = sys.argv[1:]
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(parent):  # the parent died before the request
        sys.exit(1)
    os.execv(command[0], command)


if __name__ == "__main__":
    main()
