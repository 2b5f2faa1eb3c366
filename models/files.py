"""Files that are written whole: a crash leaves the old one or the new one."""

import os
import threading
from pathlib import Path


def write_whole(path: Path, payload: bytes) -> None:
    """Write a file so that a crash leaves the old one or the new one."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    temporary.write_bytes(payload)
    temporary.replace(path)
