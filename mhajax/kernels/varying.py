"""What `shard_map` wants to know: over which axes of the devices an array varies.

With its check on, which is the default, both branches of a condition and both ends of a loop must vary over the same
axes. So all that a kernel is given is made to vary alike, once, and what it starts from is `zeros_like` of that.
"""

from __future__ import annotations

from typing import Any, cast

import jax


def axes(*trees: Any) -> frozenset:
    """Those over which any array of the trees varies."""
    found: frozenset = frozenset()
    for leaf in jax.tree.leaves(trees):
        if isinstance(leaf, jax.Array):
            kind: Any = jax.typeof(leaf)
            found |= kind.mat.varying if hasattr(kind, "mat") else kind.vma  # JAX before 0.10
    return found


def over(varying: frozenset, tree: Any) -> Any:
    """The tree, with its arrays varying over these axes too; NumPy's stay as they are."""
    lax = cast(Any, jax.lax)

    def one(leaf: Any) -> Any:
        missing = tuple(varying - axes(leaf)) if isinstance(leaf, jax.Array) else ()
        if not missing:
            return leaf
        return (
            lax.pcast(leaf, missing, to="varying") if hasattr(lax, "pcast") else lax.pvary(leaf, missing)
        )  # before 0.8

    return jax.tree.map(one, tree)
