"""Heads as places on a map: near each other if they do nearly the same."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from mhajax.figures import inputs, page
from mhajax.figures.drawing import Drawing


def head_map(distances: ArrayLike, num_layers: int, *, title: str) -> Drawing:
    """Draws all heads in two dimensions, as far apart as a matrix of distances says (classical scaling).

    With J = I - 11ᵀ/M, the Gram matrix B = -J D² J / 2 has eigenvalues λ; the coordinates are the first two
    eigenvectors times √λ. The share of the variance that the picture shows is (λ₁ + λ₂) / Σ|λ|; negative eigenvalues,
    which distances that are not Euclidean have, count as not shown. Each head is named "layer·head" where there is
    room; the colour is the layer.

    Args:
      distances: [M, M] of the M = L·N heads, symmetric, 0 on the diagonal; head n of layer l is at l·N + n.
      num_layers: L.
      title: above the map.

    Returns:
      A Drawing; the table has one row a head: layer, head, x, y.

    Raises:
      ValueError: distances are not square, symmetric, finite, at least 0 and 0 on the diagonal, or L does not divide M.

    References:
      Mardia, Kent & Bibby 1979, "Multivariate Analysis", sections 14.2 and 14.4.
      Clark et al. 2019, "What Does BERT Look At?", section 6: heads of BERT drawn by Jensen-Shannon distances.
    """
    who = "figures.head_map"
    matrix, num_heads = inputs.between_heads(who, "distances", distances, num_layers)
    close = 1e-4 * max(float(np.abs(matrix).max()), 1e-30)
    if matrix.min() < -close or np.abs(np.diag(matrix)).max() > close or np.abs(matrix - matrix.T).max() > close:
        raise ValueError(
            f"{who}: distances must be symmetric, at least 0, and 0 on the diagonal; got a least of "
            f"{matrix.min():.4g}, a diagonal up to {np.abs(np.diag(matrix)).max():.4g}, "
            f"and {np.abs(matrix - matrix.T).max():.4g} between d and its transpose; "
            "a similarity s becomes a distance by 1 - s."
        )
    places, shares = _classical_scaling(matrix.astype(np.float64))
    layers = np.repeat(np.arange(num_layers), num_heads)
    names = [f"{layer}·{head}" for layer, head in np.ndindex(num_layers, num_heads)]

    with page.style():
        import matplotlib

        left, bottom, inner, head = 0.75, 0.55, 6.2, 0.72
        span = np.ptp(places, axis=0)
        longest = max(float(span.max()), 1e-12)
        margin = 0.35  # inches around the dots, for names
        tall = float(np.clip((inner - 2 * margin) * span[1] / longest + 2 * margin, 2.2, inner))
        # One scale for both dimensions: inches for one unit of distance.
        scale = min((inner - 2 * margin) / longest, (tall - 2 * margin) / max(float(span[1]), 1e-12))
        center = (places.max(0) + places.min(0)) / 2
        inches = (places - center) * scale + [inner / 2, tall / 2]  # [M, 2]
        width = left + max(inner + 0.95, page.head_width(title))
        height = head + tall + bottom
        palette = matplotlib.colormaps["viridis"](np.linspace(0, 0.88, max(num_layers, 2)))[:num_layers]
        shown = _place_names(inches, names, inner, tall)
        note = f"{100 * shares.sum():.0f} % of the variance · colour: layer · name: layer·head"
        if len(shown) < len(names):
            note += f" ({len(names) - len(shown)} of {len(names)} names left out for want of room)"
        width = max(width, left + page.head_width("", note))
        figure = page.figure(width, height, title, left, note)
        axes = page.axes(figure, left, bottom, inner, tall)
        axes.scatter(*inches.T, s=22, color=palette[layers], linewidths=0)
        for index, place in shown.items():
            axes.text(*place, names[index], fontsize=7, color=page.INK, ha="center", va="center")
        axes.set_xlim(0, inner)
        axes.set_ylim(0, tall)
        page.plain(axes, grid=None)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_xlabel(f"first dimension, {100 * shares[0]:.0f} %", color=page.INK)
        axes.set_ylabel(f"second, {100 * shares[1]:.0f} %", color=page.INK)
        _layer_key(figure, palette, left + inner + 0.2, height - head)
    header = ("layer", "head", "x", "y")
    rows = [(m // num_heads, m % num_heads, *map(inputs.number, place)) for m, place in enumerate(places)]
    return Drawing(figure, (header, rows))


def _classical_scaling(distances: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates [M, 2] and the shares [2] of the variance; the largest coordinate of a dimension is positive."""
    count = len(distances)
    centre = np.eye(count) - 1 / count
    values, vectors = np.linalg.eigh(-0.5 * centre @ (0.5 * (distances + distances.T)) ** 2 @ centre)
    whole = np.abs(values).sum()
    places, shares = np.zeros((count, 2)), np.zeros(2)
    for dimension in range(min(2, count)):
        value, vector = max(values[-1 - dimension], 0.0), vectors[:, -1 - dimension]
        places[:, dimension] = np.sqrt(value) * vector * np.sign(vector[np.abs(vector).argmax()])
        shares[dimension] = value / whole if whole else 0.0
    return places, shares


def _place_names(inches: np.ndarray, names: list[str], across: float, down: float) -> dict[int, tuple[float, float]]:
    """Where names find room beside their dots, covering neither a dot nor another name: index -> centre."""
    high, dot = 0.10, 0.035
    wide = {length: page.width(["0" * length], 7) for length in {len(name) for name in names}}
    boxes: list[tuple[float, float, float, float]] = []
    found = {}
    for index, name in enumerate(names):
        half = wide[len(name)] / 2, high / 2
        for sideways, up in ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1)):
            push = 0.75 if sideways and up else 1.0
            x = inches[index, 0] + sideways * push * (half[0] + dot + 0.03)
            y = inches[index, 1] + up * push * (half[1] + dot + 0.03)
            box = x - half[0], x + half[0], y - half[1], y + half[1]
            dots = (np.abs(inches[:, 0] - x) < half[0] + dot) & (np.abs(inches[:, 1] - y) < half[1] + dot)
            if dots.any() or box[0] < 0.02 or box[1] > across or box[2] < 0.02 or box[3] > down:
                continue
            if not any(box[0] < b[1] and b[0] < box[1] and box[2] < b[3] and b[2] < box[3] for b in boxes):
                boxes.append(box)
                found[index] = x, y
                break
    return found


def _layer_key(figure, palette: np.ndarray, x: float, top: float) -> None:
    """The colours of the layers, one under the other."""
    pitch = 0.17
    height = pitch * len(palette)
    axes = page.axes(figure, x, top - height, 0.7, height)
    axes.set_xlim(0, 0.7)
    axes.set_ylim(len(palette) - 0.5, -0.5)
    axes.axis("off")
    for layer, color in enumerate(palette):
        axes.plot([0.06], [layer], "o", color=color, markersize=5, mew=0)
        axes.text(0.15, layer, f"layer {layer}", fontsize=8, color=page.INK, va="center")
