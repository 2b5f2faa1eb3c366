"""The one place where what stops a command becomes a line on standard error, with the remedy, and an exit status."""

import errno
import socket
import sys
from collections.abc import Callable

from unperturb.models.errors import UnperturbError

FULL, CLOSED = "free some space", "look at its permissions, or choose a place that can be written to"
REMEDIES = {
    errno.ENOSPC: FULL,
    errno.EDQUOT: FULL,
    errno.EACCES: CLOSED,
    errno.EPERM: CLOSED,
    errno.EROFS: CLOSED,
    errno.EEXIST: "a file stands where a folder is needed: move it, or choose another place",
    errno.ENOTDIR: "a file stands where a folder is needed: move it, or choose another place",
    errno.EISDIR: "a folder stands where a file is needed: move it, or choose another place",
    errno.ENOENT: "look whether it is spelled right",
    errno.EIO: "its disk or file system fails: copy it elsewhere",
    socket.EAI_NONAME: "give an address of this machine, as 127.0.0.1",
    errno.EADDRINUSE: "something listens there already: stop it, or choose another port",
    errno.EADDRNOTAVAIL: "this machine has no such address",
}
REFUSED, INTERRUPTED = 2, 130


def run(program: str, command: Callable[[], int | None], *, interrupted: str = "") -> int:
    """Run a command; return its own exit status, 0 where it gives none.

    2 where this project refuses something or the operating system a file, 130 where it is interrupted, each after one
    line. `interrupted` says how to go on.
    """
    try:
        return command() or 0
    except UnperturbError as error:
        said = f"{program}: {error}"
    except OSError as error:
        said = f"{program}: {told(error)}"
    except KeyboardInterrupt:
        sys.stderr.write(f"\n{program}: interrupted{'; ' * bool(interrupted)}{interrupted}\n")
        return INTERRUPTED
    sys.stderr.write(f"{said}\n")
    return REFUSED


def told(error: OSError) -> str:
    """Return an operating system's error as the file, what is wrong with it, and the remedy."""
    where = f"{error.filename}: " if error.filename else ""
    remedy = REMEDIES.get(error.errno or 0)
    return f"{where}{error.strerror or error}" + (f"; {remedy}" if remedy else "")
