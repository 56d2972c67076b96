"""The machine that the numbers are of."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

PACKAGES = ("jax", "jaxlib", "flax", "equinox", "dm-haiku", "attnax", "tokamax", "torch")


def threads() -> int:
    """Cores, all of which every implementation may use."""
    return os.cpu_count() or 1


def describe(kept: bool) -> str:
    """One line: machine, versions, threads, settings.

    Args:
      kept: whether `host.keep_memory` is on.
    """
    versions = []
    for package in PACKAGES:
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"no {package}")
    memory = "on (freed memory is kept)" if kept else "off (as for any user of the library; --keep-memory turns it on)"
    return (
        f"{processor()}, {threads()} threads, {_gib()}{platform.system()}; Python {platform.python_version()}, "
        f"{', '.join(versions)}; {_settings()}; host.keep_memory: {memory}"
    )


def available() -> int:
    """Bytes of memory that may be taken."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        return sys.maxsize


def matmul(size: int = 2048) -> tuple[Callable[[], Any], float]:
    """A large float32 matrix product, and its operations: what the machine can do at most with XLA."""
    import jax
    import jax.numpy as jnp

    a, b = jax.random.normal(jax.random.key(0), (2, size, size))
    product = jax.jit(jnp.dot)
    return lambda: product(a, b).block_until_ready(), 2.0 * size**3


def processor() -> str:
    """Its name, and the widest vectors that it has."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
        flags = next(line.partition(":")[2].split() for line in lines if line.startswith("flags"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
    widest = next((said for flag, said in (("avx512f", "AVX-512"), ("avx2", "AVX2")) if flag in flags), "no AVX2")
    return f"{name} ({widest})"


def _settings() -> str:
    """What the environment says to XLA and JAX, which changes what is measured."""
    said = {name: value for name, value in os.environ.items() if name == "XLA_FLAGS" or name.startswith("JAX_")}
    return ", ".join(f"{name}={value}" for name, value in sorted(said.items())) or "no XLA_FLAGS, no JAX_ variables"


def _gib() -> str:
    try:
        return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB, "
    except (ValueError, OSError, AttributeError):
        return ""
