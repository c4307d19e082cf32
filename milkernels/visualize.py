"""Attention on the host: arrays per bag, and heatmaps of whole slides.

NumPy, and matplotlib for `heatmap`, are imported when a function is called: ``pip install milkernels[viz]``.

>>> import torch
>>> from milkernels import Bags, nn, visualize
>>> corners = [256 * torch.cartesian_prod(torch.arange(8), torch.arange(rows)) for rows in (6, 9)]  # x, y of each patch
>>> bags = Bags.from_list([torch.randn(len(c), 64) for c in corners], extras={"coords": corners})
>>> pooled = nn.AttentionPool(64)(bags)
>>> first, second = visualize.attention_arrays(pooled, bags)
>>> figure = visualize.heatmap(second.coords, second.weights[:, 0], title="slide 2")
"""

import os
from typing import Any, NamedTuple

import torch
from torch import Tensor

from milkernels.arguments import check_choice, check_dense, check_number, required
from milkernels.bags import Bags
from milkernels.ops.scores import attention_weights
from milkernels.results import DSMILPooled, LossAttentionPooled, Pooled

SCALES = {"linear": "attention weight", "log": "attention weight", "percentile": "attention percentile"}
INCHES = 8.0  # the longer side of a slide, with its labels


class BagAttention(NamedTuple):
    """The attention of one bag: NumPy arrays in float32, without masked instances.

    Attributes:
        scores: ``[n, K]``, before the softmax.
        weights: ``[n, K]``, which sum to 1 over the bag.
        coords: ``[n, 2]``, or None.
    """

    scores: Any
    weights: Any
    coords: Any


def attention_arrays(
    pooled: Pooled | DSMILPooled | LossAttentionPooled,
    bags_or_offsets: Bags | Tensor | None = None,
    *,
    coords: Any = None,
) -> list[BagAttention]:
    """Scores, weights and coordinates of each bag, copied to the host.

    Args:
        pooled: what a pooling op or module returned; of a model's prediction its ``pooled``.
        bags_or_offsets: what it pooled: Bags, offsets ``[B + 1]``, or None for one bag.
        coords: ``[N, 2]``, a tensor or array, one row per row of the pooled batch.  None takes the ``"coords"`` among
            the extras of the Bags, if they are there.

    An instance that is masked, or whose scores are -inf in every head, is left out.  Float32 holds whole coordinates
    up to 2^24 exactly.

    Raises:
        ImportError: no NumPy.
        TypeError, ValueError: arguments of another type, or whose shapes do not fit together.
    """
    np = _require("numpy")
    bags = bags_or_offsets if isinstance(bags_or_offsets, Bags) else None
    offsets = bags_or_offsets if bags is None else bags.offsets
    if offsets is not None and not isinstance(offsets, Tensor):
        raise TypeError(f"bags_or_offsets must be Bags, a tensor or None; got {type(offsets).__name__}")
    weights = _array("weights", attention_weights(pooled, offsets)).astype(np.float32)
    scores = _array("scores", pooled.scores).astype(np.float32)
    if coords is None and bags is not None:
        coords = bags.extras.get("coords")
    if coords is not None:
        coords = _array("coords", coords).astype(np.float32)
        _check_shape("coords", coords, (len(scores), 2))
    kept = (scores != -np.inf).any(axis=1)
    if bags is not None and bags.mask is not None:
        kept &= _array("mask", bags.mask) != 0
    bounds = [0, len(scores)] if offsets is None else offsets.tolist()
    rows = [start + kept[start:end].nonzero()[0] for start, end in zip(bounds[:-1], bounds[1:], strict=True)]
    return [BagAttention(scores[i], weights[i], None if coords is None else coords[i]) for i in rows]


def heatmap(
    coords: Any,
    weights: Any,
    path: str | os.PathLike[str] | None = None,
    *,
    patch_size: float | None = None,
    scale: str = "percentile",
    cmap: str = "inferno",
    title: str | None = None,
    label: str | None = None,
    dpi: int = 150,
) -> Any:
    """Draws each patch of a slide as a square in the colour of its weight: x to the right, y down, equal scales.

    Args:
        coords: ``[n, 2]``, x and y of each patch's upper left corner at level 0; a tensor or array.
        weights: ``[n]``, finite: one head's weights, or scores.
        path: a file to write, PNG unless its ending says otherwise.
        patch_size: the side of a square, in units of the coordinates.  None takes the distance that is most frequent
            between neighbours in a row or column of patches: the smallest one, but for chance pairs.
        scale: of the colours.  Weights are very skewed, so "percentile", as in CLAM: the share of patches, in percent,
            with no larger weight, ties at their mean rank.  Or "linear", or "log" (weights above 0; 0 is as the
            smallest of them).
        cmap: a colour map of matplotlib.
        title, label: of the figure, of the colour bar.
        dpi: pixels per inch; the longer side of a slide has about 8 inches.

    Returns:
        The ``matplotlib.figure.Figure``.  It belongs to no window and no global state.

    Where patches overlap, or share a pixel, the largest weight shows.

    Raises:
        ImportError: no NumPy or matplotlib.
        TypeError, ValueError: arguments of another type or shape, no patch, a number that is not finite, a patch size
            or dpi that is not above 0, an unknown scale or colour map, no weight above 0 for "log".
    """
    np = _require("numpy")
    figures, agg = _require("matplotlib.figure"), _require("matplotlib.backends.backend_agg")
    coords, weights = _checked_patches(coords, weights)
    check_choice("scale", scale, SCALES)
    check_choice("cmap", cmap, _require("matplotlib").colormaps)
    for name, number in (("patch_size", 1 if patch_size is None else patch_size), ("dpi", dpi)):
        check_number(name, number)
        if number <= 0:
            raise ValueError(f"{name} must be positive and finite; got {number}")
    if path is not None and not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path must be a path; got {type(path).__name__}")
    size = _spacing(coords) if patch_size is None else float(patch_size)
    order = np.argsort(weights, kind="stable")  # what is drawn last stays on top
    coords, weights = coords[order], weights[order]
    low, high = coords.min(axis=0), coords.max(axis=0) + size
    width, height = INCHES * np.maximum((high - low) / (high - low).max(), 0.25)
    figure = figures.Figure(figsize=(width + 1.6, height + 1.0), dpi=dpi, layout="compressed")
    agg.FigureCanvasAgg(figure)
    axes = figure.add_subplot(facecolor="0.92")
    colours, norm = _colours(weights, scale)
    drawn = _draw(axes, coords, size, int(0.75 * INCHES * dpi) + 1, colours, norm, cmap)
    axes.set(xlim=(low[0], high[0]), ylim=(high[1], low[1]), aspect="equal", xlabel="x", ylabel="y", title=title)
    axes.ticklabel_format(style="plain", useOffset=False)
    axes.locator_params(nbins=6)
    figure.colorbar(drawn, ax=axes, label=SCALES[scale] if label is None else label)
    if path is not None:
        figure.savefig(path, format=os.path.splitext(path)[1][1:] or "png", dpi=dpi)
    return figure


def _require(name: str):
    return required(name, "milkernels.visualize", "milkernels[viz]")


def _array(name: str, values: Any):
    """A NumPy array of numbers in float64, in which coordinates and weights of any type keep their value."""
    np = _require("numpy")
    try:
        if isinstance(values, Tensor):
            check_dense(name, values)
            values = values.detach().to("cpu", torch.promote_types(values.dtype, torch.float64)).numpy()
        if np.iscomplexobj(values):
            raise TypeError("complex numbers")
        return np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError, RuntimeError) as error:  # among them all that PyTorch raises
        raise TypeError(f"{name} must be a tensor or array of numbers; got {type(values).__name__}") from error


def _check_shape(name: str, array, shape: tuple[int, ...]) -> None:
    if array.shape != shape:
        raise ValueError(f"{name} must be {list(shape)}; got shape {array.shape}")


def _checked_patches(coords, weights):
    np = _require("numpy")
    coords, weights = _array("coords", coords), _array("weights", weights)
    if weights.ndim != 1:
        head = "weights[0]" if weights.shape[1:] == coords.shape[:1] else "weights[:, 0]"
        raise ValueError(f"weights must be [n], those of one head, as {head}; got shape {weights.shape}")
    if len(weights) == 0:
        raise ValueError("a heatmap needs at least one patch; got weights of shape (0,)")
    _check_shape("coords", coords, (len(weights), 2))
    for name, array in (("coords", coords), ("weights", weights)):
        wrong = ~np.isfinite(array)
        if wrong.any():
            raise ValueError(f"{name} must be finite; got {array[wrong][0]} for patch {np.argwhere(wrong)[0, 0]}")
    return coords, weights


def _spacing(coords) -> float:
    """The distance of patches.  Tissue regions are cut into grids of their own, so a row may have patches of two
    regions next to each other at any distance: the most frequent one counts, not the smallest."""
    np = _require("numpy")
    steps = []
    for across, along in ((0, 1), (1, 0)):
        line, place = coords[np.lexsort((coords[:, along], coords[:, across]))][:, (across, along)].T
        steps.append(np.diff(place)[np.diff(line) == 0])
    if not any((step > 0).any() for step in steps):  # no two in a row or column
        steps = [np.diff(np.sort(axis)) for axis in coords.T]
    steps, counts = np.unique(np.concatenate(steps), return_counts=True)
    steps, counts = steps[steps > 0], counts[steps > 0]
    return float(steps[counts.argmax()]) if len(steps) else 1.0  # one patch fills the figure


def _colours(weights, scale: str):
    """What is drawn of ascending weights, and the norm that maps it to colours."""
    np, colours = _require("numpy"), _require("matplotlib.colors")
    if scale == "percentile":
        _, group, counts = np.unique(weights, return_inverse=True, return_counts=True)
        mean_rank = np.cumsum(counts) - (counts - 1) / 2
        return 100 * mean_rank[group] / len(weights), colours.Normalize(0, 100)
    if scale == "linear":
        return weights, colours.Normalize(weights[0], weights[-1])
    if weights[0] < 0 or weights[-1] == 0:
        got = weights[0] if weights[0] < 0 else "only 0"
        raise ValueError(f"scale='log' needs weights from 0 on, and one above; got {got}")
    weights = weights.clip(min=weights[weights > 0][0])
    return weights, colours.LogNorm(weights[0], weights[-1])


def _draw(axes, coords, size: float, max_pixels: int, colours, norm, cmap: str):
    """Squares: as the pixels of an image where they lie on a grid, which is fast, otherwise as polygons."""
    np = _require("numpy")
    low = coords.min(axis=0)
    cells = (coords - low) / size
    if (np.abs(cells - cells.round()) < 1e-3).all():
        cells = cells.round().astype(np.int64)
        fold = int(cells.max()) // max_pixels + 1  # cells to one of the image's, so that drawing skips none
        cells //= fold
        image = np.full(cells.max(axis=0)[::-1] + 1, np.nan)
        image[cells[:, 1], cells[:, 0]] = colours
        right, bottom = low + np.array(image.shape[::-1]) * size * fold
        extent = (low[0], right, bottom, low[1])
        return axes.imshow(image, norm=norm, cmap=cmap, extent=extent, interpolation="nearest")
    collections = _require("matplotlib.collections")
    corners = size * np.array([(0, 0), (1, 0), (1, 1), (0, 1)])
    squares = collections.PolyCollection(
        coords[:, None] + corners, array=colours, norm=norm, cmap=cmap, edgecolors="face", linewidths=0.2
    )
    return axes.add_collection(squares, autolim=False)
