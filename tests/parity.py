"""Every feature of the kernels on every path, against loops in float64 with their gradient; makes docs/parity.md."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache, partial
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import parity_features
from parity_features import CASES, Case, booleans
from parity_loops import loops
from reference import enable_x64, numbers

from mhajax import kernels, masks, scores
from mhajax.kernels import PATHS, Plan, Tiling, blockwise, ring

# What every number is held to, relative to the largest one. Not what was measured, so that the table stays the same.
BOUNDS = {"float64": "1e-12", "float32": "2e-6", "float16": "2e-3", "bfloat16": "1e-2"}
TILINGS = ((1, 5, 6), (2, 4, 17), (4, 7, 6))  # several tiles: one after the other by feature
ALL_HEADS = (5, 6)  # all heads of all examples at once
# Nearly all of the time is the compiler's; so it takes a quarter of it.
QUICK: dict[str, Any] = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_parallel_codegen_split_count": 1,
}
quick = partial(jax.jit, compiler_options=QUICK)


class Path(NamedTuple):
    """A kernel, the tiling that it is made to take, and how many heads it takes at once where there is no gradient."""

    kernel: str
    tiling: Tiling | None = None
    values_at_once: int = 0


def paths(name: str) -> dict[str, Path]:
    """The paths that are computed here, with their tilings for a feature."""
    case = FEATURES[name].case
    items, rows, columns = TILINGS[list(FEATURES).index(name) % len(TILINGS)]
    return {
        "dense": Path("dense"),
        "blockwise, several tiles": Path("blockwise", Tiling(min(items, case.items), rows, columns)),
        "blockwise, all heads at once": Path("blockwise", Tiling(case.items, *ALL_HEADS)),
    }


def attend(path: Path, q: Any, k: Any, v: Any, **options: Any) -> Any:
    """`kernels.attend` on this path."""
    given = {"queries": masks.tokens(q.shape[-2]), "keys": masks.tokens(k.shape[-2])} | options
    with mock.patch.object(blockwise, "plan", lambda request: Plan("", path.tiling, path.values_at_once)):
        return kernels.attend(q, k, v, kernel=path.kernel, **given)


# The paths ----------------------------------------------------------------------------------------------------------


def inputs(case: Case) -> tuple:
    """q, k, v, extras, and cotangents of the heads and of the log-sum-exp, in the case's dtype."""
    b, n, k, t, s, h, hv = case.sizes
    shapes = [(n, t, h), (k, s, h), (k, s, hv), (n, t, hv), (n, t)]
    q, k, v, d_out, d_log_sums = (
        numbers(i, b, *shape).astype(case.dtype if i < 4 else case.wide) for i, shape in enumerate(shapes)
    )
    return q, k, v, {name: np.asarray(a, case.wide) for name, a in case.extras.items()}, d_out, d_log_sums


def body(path: Path, case: Case) -> Callable:
    """(q, k, v, extras, cotangents) → what `loops` returns; -inf and NaN of the log-sum-exp are not summed."""

    def forward(q: Any, k: Any, v: Any, extras: dict) -> tuple:
        leading = (case.sizes.b,) if case.leading is None else case.leading
        q, k, v = (a.reshape(*leading, *a.shape[1:]) for a in (q, k, v))
        if case.call is not None:
            heads, log_sums = case.call(lambda *given, **options: attend(path, *given, **options), q, k, v)
        else:
            heads, seen = attend(path, q, k, v, **case.options(extras), **case.dropped, capture=("log_sum_exp",))
            log_sums = seen["log_sum_exp"]
        if "sinks" in extras:
            heads = scores.with_sinks(heads, log_sums, extras["sinks"])
        if "gates" in extras:
            heads = heads * extras["gates"][:, None, None]
        return heads.reshape(case.sizes.b, *heads.shape[-3:]), log_sums.reshape(case.sizes.b, *log_sums.shape[-2:])

    def both(q: Any, k: Any, v: Any, extras: dict, d_out: Any, d_log_sums: Any) -> list:
        (heads, log_sums), pull = jax.vjp(forward, q, k, v, extras)
        *gradients, d_extras = pull((d_out, jnp.where(jnp.isfinite(log_sums), d_log_sums, 0)))
        return [heads, log_sums, *gradients, *(d_extras[name] for name in sorted(d_extras))]

    return both


def assert_close(got: Any, expected: Any, bound: str) -> str:
    """Every number within the bound, relative to the array's largest; where one is infinite, so is the other."""
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert a.shape == b.shape
        np.testing.assert_array_equal(np.isneginf(a), np.isneginf(b))
        a, b = (np.where(np.isneginf(x), 0, x) for x in (a, b))
        assert np.all(np.isfinite(b))
        error = np.max(np.abs(a - b)) / (np.max(np.abs(b)) or 1)
        assert error <= float(bound), f"array {i} is wrong by {error}, more than {bound}"
    return f"≤ {bound}"


def in_bits(case: Case) -> Any:
    """64 bits within a `with` block if the case has float64."""
    return enable_x64() if case.dtype == "float64" else nullcontext()


def against_loops(path: Path, case: Case) -> str:
    given = inputs(case)
    with in_bits(case):
        got = quick(body(path, case))(*given)
        assert got[0].dtype == case.dtype and got[1].dtype == case.wide
    return assert_close(got, loops(case, *given), BOUNDS[case.dtype])


def lifted(path: Path, case: Case) -> str:
    """A vmap over three values of the extras is three calls."""
    q, k, v, extras, *cotangents = inputs(case)
    many = {name: np.stack([a, 2 * a, a[::-1]]) for name, a in extras.items()}
    got = quick(jax.vmap(body(path, case), in_axes=(None, None, None, 0, None, None)))(q, k, v, many, *cotangents)
    expected = [loops(case, q, k, v, {name: a[i] for name, a in many.items()}, *cotangents) for i in range(3)]
    return assert_close(got, [np.stack(arrays) for arrays in zip(*expected, strict=True)], BOUNDS[case.dtype])


def mask_as_argument(path: Path, case: Case) -> str:
    """One trace for all values of a mask."""
    traces = []

    def both(mask: Any, *given: Any) -> list:
        traces.append(mask)
        return body(path, case._replace(options=lambda extras: {"mask": mask}))(*given)

    program, given = quick(both), inputs(case)
    for lengths in (np.array([9, 0]), np.array([3, 17])):
        pairs = booleans(int(lengths[0]), case.sizes.t, case.sizes.s)
        mask = masks.lengths(lengths) & (masks.causal() | masks.dense(pairs))
        seen = (np.arange(case.sizes.s) < lengths[:, None, None, None]) & (parity_features.CAUSAL | pairs)
        text = assert_close(program(mask, *given), loops(case._replace(allowed=seen), *given), BOUNDS[case.dtype])
    assert len(traces) == 1
    return text


def nothing_to_attend_to(path: Path, case: Case) -> str:
    """Zeros for such queries and their gradient, and for what nobody sees; the others are right."""
    given = inputs(case)
    got = heads, log_sums, d_q, d_k, d_v = [np.asarray(a) for a in quick(body(path, case))(*given)]
    seen = np.broadcast_to(case.allowed, (case.sizes.b, case.sizes.n, case.sizes.t, case.sizes.s))
    empty, unseen = ~seen.any(-1), ~seen.reshape(case.sizes.b, case.sizes.k, -1, case.sizes.s).any(2)
    assert empty[0].all() and empty[1].any() and not empty.all() and unseen[0].all()
    assert np.all(np.isneginf(log_sums)[empty]) and not heads[empty].any() and not d_q[empty].any()
    assert not np.any(d_k[unseen]) and not np.any(d_v[unseen])
    assert_close(got, loops(case, *given), BOUNDS[case.dtype])
    return "exact"


BAD = (np.nan, np.inf, -np.inf)


def hidden_keys(path: Path, case: Case) -> str:
    """What is not finite behind the lengths changes no bit of anything."""
    program, (q, k, v, *others) = quick(body(path, case)), inputs(case)
    sound = program(q, k, v, *others)
    for bad in BAD:
        spoilt_k, spoilt_v = k.copy(), v.copy()
        spoilt_k[0, :, 10:, 2], spoilt_v[0, 1, 9:] = bad, bad
        for a, b in zip(program(q, spoilt_k, spoilt_v, *others), sound, strict=True):
            np.testing.assert_array_equal(a, b)
    assert np.all(np.isfinite(sound[0]))
    return "exact"


def visible_keys(path: Path, case: Case) -> str:
    """NaN for the queries that see it, and no gradient from them; a loss without them changes by no bit."""
    program, (q, k, v, extras, d_out, d_log_sums) = quick(body(path, case)), inputs(case)
    seen = np.broadcast_to(case.allowed, (case.sizes.b, case.sizes.n, case.sizes.t, case.sizes.s))
    for name, bad in (("k", np.nan), ("v", np.inf), ("q", np.nan)):
        spoilt = {"q": q.copy(), "k": k.copy(), "v": v.copy()}
        sound = {"q": q.copy(), "k": k.copy(), "v": v.copy()}
        spoilt[name][1, 0, 4, 1], sound[name][1, 0, 4] = bad, 0
        hit = np.zeros(seen.shape[:-1], bool)
        if name == "q":
            hit[1, 0, 4] = seen[1, 0, 4].any()
        else:
            hit[1, : case.sizes.n // case.sizes.k] = seen[1, : case.sizes.n // case.sizes.k, :, 4]
        assert hit.any() and not hit.all()
        cotangents = np.where(hit[..., None], 0, d_out), np.where(hit, 0, d_log_sums)
        got, expected = (program(a["q"], a["k"], a["v"], extras, *cotangents) for a in (spoilt, sound))
        assert np.all(np.isnan(got[0]) == hit[..., None]) and np.all(np.isnan(got[1]) == hit)
        for a, b in zip(got[:2], expected[:2], strict=True):
            np.testing.assert_array_equal(np.asarray(a)[~hit], np.asarray(b)[~hit])
        for a, b in zip(got[2:], expected[2:], strict=True):
            np.testing.assert_array_equal(np.where(a == 0, 0, a), np.where(b == 0, 0, b))
        for cotangent in (d_out, np.where(hit[..., None], np.nan, d_out)):
            loud = program(*(spoilt[name] for name in "qkv"), extras, cotangent.astype(d_out.dtype), d_log_sums)
            quiet = program(*(spoilt[name] for name in "qkv"), extras, cotangents[0], d_log_sums)
            for a, b in zip(loud[2:], quiet[2:], strict=True):
                np.testing.assert_array_equal(a, b)
    return "exact"


def looking(path: Path, case: Case) -> str:
    """What is captured is right, and changes no bit of the output."""
    q, k, v, extras, *_ = given = inputs(case)
    run = lambda capture: quick(  # noqa: E731
        lambda q, k, v: attend(path, q, k, v, **case.options(extras), **case.dropped, capture=capture)
    )(q, k, v)
    plain, (heads, seen) = run(())[0], run(kernels.CAPTURES)
    np.testing.assert_array_equal(plain, heads)
    allowed = np.broadcast_to(case.allowed, seen["weights"].shape)
    np.testing.assert_array_equal(np.isneginf(seen["logits"]), ~allowed)
    log_sums = np.asarray(loops(case, *given)[1])[..., None]
    weights = np.where(allowed, np.exp(np.asarray(seen["logits"], np.float64) - log_sums), 0)
    assert_close([seen["log_sum_exp"], seen["weights"]], [log_sums[..., 0], weights], BOUNDS[case.dtype])
    return "exact"


def a_row_that_is_the_same(path: Path, case: Case) -> str:
    """Weights that sum to 1, entropies, what keys receive, and gradients, where log S is lost in the log-sum-exp."""
    q, k, v, _, d_out, d_log_sums = given = inputs(case)

    def both(q: Any, k: Any, v: Any) -> tuple:
        run = lambda *given: attend(path, *given, **case.options({}), capture=kernels.CAPTURES)  # noqa: E731
        heads, pull, seen = jax.vjp(run, q, k, v, has_aux=True)
        return heads, seen, pull(d_out)

    heads, seen, gradients = quick(both)(q, k, v)
    expected_heads, log_sums, *expected = loops(case, *given[:5], 0 * d_log_sums)
    logits = np.einsum("bnth,bnsh->bnts", q, np.repeat(k, 2, axis=1), dtype=np.float64) * case.sizes.h**-0.5
    logits = case.logits(logits, {})
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    captured = [weights, -np.sum(weights * np.log(weights), axis=-1), weights.sum(-2), log_sums]
    got = [seen[name] for name in ("weights", "entropy", "column_sums", "log_sum_exp")]
    return assert_close([heads, *gradients, *got], [expected_heads, *expected, *captured], BOUNDS[case.dtype])


def forward_mode(path: Path, case: Case) -> str:
    """Jacobian times direction, against the loops' gradient along it."""
    q, k, v, _, d_out, _ = given = inputs(case)
    along = tuple(numbers(50 + i, *a.shape) for i, a in enumerate((q, k, v)))
    function = lambda q, k, v: attend(path, q, k, v, **case.options({}))[0]  # noqa: E731
    _, change = quick(lambda given, along: jax.jvp(function, given, along))((q, k, v), along)
    gradients = loops(case, *given[:5], np.zeros(d_out.shape[:-1]))[2:]
    expected = sum(np.sum(g * a) for g, a in zip(gradients, along, strict=True))
    return assert_close([np.sum(np.asarray(change, np.float64) * d_out)], [expected], BOUNDS[case.dtype])


def gradients_of_gradients(path: Path, case: Case) -> str:
    """The gradient of the gradients' product with a direction, against differences of the loops' gradients."""
    *given, d_out, d_log_sums = inputs(case)
    along = jax.tree.map(lambda a: np.random.default_rng(a.size).normal(size=a.shape), tuple(given))
    flat = lambda tree: [*tree[:3], *(tree[3][name] for name in sorted(tree[3]))]  # noqa: E731

    def product(given: Any) -> Any:
        gradients = body(path, case)(*given, d_out, d_log_sums)[2:]
        return sum(jnp.vdot(g, a.astype(g.dtype)) for g, a in zip(gradients, flat(along), strict=True))

    program = quick(jax.grad(product))
    got = flat(program(tuple(given)))
    q, k, v, extras = given
    spoilt_k, spoilt_v = k.copy(), v.copy()  # where nobody may see it: in neither case more than 9 keys of example 0
    spoilt_k[0, :, 10:, 2], spoilt_v[0, 1, 9:] = np.nan, np.inf
    for a, b in zip(flat(program((q, spoilt_k, spoilt_v, extras))), got, strict=True):
        np.testing.assert_array_equal(a, b)
    step = 1e-5

    def slopes(sign: float) -> list[np.ndarray]:
        moved = jax.tree.map(lambda a, d: np.asarray(a, np.float64) + sign * step * d, tuple(given), along)
        return loops(case, *moved, d_out, d_log_sums)[2:]

    expected = [(a - b) / (2 * step) for a, b in zip(slopes(1), slopes(-1), strict=True)]
    return assert_close(got, expected, BOUNDS[case.dtype])


# The matrix ---------------------------------------------------------------------------------------------------------


class Feature(NamedTuple):
    """One row: what is checked, and whether the choice of a path depends on it."""

    case: Case
    check: Callable[[Path, Case], str] = against_loops
    chosen: bool = True


SECOND = [name for name in CASES if name.startswith("gradients of gradients")]
SPECIAL = {
    "a query with nothing to attend to": nothing_to_attend_to,
    "NaN, Inf in masked keys, values": hidden_keys,
    "NaN, Inf in a visible key, value, query": visible_keys,
    "capture of weights, logits": looking,
    "score that sets a whole row to -1e9": a_row_that_is_the_same,
    "mask as an argument of `jit`": mask_as_argument,
    "`vmap` over score tables": lifted,
    "`vmap` over gates": lifted,
    "forward mode: `jvp`, `hessian`": forward_mode,
} | dict.fromkeys(SECOND, gradients_of_gradients)
UNCHOSEN = {"`vmap` over gates", "scale of every head and its gradient", "forward mode: `jvp`, `hessian`", *SECOND}
FEATURES = {name: Feature(case, SPECIAL.get(name, against_loops), name not in UNCHOSEN) for name, case in CASES.items()}
COMPUTED = ("dense", "blockwise, several tiles", "blockwise, all heads at once")
ELSEWHERE = {"cudnn": "gpu", "splash": "tpu"}  # the platforms of the paths that do not run here
# The only refusals among the paths that are computed here, by kernel.
ONLY_DENSE = {"forward mode: `jvp`, `hessian`", "`cached=True`"}
REFUSED = {"dense": set(), "blockwise": ONLY_DENSE}
RING = {  # rows that the test of the ring shows, and which of its cases does
    "nothing but q, k, v": "no mask, blockwise parts",
    "causal, T = S": "causal",
    "causal, T ≠ S": "causal",
    "segments": "causal, segments, lengths",
    "lengths, one of them 0": "causal, segments, lengths",
    "positions by example": "striped",
    "score: ALiBi": "causal",
    "score of your own, gradient of what it closes over": "causal",
    "a query with nothing to attend to": "causal, segments, lengths",
    "NaN, Inf in masked keys, values": "NaN",
    "NaN, Inf in a visible key, value, query": "NaN",
    "log-sum-exp and its gradient": "causal",
}


@cache
def computed(name: str, path: str) -> str:
    """The cell of a path that runs here; fails if a number is out of its bound."""
    feature, taken = FEATURES[name], paths(name)[path]
    if name not in REFUSED[taken.kernel]:
        return feature.check(taken, feature.case)
    try:
        feature.check(taken, feature.case)
    except (ValueError, TypeError) as error:
        return refusal(error)
    raise AssertionError(f"{name} is not refused by {path} any more: take it out of REFUSED")


def refusal(error: Exception) -> str:
    """What an error says first, without the name of the function that is asked."""
    text = re.sub(r"kernels: kernel='\w+' cannot do this: ", "", str(error))
    return "refused: " + re.split(r"[;\n]|\. |\.$| for function ", text)[0].replace("|", r"\|")


def of_platform(name: str, platform: str, kernel: str) -> str:
    """What `kernels.explain` says of a platform's path: half precision, H = 64 and T = S unless the row says others."""
    case = FEATURES[name].case
    if not FEATURES[name].chosen:
        return "–"
    b, n, k, t, s, _, _ = case.sizes
    s = s if "T ≠ S" in name else t
    dtype = jnp.bfloat16 if case.dtype == "float32" else case.dtype
    leading = (b,) if case.leading is None else case.leading
    shapes = (n, t, 64), (k, s, 64), (k, s, 128 if "Hv" in name else 64)
    heads = [jax.ShapeDtypeStruct((*leading, *shape), dtype) for shape in shapes]
    options = case.options(case.extras)
    options |= {"dropout_rate": case.dropped.get("dropout_rate", 0.0)}
    try:
        with in_bits(case):
            kernels.explain(*heads, platform=platform, kernel=kernel, **options)
    except ValueError as error:
        return refusal(error)
    return "allowed"


def on_ring(name: str) -> str:
    if name in RING:
        return f"≤ {BOUNDS['float32']}"
    case = FEATURES[name].case
    options = case.options(case.extras) | case.dropped
    missing = [option for option in options if option not in inspect.signature(ring.attend).parameters]
    return f"refused: no argument `{missing[0]}`" if missing else "–"


HEAD = """# Which path can do what, and how exactly

Made by `MHAJAX_WRITE=1 python -m pytest -m "" tests/test_kernels.py`, which computes every cell of the first three
columns; without the variable it fails if a cell is not what this page says.

- `≤ 2e-6`: heads, log-sum-exp and the gradients of q, k, v and of whatever else has one (bias, tables, sinks, gates)
  differ from loops in float64 by no more, relative to the largest number of each array. By dtype:
  {bounds}.
- exact: equal bit for bit to what it must be. Values without a gradient are held to it in `tests/test_whole_rows.py`.
- refused: what the error says; it also names a path that can.
- splash, cuDNN: what `kernels.explain` says on their platforms for bfloat16, H = 64 and T = S. What is allowed is
  computed in `tests/test_kernels_platforms.py`: splash interpreted, cuDNN's arguments by JAX's own implementation of
  that function.
- ring: from `tests/test_kernels_devices.py`, on eight devices; "–" is what it does not show, or what the choice does
  not depend on.

Sizes B = 2, N = 4, K = 2, T = 13, S = 17, H = 5, Hv = 3 unless the row says others; tiles of 4 to 7 queries by 6 or 17
keys, so that there are several of them and the last are partial.

"""


def table(computed: Callable[[str, str], str] = computed) -> str:
    """docs/parity.md, with these cells of the paths that run here."""
    elsewhere = [name for name in PATHS if not any(path.partition(",")[0] == name for path in COMPUTED)]
    columns = [*COMPUTED, *(f"{name} ({ELSEWHERE[name].upper()})" for name in elsewhere), "ring"]
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name in FEATURES:
        cells = [computed(name, path) for path in COMPUTED]
        cells += [*(of_platform(name, ELSEWHERE[path], path) for path in elsewhere), on_ring(name)]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    bounds = ", ".join(f"{dtype} {bound}" for dtype, bound in BOUNDS.items())
    return HEAD.format(bounds=bounds) + "\n".join(lines) + "\n"
