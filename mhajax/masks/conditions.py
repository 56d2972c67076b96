"""What a kernel with options of its own can do of a mask: the conditions that must all hold, by name."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import numpy as np
from jax.typing import ArrayLike

from mhajax.masks import static


class Conditions(NamedTuple):
    """A mask as conditions that must all hold.

    A causal window that looks ahead does not exist: `causal` is True if `window` is known to have nothing after, and
    a window beside `causal` has 0 after. So a rolling cache of `window[0] + 1` slots forgets nothing that is needed.

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
    rest: tuple[Any, ...] = ()


class _Conditional(Protocol):
    def add_to(self, found: Conditions, /) -> Conditions: ...


def conditions(mask: _Conditional | None) -> Conditions:
    """Takes a mask apart at its `&`, and names the conditions that cuDNN, splash and the like have options for.

    Causal and window compare positions, lengths and segments are looked up by index. A kernel that knows indices only
    gives the same if `queries.origin` and `keys.origin` are one number (not None) and both start at 0.

    Args:
      mask: it is asked what it adds (`Mask.add_to`); None has no conditions.

    >>> from mhajax import masks
    >>> conditions(masks.causal() & masks.window(4) & masks.lengths(3) & ~masks.chunk(2))
    Conditions(causal=True, window=(4, 0), lengths=3, segments=None, rest=(~chunk(2),))
    """
    found = Conditions() if mask is None else mask.add_to(Conditions())
    if found.window is None:
        return found
    before, after = (int(np.asarray(side)) if static.known(side) else side for side in found.window)
    causal = found.causal or (static.known(after) and after == 0)
    return found._replace(causal=causal, window=(before, 0 if causal else after))


def smaller(value: ArrayLike, found: ArrayLike | None) -> Any:
    """The value, or what was found before if it is smaller; None: nothing was."""
    if found is None:
        return value
    value, found = static.numbers(value, found)
    return static.library(value).minimum(value, found)
