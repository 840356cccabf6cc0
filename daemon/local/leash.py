"""`python -m daemon.local.leash PARENT COMMAND …`: run a command, which gets SIGTERM when its parent dies.

PARENT is the parent's process id: asked for here, it could be that of whoever took over from a parent just killed.

Linux keeps the wish (PR_SET_PDEATHSIG) across exec. Elsewhere the command simply runs.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    """Put this process on the leash, then become the command."""
    parent, *command = sys.argv[1:]
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(parent):  # it died before the leash was on
        sys.exit(1)
    os.execv(command[0], command)


if __name__ == "__main__":
    main()
