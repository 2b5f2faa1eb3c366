"""Files that are written whole: a crash leaves the old one or the new one; read whole; and those that tools leave."""

import contextlib
import os
import threading
from pathlib import Path


def write_whole(path: Path, payload: bytes) -> None:
    """Write a file so that a crash leaves the old one or the new one; an OSError names it, and leaves nothing new."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        temporary.write_bytes(payload)
        temporary.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):  # there may be no such folder
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def read_whole(path: Path) -> bytes:
    """Return a file's bytes; an OSError names it, also where the system does not, as after the file was opened."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def is_hidden(path: Path) -> bool:
    """Return whether a relative path lies among what tools leave behind: .ipynb_checkpoints, .DS_Store, __MACOSX."""
    return any(part.startswith((".", "__")) for part in path.parts)
