"""Which query may attend to which key.

A mask says it for a block of queries and a block of keys. It is evaluated only where it is needed, so `causal()` or
`lengths(n)` never hold T × S booleans, and masks combine with `&`, `|` and `~`:

    mask = masks.causal() & masks.lengths(lengths)

    causal()                  keys at the query's position and before
    window(before, after=0)   keys so near; after by name
    prefix(length)            the first keys, for all queries; causal() | prefix(n) reads a prompt in both directions
    chunk(size)               keys of the query's own chunk
    segments(queries, keys)   keys of the query's own text, several packed into one row
    lengths(lengths)          keys that are not padding
    function(mask_fn, …)      what a function of one query position and one key position says
    dense, per_example, per_head   pairs written out
    Mask                      the base of a mask of your own: a class with one method

Masks are pytrees: they go through `jit`, `vmap` and `scan`, and new values in them do not retrace.

Shapes that a mask may produce: `[t, s]`, or `[..., N, t, s]` with the leading axes of the input and 1 where all
examples or all heads share a mask. A three-axis array is never guessed to be per example or per head: `per_example` and
`per_head` say which. True always means *may attend*.

`print(mask.show(12))` draws a mask. What a kernel may leave out, `Mask.tiles` says: bounds for every tile of a grid,
known while a program is traced where the numbers in the mask are. `conditions` takes a mask apart for kernels with
options of their own, and `as_array` writes it out for what takes nothing else.
"""

from mhajax.masks.algebra import Mask, as_array, known_tiles, uncalled
from mhajax.masks.by_index import as_mask, dense, lengths, per_example, per_head, segments
from mhajax.masks.by_position import causal, chunk, function, prefix, window
from mhajax.masks.conditions import Conditions, conditions
from mhajax.masks.tiles import Tiles
from mhajax.masks.tokens import Tokens, positions, tokens

__all__ = [
    "Conditions", "Mask", "Tiles", "Tokens", "as_array", "as_mask", "causal", "chunk", "conditions", "dense",
    "function", "known_tiles", "lengths", "per_example", "per_head", "positions", "prefix", "segments", "tokens",
    "uncalled", "window",
]  # fmt: skip
