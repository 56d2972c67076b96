"""The machine: settings that a long run on a CPU gains from, and whether there is room for what is asked for."""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from pathlib import Path
from typing import Any

from experiments.errors import ConfigError

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


def memory() -> int | None:
    """Bytes that there are for arrays: the accelerator's, or this machine's (this container's). None: nobody says."""
    import jax

    device = jax.local_devices()[0]
    if device.platform != "cpu":
        return (device.memory_stats() or {}).get("bytes_limit")
    return machine_memory()


@functools.cache
def machine_memory() -> int | None:
    """Bytes that this machine (this container) has. None: nobody says."""
    there = []
    if hasattr(os, "sysconf") and {"SC_PHYS_PAGES", "SC_PAGE_SIZE"} <= os.sysconf_names.keys():
        there.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    try:
        there.append(int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii")))
    except (OSError, ValueError):  # no container, or one without a limit ("max")
        pass
    return min(there, default=None)


def check_room(what: str, arrays: Any, times: int, smaller: str) -> None:
    """Refuse arrays that cannot fit into memory, before any of them is allocated.

    Args:
      what: what they are.
      arrays: a tree of arrays or `jax.ShapeDtypeStruct`.
      times: how many such trees there are.
      smaller: the keys to make smaller.

    Raises:
      ConfigError: they are larger than all the memory; whether what is smaller fits, nobody can say beforehand.
    """
    import jax

    wanted, there = times * sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(arrays)), memory()
    if there is not None and wanted > there:
        raise ConfigError(
            f"{what} must fit into memory, which is {there / 2**30:,.1f} GiB here; they would take "
            f"{wanted / 2**30:,.1f} GiB. Make {smaller} smaller."
        )
