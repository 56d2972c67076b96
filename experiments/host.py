"""Settings of the machine that a long run on a CPU gains from."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8  # <malloc.h>


def keep_memory() -> bool:
    """Ask the C library to keep freed memory for the next allocation; whether it agreed.

    XLA on CPU takes its temporary buffers from malloc at every call. glibc gives large ones back to the system, which
    then maps and clears their pages anew at the next call; in a training step that was 10 to 30 % of the time. Only
    glibc on Linux knows these settings; elsewhere nothing happens.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 2**27), (_M_ARENA_MAX, 1))
    return all([mallopt(name, value) == 1 for name, value in settings])
