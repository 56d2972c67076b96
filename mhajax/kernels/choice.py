"""Which path computes an attention: the table of paths, and a pure function of what is asked for."""

from __future__ import annotations

from typing import Any

import jax

from mhajax.arguments import kind_of
from mhajax.kernels import blockwise, dense, rules
from mhajax.kernels.contract import PATCHED, Choice, Inputs, Path, Plan, Request
from mhajax.kernels.external import cudnn, splash

# From the definition to the most special one; "auto" takes the last that neither refuses nor is reluctant.
PATHS: dict[str, Path] = {"dense": dense, "blockwise": blockwise, "cudnn": cudnn, "splash": splash}


def choose(request: Request, kernel: str | Path = "auto") -> Choice:
    """The path for a request.

    Args:
      request: what is asked for.
      kernel: "auto", the name of a path, or a path.

    Raises:
      ValueError: for a name that does not exist, or a path that cannot do what is asked; it says which can.
      TypeError: for what is neither a name nor a path.
    """
    reasons = {name: _refusal(path, request) or path.reluctance(request) for name, path in PATHS.items()}
    able = [name for name, reason in reasons.items() if not reason]
    name, path = _named(kernel, able)
    if refused := _refusal(path, request):
        raise ValueError(
            f"kernels: kernel={name!r} cannot do this: {refused}; use kernel='auto' or one of {', '.join(able)}."
        )
    plan: Plan = getattr(path, "plan", lambda _: Plan())(request)
    why = plan.why if kernel == "auto" else ", though ".join(filter(None, ["asked for", path.reluctance(request)]))
    others = {other: reasons[other] or "not needed" for other in PATHS if PATHS[other] is not path}
    return Choice(name, path, why, others, plan.tiling, plan.values_at_once, plan.visited)


def request_for(inputs: Inputs, platform: str | None = None, log_sum_exp: bool = False) -> Request:
    """What these inputs ask for; shapes and dtypes will do for q, k and v, and anything for what is there or not."""
    return Request(
        jax.default_backend() if platform is None else platform,
        inputs.q, inputs.k, inputs.v, inputs.mask, inputs.queries, inputs.keys,
        inputs.bias is not None, inputs.score is not None, bool(inputs.dropout_rate),
        log_sum_exp, inputs.cached, spread(), rules.current(), inputs.patched,
    )  # fmt: skip


def spread() -> bool:
    """Whether what is traced now may be partitioned by the compiler: there are devices, and no `shard_map` around."""
    mesh = jax.sharding.get_abstract_mesh()
    return jax.device_count() > 1 and not (mesh.axis_names and mesh.are_all_axes_manual)


def _refusal(path: Path, request: Request) -> str:
    """Why a path cannot do this. Of patches only those know that hold every logit, so no other has to speak of them."""
    return PATCHED if request.patched and not hasattr(path, "capture") else path.refusal(request)


def _named(kernel: Any, able: list[str]) -> tuple[str, Path]:
    """The path that is asked for, and its name."""
    if isinstance(kernel, str):
        if kernel not in ("auto", *PATHS):
            raise ValueError(f"kernels: kernel must be auto or one of {', '.join(PATHS)}, got {kernel!r}.")
        name = able[-1] if kernel == "auto" else kernel
        return name, PATHS[name]
    missing = [name for name in ("refusal", "reluctance", "attend") if not callable(getattr(kernel, name, None))]
    if missing:
        raise TypeError(
            f"kernels: kernel must be auto, one of {', '.join(PATHS)}, or an object that has "
            f"refusal(request), reluctance(request) and attend(inputs); got {kind_of(kernel)} without "
            f"{', '.join(missing)}."
        )
    return getattr(kernel, "__name__", type(kernel).__qualname__), kernel
