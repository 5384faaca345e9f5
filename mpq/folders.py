"""Whether a folder can be written to: asked before hours of work, not after."""

from __future__ import annotations

import tempfile
from pathlib import Path


def unwritable(folder: Path) -> str:
    """Why no file can be made in the folder, in words behind its name; "" where one can.

    One without a name is made, and is gone at once: what mode and owner allow, a file system may refuse.
    """
    if not folder.is_dir():
        return "is no folder"
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        return f"is not yours to write to ({error.strerror})"
    return ""
