"""Heads cut out, reordered, moved, merged and grouped: new parameters, and the shape that goes with them.

Every function takes the parameters of an attention, of a layer, of a stack or of a model, and changes all attentions in
it. What it does with heads is said in the form of the gates: an array [..., N] for an attention (with any leading axes
that its parameters have: layers, seeds), for a model a `PerAttention` of [L, N] by the names of its attentions; one
that is left out is left alone. Nothing is changed in place. What is said about heads decides
about shapes, so it must be known outside of jit.

Masks, biases and score functions that differ between heads (`scores.alibi`) are the caller's: `places` says which head
stands where.
"""

from mhajax.heads.surgery.merging import Lost, group_kv, merge
from mhajax.heads.surgery.moving import permute, transplant
from mhajax.heads.surgery.pruning import places, prune

__all__ = ["Lost", "group_kv", "merge", "permute", "places", "prune", "transplant"]
