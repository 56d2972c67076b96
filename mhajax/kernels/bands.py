"""How the queries of a short sequence are cut, so that keys which the mask is known to hide are not computed."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from mhajax import masks
from mhajax.masks import Mask, Tokens

LEAST_ROWS = 2048  # queries of all heads together; fewer are not enough work for several cores
_HEIGHT, _RUN = 128, 32  # queries of a band, if there are enough heads; its keys are a multiple


class Band(NamedTuple):
    """Queries that are computed together, and the run of keys that the mask leaves to them."""

    first: int
    end: int
    first_key: int
    end_key: int

    @property
    def rows(self) -> slice:
        return slice(self.first, self.end)

    @property
    def columns(self) -> slice:
        return slice(self.first_key, self.end_key)


Bands = tuple[Band, ...]


def cut(mask: Mask | None, queries: Tokens, keys: Tokens, items: int, group: int = 1) -> Bands:
    """How the queries are cut, so that keys which the mask is known to hide are not computed.

    Args:
      mask, queries, keys: as in `fused.attend`.
      items: B·K, heads that are computed together.
      group: N/K; heads that share a key head are not cut.
    """
    height = max(_HEIGHT, -(-LEAST_ROWS // max(items, 1)))
    count = queries.size // height
    if mask is None or group > 1 or count < 2:
        return (Band(0, group * queries.size, 0, keys.size),)
    height = -(-queries.size // count)
    some, _ = masks.known_tiles(mask, queries, keys, height, _RUN)
    seen: np.ndarray = np.any(np.asarray(some).reshape(-1, *some.shape[-2:]), axis=0)
    found: list[Band] = []
    for i, row in enumerate(seen):
        there = np.flatnonzero(row) if row.any() else np.zeros(1, int)
        columns = int(there[0]) * _RUN, min(int(there[-1] + 1) * _RUN, keys.size)
        band = Band(i * height, min((i + 1) * height, queries.size), *columns)
        if found and found[-1][2:] == columns:
            band = band._replace(first=found.pop().first)
        found.append(band)
    return tuple(found)


def compared(bands: Bands) -> float:
    """Keys that a query is compared with, in the mean."""
    return sum((b.end - b.first) * (b.end_key - b.first_key) for b in bands) / max(1, bands[-1].end)


def part(band: Band, q: Array, k: Array, v: Array) -> tuple[Array, Array, Array]:
    """What a band takes of [c, T, H], [c, S, H] and [c, S, Hv]."""
    return q[:, band.rows], k[:, band.columns], v[:, band.columns]


def bound_of(bound: Array | None, index: Array, some: int, num_heads: int, band: Band) -> Array | None:
    """A band of the bound of the chunk with this number, of `some` heads of examples: [c or 1, 1, t, s]."""
    if bound is None:
        return None
    bound = bound[:, :, band.rows, band.columns]
    if bound.shape[:2] == (1, 1):
        return bound
    items = index * some + jnp.arange(some)
    of_items = bound[items // num_heads if bound.shape[0] > 1 else 0, items % num_heads if bound.shape[1] > 1 else 0]
    return of_items[:, None]
