"""Parameters as NamedTuples (what the functions take) and as nested dicts (what Flax and files hold)."""

from __future__ import annotations

from typing import Any


def to_dict(params: Any) -> Any:
    """Nested NamedTuples as nested dicts; fields that are None are left out."""
    if not hasattr(params, "_asdict"):
        return params
    return {name: to_dict(value) for name, value in params._asdict().items() if value is not None}


def from_dict(tree: Any, template: Any, path: str = "params") -> Any:
    """Nested dicts as the NamedTuples of a template (whose leaves may be anything; only its structure counts).

    Raises:
      ValueError: if a name is missing or unknown, with its path.
    """
    if not hasattr(template, "_asdict"):
        return tree
    fields = {name: value for name, value in template._asdict().items() if value is not None}
    if set(fields) != set(tree):
        raise ValueError(
            f"tree.from_dict: {path} must hold {sorted(fields)}, got {sorted(tree)}; "
            "the parameters belong to another config."
        )
    values = {name: from_dict(tree[name], value, f"{path}.{name}") for name, value in fields.items()}
    return type(template)(**{name: values.get(name) for name in template._fields})
