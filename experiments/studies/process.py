"""Is multi-head attention the four steps of the explanation? `kind = "process"`.

    1. every head projects the input into queries, keys and values of its own
    2. every head attends by itself: softmax(q kᵀ / √H) v
    3. the heads are concatenated
    4. one linear map combines them
(Vaswani et al. 2017, section 3.2.2.)

The rule, stated before anything is run: the largest difference from `mhajax.attention.apply`, over all draws and
entries, as a share of the largest entry.
    supported     it is at most the tolerance for each of the others
    refuted       it is more for one of them
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from experiments.studies import paired
from experiments.studies.study import Answer, Study, Train, Verdict
from mhajax import attention, convert, figures
from mhajax.report.page import Column, Page

Numbers = Any  # [B, T, D], of NumPy or JAX


@dataclass(frozen=True, kw_only=True)
class Config(Study):
    """`kind = "process"`: the four steps, written out and in other libraries, against ours.

    Attributes:
      kind: what this config is for.
      quick: set by --quick: few draws.
      d_model, num_heads: D and N of the attention that is compared.
      length: T, tokens of a sequence.
      draws: how many parameters and inputs are drawn.
      tolerance: the largest difference, as a share of the largest entry.
    """

    kind: Literal["process"] = "process"
    quick: bool | None = None
    d_model: int = 64
    num_heads: int = 8
    length: int = 16
    draws: int = 10
    tolerance: float = 1e-5

    def __post_init__(self):
        attention.Config(d_model=self.d_model, num_heads=self.num_heads)  # which says what does not fit
        for name in ("length", "draws"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if not 0 < self.tolerance < 1:
            raise ValueError(f"tolerance must be above 0 and below 1, got {self.tolerance}.")


def shrink(config: Config) -> Config:
    """The same with few draws."""
    return dataclasses.replace(config, draws=min(config.draws, 2))


def hashes(config: Config) -> dict[str, str]:
    """Nothing is read."""
    return {}


def answer(config: Config, train: Train | None = None) -> Answer:
    """Compute it in every way, compare, and write the page."""
    shape = attention.Config(d_model=config.d_model, num_heads=config.num_heads)
    apply = jax.jit(lambda params, x: attention.apply(params, x, shape))
    differences: dict[str, list[float]] = {name: [] for name in available()}
    for draw in range(config.draws):
        params = attention.init_params(jax.random.key(draw), shape)
        x = jax.random.normal(jax.random.key(1000 + draw), (2, config.length, config.d_model))
        ours = np.asarray(apply(params, x), np.float64)
        for name, found in differences.items():
            theirs = np.asarray(WAYS[name](params, x, shape), np.float64)
            found.append(float(np.abs(theirs - ours).max() / np.abs(ours).max()))
    return _answer(config, differences)


def in_numpy(params: attention.Params, x: Numbers, config: attention.Config) -> Numbers:
    """The four steps in float64, a loop over heads and queries."""
    w_q, w_k, w_v, w_o = (np.asarray(a, np.float64) for a in (params.w_q, params.w_k, params.w_v, params.w_o))
    x = np.asarray(x, np.float64)
    out = np.zeros_like(x)
    for b in range(len(x)):
        heads = []
        for n in range(config.num_heads):
            q, k, v = x[b] @ w_q[n], x[b] @ w_k[n], x[b] @ w_v[n]
            rows = []
            for query in q:
                weights = np.exp(k @ query / np.sqrt(len(query)))
                rows.append(weights / weights.sum() @ v)
            heads.append(rows)
        out[b] = np.concatenate(heads, axis=-1) @ np.concatenate(w_o)
    return out


def in_jax_nn(params: attention.Params, x: Numbers, config: attention.Config) -> Numbers:
    """Step 2 by `jax.nn.dot_product_attention`."""
    q, k, v = (jnp.einsum("btd,ndh->btnh", x, w) for w in (params.w_q, params.w_k, params.w_v))
    return jnp.einsum("btnh,nhd->btd", jax.nn.dot_product_attention(q, k, v), params.w_o)


def in_linen(params: attention.Params, x: Numbers, config: attention.Config) -> Numbers:
    """Flax Linen's layer, with our parameters."""
    from flax import linen

    layer = linen.MultiHeadDotProductAttention(num_heads=config.num_heads, use_bias=False)
    return layer.apply({"params": convert.to_linen(params, config)}, x)


def in_nnx(params: attention.Params, x: Numbers, config: attention.Config) -> Numbers:
    """Flax NNX's layer, with our parameters."""
    from flax import nnx

    layer = nnx.MultiHeadAttention(config.num_heads, config.d_model, use_bias=False, decode=False, rngs=nnx.Rngs(0))
    state = nnx.state(layer, nnx.Param)
    nnx.replace_by_pure_dict(state, convert.to_nnx(params, config))
    nnx.update(layer, state)
    return layer(x)


def in_torch(params: attention.Params, x: Numbers, config: attention.Config) -> Numbers:
    """Torch's layer, with our parameters."""
    import torch  # pyright: ignore[reportMissingImports]

    layer = torch.nn.MultiheadAttention(config.d_model, config.num_heads, bias=False, batch_first=True)
    state = {name: torch.tensor(np.asarray(a)) for name, a in convert.to_torch(params, config).items()}
    layer.load_state_dict(state)
    with torch.no_grad():
        text = torch.tensor(np.asarray(x))
        return layer(text, text, text, need_weights=False)[0].numpy()


def as_a_sum(params: attention.Params, x: Numbers, config: attention.Config) -> Numbers:
    """Steps 3 and 4 as the sum of what each head contributes, w_o cut into a piece for each head."""
    captured = attention.apply_captured(params, x, config, capture=("contributions",))[1]
    return jnp.sum(captured["contributions"], axis=1)


WAYS: dict[str, Callable[[attention.Params, Numbers, attention.Config], Numbers]] = {
    "NumPy, float64, a loop over heads and queries": in_numpy,
    "jax.nn.dot_product_attention between einsums": in_jax_nn,
    "flax.linen.MultiHeadDotProductAttention": in_linen,
    "flax.nnx.MultiHeadAttention": in_nnx,
    "torch.nn.MultiheadAttention": in_torch,
    "the sum over heads of head · w_o": as_a_sum,
}


def available() -> list[str]:
    """The ways whose libraries are installed."""
    return [name for name in WAYS if not name.startswith("torch") or importlib.util.find_spec("torch") is not None]


def verdict(differences: dict[str, Sequence[float]], tolerance: float) -> Verdict:
    """What the rule says."""
    worst = max(differences, key=lambda name: max(differences[name]))
    most = max(differences[worst])
    because = f"the largest difference is {most:.1e} of the largest entry, from “{worst}”; {tolerance:g} is allowed"
    return Verdict(CLAIM, "supported" if most <= tolerance else "refuted", because)


def judge(config: Config, result: dict[str, Any]) -> tuple[Verdict, ...]:
    """The verdict that follows from the numbers in a result, by the rule."""
    return (verdict(result["differences"], config.tolerance),)


CLAIM = "Multi-head attention is: project for every head, attend, concatenate, one linear map."


def _answer(config: Config, differences: dict[str, list[float]]) -> Answer:
    said = verdict(dict(differences), config.tolerance)
    page = Page("What multi-head attention computes", f"{said.claim} {said.word.capitalize()}: {said.because}.")
    section = page.section("The four steps")
    section.text(
        "Every head n projects the input, q = x w_q[n], k = x w_k[n], v = x w_v[n]; attends, softmax(q kᵀ / √H) v; the "
        "heads are concatenated and multiplied with w_o (Vaswani et al. 2017, section 3.2.2).",
        f"{config.draws} draws of parameters and of two sequences of {config.length} tokens, D = {config.d_model}, "
        f"N = {config.num_heads}; ours in float32.",
    )
    allowed = float(np.log10(config.tolerance))
    logs = {name: paired.over_seeds(np.log10(np.maximum(one, 1e-17)), allowed) for name, one in differences.items()}
    drawing = figures.relation_accuracy(
        {name: tuple(float(part) for part in one) for name, one in logs.items()},
        title="How far each of them is from ours", baseline_name="allowed",
        label="log10 of the largest difference in a draw, a share of the largest entry",
    )  # fmt: skip
    section.figure(
        drawing, "The largest difference of each draw: mean over the draws, and its interval of 95 %.", name="process"
    )
    section.table(
        ["computed by", Column("largest difference", ".1e"), Column("median", ".1e")],
        [[name, max(found), float(np.median(found))] for name, found in differences.items()],
        caption="Differences, as a share of the largest entry of the output.",
    )
    page.section("What would change this").text(
        "It is a definition that is checked, and no finding: masks, biases and other scores are other functions, "
        "compared with the same loop in the library's tests."
    )
    return Answer((said,), {"differences": differences, "tolerance": config.tolerance}, page, {"process": drawing})
