"""What a kernel with options of its own can do of a mask: the conditions that must all hold, by name."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from jax.typing import ArrayLike

from mhajax.masks import static
from mhajax.masks.algebra import And, Mask, Not
from mhajax.masks.by_index import Lengths, Segments
from mhajax.masks.by_position import Causal, Window


class Conditions(NamedTuple):
    """A mask as conditions that must all hold.

    A causal window that looks ahead does not exist: `causal` is True if `window` is known to have nothing after, and
    a window beside `causal` has 0 after.

    Attributes:
      causal: key position ≤ query position.
      window: (before, after), as in `masks.window`; Python integers where they are known; None: no window.
      lengths: [] or [...], as in `masks.lengths`; None: no lengths.
      segments: of the queries [..., T] and the keys [..., S]; None: no segments.
      rest: masks of other kinds, which must allow it too. A kernel that cannot do them cannot do the mask.
    """

    causal: bool = False
    window: tuple[ArrayLike, ArrayLike] | None = None
    lengths: ArrayLike | None = None
    segments: tuple[ArrayLike, ArrayLike] | None = None
    rest: tuple[Mask, ...] = ()


def conditions(mask: Mask | None) -> Conditions:
    """Takes a mask apart at its `&`, and names the conditions that cuDNN, splash and the like have options for.

    Causal and window compare positions, lengths and segments are looked up by index. A kernel that knows indices only
    gives the same if `queries.origin` and `keys.origin` are one number (not None) and both start at 0.

    Args:
      mask: None has no conditions.

    >>> from mhajax import masks
    >>> conditions(masks.causal() & masks.window(4) & masks.lengths(3) & ~masks.chunk(2))
    Conditions(causal=True, window=(4, 0), lengths=3, segments=None, rest=(~chunk(2),))
    """
    found = Conditions()
    for part in [] if mask is None else _flat(mask):
        if isinstance(part, Causal):
            found = found._replace(causal=True)
        elif isinstance(part, Window):
            window = part.before, part.after
            if found.window is not None:
                window = _smaller(window[0], found.window[0]), _smaller(window[1], found.window[1])
            found = found._replace(window=window)
        elif isinstance(part, Lengths):
            found = found._replace(
                lengths=part.lengths if found.lengths is None else _smaller(part.lengths, found.lengths)
            )
        elif isinstance(part, Segments) and found.segments is None:
            found = found._replace(segments=(part.queries, part.keys))
        else:
            found = found._replace(rest=(*found.rest, part))
    if found.window is None:
        return found
    before, after = map(_plain, found.window)
    causal = found.causal or (static.known(after) and after == 0)
    return found._replace(causal=causal, window=(before, 0 if causal else after))


def _flat(mask: Mask) -> list[Mask]:
    """Masks that must all allow it."""
    if isinstance(mask, And):
        return [part for side in mask.parts() for part in _flat(side)]
    if isinstance(mask, Not) and isinstance(mask.mask, Not):
        return _flat(mask.mask.mask)
    return [mask]


def _smaller(first: ArrayLike, second: ArrayLike) -> Any:
    first, second = static.numbers(first, second)
    return static.library(first).minimum(first, second)


def _plain(value: ArrayLike) -> Any:
    """One integer: a Python integer where it is known."""
    return int(np.asarray(value)) if static.known(value) else value
