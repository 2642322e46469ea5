"""Ends a process and its children when the process that started it is gone, however that ended.

Standard input is a pipe whose other end the parent holds.  The system closes it with the parent.  Standard library
only: it runs in other interpreters too, and before ``python -c`` and scripts of others.
"""

import os
import select
import signal
import subprocess
import sys
import threading

VARIABLE = "SGLP_PARENT_WATCHED"  # set by a parent that keeps the pipe


def end_with_parent() -> None:
    """Kill this process group once nobody holds the other end of standard input.

    Does nothing in a process that was not started for it, by hand for example, nor where there is no ``poll``.
    """
    asked = os.environ.pop(VARIABLE, "")
    if not asked or not hasattr(select, "poll") or os.getpgid(0) != os.getpid():
        return

    def watch() -> None:
        hangup = select.poll()
        hangup.register(0, select.POLLHUP)  # no input is waited for
        while not any(told & (select.POLLHUP | select.POLLERR | select.POLLNVAL) for _, told in hangup.poll()):
            continue
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, name="parent", daemon=True).start()


def main() -> int:
    """Run the command given as arguments until it ends or the parent does."""
    end_with_parent()
    status = subprocess.run(sys.argv[1:], stdin=subprocess.DEVNULL, check=False).returncode
    if status < 0:  # the parent is to see how it ended
        if -status != signal.SIGKILL:
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    return status


if __name__ == "__main__":
    sys.exit(main())
