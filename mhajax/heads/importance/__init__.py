"""How much a loss depends on each head: removals, derivatives, and how heads depend on one another.

removals    heads removed one at a time, in groups (`joint`), after others are gone (`conditional`); `ranking`
slopes      Michel's importance, attribution patching, interactions
shares      Shapley: the share of every head in what all are worth, over orders of removal
constants   heads that always say the same: zero, mean, and optimal ablation
pruning     the loss while more and more heads go, beside random orders of the same layers
kept        whether a set of heads is faithful, complete, minimal

Every function asks a `loss`, which takes gates and gives the loss of every sentence, [B], summed over its tokens. Gates
are a pytree of factors of the heads' outputs with the heads on the last axis, such as a
`PerAttention` with leaves [L, N]: 1 leaves a head alone, 0 removes it. What the loss computes is its own affair:

    def loss(gates):
        logits = translator.apply(params, source, target[:, :-1], config, gates=gates)
        nats = optax.softmax_cross_entropy_with_integer_labels(logits, target[:, 1:])
        return jnp.sum(nats * real, axis=-1)

Results have the structure of the gates with the sentences before the heads: [L, N] becomes [L, B, N].

Derivatives per sentence cost no more than derivatives of the mean: the loss of a sentence depends on no gate but its
own, so one backward pass with respect to gates [L, B, N] gives all of them. `loss` must take such gates, as all models
here do; one that takes [L, N] only is lifted by `jax.vmap(…)` over sentences and gates, as in Michel's formula.

Heads can stand in for one another. Then each costs nothing alone, and a table of single effects says that none is of
use: `joint` and `conditional` see what it misses, `shapley` divides it fairly. How far a ranking depends on the
sentences, `statistics.bootstrap_stability` says.

A gradient at gates of 1 says what a small change does. A removal is a change of 1, so where they differ, believe it.
"""

from mhajax.heads.importance.constants import Constant, optimal_constants, replacements
from mhajax.heads.importance.kept import completeness, faithfulness, minimality, random_subsets
from mhajax.heads.importance.losses import Loss, layers
from mhajax.heads.importance.pruning import curve, curves, random_orders
from mhajax.heads.importance.removals import ablations, conditional, joint, lost, ranking
from mhajax.heads.importance.shares import Shapley, antithetic, shapley
from mhajax.heads.importance.slopes import attribution, attribution_along, interactions, michel

__all__ = [
    "Constant",
    "Loss",
    "Shapley",
    "ablations",
    "antithetic",
    "attribution",
    "attribution_along",
    "completeness",
    "conditional",
    "curve",
    "curves",
    "faithfulness",
    "interactions",
    "joint",
    "layers",
    "lost",
    "michel",
    "minimality",
    "optimal_constants",
    "random_orders",
    "random_subsets",
    "ranking",
    "replacements",
    "shapley",
]
