"""Pictures from arrays: attention, curves, and what heads do and how they differ.

Every function takes arrays and returns a Drawing: the figure, and the numbers it shows as a table, so that no picture
is without its data. Layers and heads are counted from 0 in pictures and tables alike: "layer 1 · head 3" is
`weights[1, 3]`, and "1·3" for short. Colours can be told apart by the colour-blind, and sizes are for a page of paper
or 900 pixels of a browser.

    attention_patterns   who attends to whom, one panel a head
    token_lines          the same as lines between two columns of words
    alignment_matrix     one head between two languages, with the gold links
    head_table           one number a head, with role and interval
    by_layer             distance, entropy, … of the heads, over the layers
    head_map             heads as near as they are alike
    relation_accuracy    relations found, beside the baseline
    pruning_curve        a metric while heads are removed
    interaction_matrix   one number for each pair of heads
    matched_heads        heads of two trainings, before and after matching
    training_curve       a loss over the steps
    curve                any number over a setting, such as the number of heads

`save` writes a Drawing as SVG, PDF, PNG and CSV, byte for byte the same each time; `svg` gives it to an HTML page.

    >>> found = {"verb → subject": (0.93, 0.91, 0.95, 0.31), "bank → cue": (0.96, 0.9, 1.0, 0.4)}
    >>> drawing = relation_accuracy(found, title="Best head of each relation", label="share right")
    >>> drawing.table[1][0]
    ('bank → cue', 0.96, 0.9, 1.0, 0.4)

matplotlib is imported only when something is drawn, and only its object interface is used: no pyplot, no windows.
"""

from mhajax.figures.alignment import alignment_matrix
from mhajax.figures.curves import curve, pruning_curve, training_curve
from mhajax.figures.drawing import Drawing, save, svg
from mhajax.figures.interactions import interaction_matrix
from mhajax.figures.layers import by_layer
from mhajax.figures.maps import head_map
from mhajax.figures.matching import matched_heads
from mhajax.figures.patterns import attention_patterns
from mhajax.figures.relations import relation_accuracy
from mhajax.figures.tables import head_table
from mhajax.figures.token_lines import token_lines

__all__ = [
    "Drawing",
    "alignment_matrix",
    "attention_patterns",
    "curve",
    "by_layer",
    "head_map",
    "head_table",
    "interaction_matrix",
    "matched_heads",
    "pruning_curve",
    "relation_accuracy",
    "save",
    "svg",
    "token_lines",
    "training_curve",
]
