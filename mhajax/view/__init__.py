"""Heads to look at: attention patterns as an object that displays itself in a notebook, and as HTML for a page.

    words = ["the", "cat", "sees", "it"]
    view.heads(view.Attention(words, words, weights))              # weights [L, N, T, S], of JAX, NumPy, torch, ...

    view.heads([                                                   # several sentences, several kinds of attention
        view.Sentence("first", {"encoder": view.Attention(...), "cross": view.Attention(...)}),
        view.Sentence("second", {"encoder": view.Attention(...), "cross": view.Attention(...)}),
    ], notes={("cross", 1, 3): "word alignment 0.93 [0.91, 0.95], uniform 0.11"})

In it a person chooses a sentence, a kind of attention, a head or several among small pictures of all, and points at a
word (mouse, finger or keyboard) to see where it looks, or who looks at it, in lines and in numbers.
"""

from mhajax.view.data import Attention, Sentence, heads
from mhajax.view.page import View, script

__all__ = ["Attention", "Sentence", "View", "heads", "script"]
