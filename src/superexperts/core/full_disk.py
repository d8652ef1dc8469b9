"""Recognises a full disk in the errors of every library, and turns it into one message."""

from __future__ import annotations

import errno
import os
import re

from superexperts.core.errors import OutputError

__all__ = ["full_disk"]

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_SAID = re.compile("|".join(re.escape(os.strerror(number)) for number in _NO_ROOM), re.IGNORECASE)
"""Libraries in Rust and C++ raise other types of errors; only the text has the system's message for the number."""


def full_disk(error: BaseException) -> OutputError | None:
    """The error to show if a file could not be written for lack of room or by a quota; None for another error."""
    found: BaseException | None = error
    while found is not None:
        said = _SAID.search(str(found))
        if (isinstance(found, OSError) and found.errno in _NO_ROOM) or said:
            reason = found.strerror if isinstance(found, OSError) and found.strerror else said and said[0]
            where = f" {found.filename}" if isinstance(found, OSError) and found.filename else ""
            return OutputError(
                f"cannot write{where} ({reason}); make room and run the same command again, what was finished is kept",
                field="out",
            )
        found = found.__cause__ or found.__context__
    return None
