"""Attention as arrays, and heatmaps checked pixel by pixel."""

import doctest
import subprocess
import sys
import time

import pytest
import torch

pytest.importorskip("numpy")
pytest.importorskip("matplotlib")

import matplotlib.image
import numpy as np

import milkernels
from milkernels import Bags, nn, visualize
from milkernels.visualize import attention_arrays, heatmap

LENGTHS = (4, 0, 1, 7)
N, L, K = sum(LENGTHS), 6, 2
PNG = b"\x89PNG\r\n\x1a\n"


def make_bags(mask=None, coords=True):
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(n, L, generator=generator) for n in LENGTHS]
    extras = {"coords": [torch.randint(10**6, (n, 2), generator=generator) for n in LENGTHS]} if coords else None
    bags = Bags.from_list(parts, extras=extras)
    bags.mask = mask
    return bags


def pool(bags):
    torch.manual_seed(0)
    return nn.AttentionPool(L, 5, K)(bags)


# Arrays


def test_arrays_of_bags():
    bags = make_bags()
    pooled = pool(bags)
    weights = milkernels.attention_weights(pooled, bags.offsets).detach()
    made = attention_arrays(pooled, bags)
    assert len(made) == len(LENGTHS)
    for b, (arrays, n) in enumerate(zip(made, LENGTHS, strict=True)):
        rows = slice(sum(LENGTHS[:b]), sum(LENGTHS[: b + 1]))
        expected = (pooled.scores.detach()[rows], weights[rows], bags.extras["coords"][rows])
        for array, values in zip(arrays, expected, strict=True):
            assert isinstance(array, np.ndarray) and array.dtype == np.float32
            np.testing.assert_array_equal(array, values.numpy())
        assert arrays.weights.shape == (n, K)
        np.testing.assert_allclose(arrays.weights.sum(axis=0), 1 if n else 0, rtol=1e-5)


def test_arrays_of_offsets_and_of_one_bag():
    bags = make_bags()
    pooled = pool(bags)
    expected = attention_arrays(pooled, bags)
    for coords in (bags.extras["coords"], bags.extras["coords"].numpy(), bags.extras["coords"].tolist()):
        for arrays, other in zip(attention_arrays(pooled, bags.offsets, coords=coords), expected, strict=True):
            for a, b in zip(arrays, other, strict=True):
                np.testing.assert_array_equal(a, b)
    assert all(arrays.coords is None for arrays in attention_arrays(pooled, bags.offsets))
    assert all(arrays.coords is None for arrays in attention_arrays(pooled, make_bags(coords=False)))
    (one,) = attention_arrays(pool(bags.values))
    assert one.weights.shape == (N, K) and one.coords is None


def test_given_coords_come_before_those_of_the_bags():
    bags = make_bags()
    coords = torch.arange(2 * N).view(N, 2)
    made = attention_arrays(pool(bags), bags, coords=coords)
    np.testing.assert_array_equal(np.concatenate([arrays.coords for arrays in made]), coords)


def test_masked_rows_are_dropped():
    mask = torch.arange(N) % 3 > 0
    bags = make_bags(mask)
    pooled = pool(bags)
    compact = bags.compact()
    expected = attention_arrays(pool(compact), compact)
    for made in (attention_arrays(pooled, bags), attention_arrays(pooled, bags.offsets, coords=bags.extras["coords"])):
        for arrays, other in zip(made, expected, strict=True):
            np.testing.assert_array_equal(arrays.coords, other.coords)
            np.testing.assert_allclose(arrays.scores, other.scores, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(arrays.weights, other.weights, rtol=1e-5)
    unmasked = attention_arrays(pool(make_bags()), bags)  # a mask that the pooling did not see
    assert [len(arrays.scores) for arrays in unmasked] == [len(arrays.scores) for arrays in expected]


def test_a_padded_batch():
    bags = make_bags()
    padded, mask = bags.to_padded(float("nan"))
    coords = torch.full((*mask.shape, 2), -1)
    coords[mask] = bags.extras["coords"]
    made = Bags.from_padded(padded, mask, extras={"coords": coords})
    for arrays, other in zip(attention_arrays(pool(made), made), attention_arrays(pool(bags), bags), strict=True):
        np.testing.assert_array_equal(arrays.coords, other.coords)
        np.testing.assert_allclose(arrays.weights, other.weights, rtol=1e-5)


def test_a_row_that_counts_for_one_head_stays():
    scores = torch.tensor([[0.0, -torch.inf], [-torch.inf, -torch.inf], [1.0, 0.0]])
    (arrays,) = attention_arrays(milkernels.softmax_pool(torch.ones(3, 2), scores))
    assert arrays.scores.tolist() == [[0.0, -np.inf], [1.0, 0.0]] and arrays.weights[:, 1].tolist() == [0.0, 1.0]


@pytest.mark.parametrize("module", [nn.DSMIL(L, 3), nn.LossAttention(L, 3)])
def test_arrays_of_other_poolings(module):
    bags = make_bags()
    pooled = module(bags)
    weights = np.concatenate([arrays.weights for arrays in attention_arrays(pooled, bags)])
    np.testing.assert_array_equal(weights, milkernels.attention_weights(pooled, bags.offsets).detach())


def test_bad_arguments_of_arrays():
    bags = make_bags()
    pooled = pool(bags)
    for args, coords, error, match in [
        ((pooled.scores,), None, TypeError, "pooled must be what a pooling op returned; got Tensor"),
        ((pooled, "bags"), None, TypeError, "bags_or_offsets must be Bags, a tensor or None; got str"),
        ((pooled, bags.offsets[:-1]), None, ValueError, "offsets must end at the number of instances, 12; got 5"),
        ((pooled,), None, ValueError, "offsets of the call must be given where pooled is of 4 bags; got None"),
        ((pooled, bags), torch.zeros(N, 3), ValueError, r"coords must be \[12, 2\]; got shape \(12, 3\)"),
        ((pooled, bags), torch.zeros(1, 2), ValueError, r"coords must be \[12, 2\]; got shape \(1, 2\)"),
        ((pooled, bags), "xy", TypeError, "coords must be a tensor or array of numbers; got str"),
    ]:
        with pytest.raises(error, match=match):
            attention_arrays(*args, coords=coords)


# Heatmaps


def grid(columns, rows, step=256, start=(0, 0)):
    return np.stack(np.meshgrid(np.arange(columns), np.arange(rows)), -1).reshape(-1, 2) * step + np.array(start)


def colours_at(figure, points):
    """The RGB at points of the slide, from the pixels that are drawn."""
    pixels = drawn(figure)
    x, y = figure.axes[0].transData.transform(np.asarray(points, dtype=float)).T
    return pixels[(len(pixels) - y).astype(int), x.astype(int)]


def drawn(figure):
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3] / 255


def pixels_inside(figure, pixels):
    """The RGB of all pixels inside of the frame, and the frame."""
    frame = figure.axes[0].get_window_extent()
    top, bottom = (int(len(pixels) - y) for y in (frame.y1, frame.y0))
    return pixels[top + 3 : bottom - 3, int(frame.x0) + 3 : int(frame.x1) - 3], frame


def assert_colours(figure, points, shares, cmap="inferno"):
    expected = matplotlib.colormaps[cmap](np.asarray(shares, dtype=float))[:, :3]
    np.testing.assert_allclose(colours_at(figure, points), expected, atol=1.5 / 255)  # 8 bits: rounded once


IRREGULAR = np.array([[0, 0], [300, 10], [640, 20], [15, 310], [330, 305], [900, 900]])


@pytest.mark.parametrize("coords", [grid(5, 4), grid(5, 4, 0.5, (3, 7)), IRREGULAR], ids=["grid", "halves", "polygons"])
@pytest.mark.parametrize("scale", ["linear", "log", "percentile"])
def test_every_patch_has_its_colour_where_it_is(coords, scale):
    size = {5 * 4: coords[1, 0] - coords[0, 0], 6: 250}[len(coords)]
    weights = np.random.default_rng(0).permutation(10.0 ** -np.arange(len(coords)))
    shares = {
        "linear": (weights - weights.min()) / np.ptp(weights),
        "log": np.log(weights / weights.min()) / np.log(np.ptp(weights) / weights.min()),
        "percentile": (weights[:, None] >= weights).mean(axis=1),
    }[scale]
    figure = heatmap(coords, weights, scale=scale, patch_size=None if size != 250 else size)
    inside = [(0.5, 0.5), (0.06, 0.06), (0.94, 0.06), (0.06, 0.94), (0.94, 0.94)]  # the middle, and near each corner
    assert_colours(figure, np.concatenate([coords + np.array(place) * size for place in inside]), np.tile(shares, 5))


def test_a_hot_patch_shows_in_the_file(tmp_path):
    path = tmp_path / "slide.png"
    coords, weights = grid(20, 10), np.full(200, 0.001)
    weights[3 * 20 + 15] = 0.801  # column 15, row 3
    figure = heatmap(coords, torch.tensor(weights), path, scale="linear", cmap="gray", title="slide")
    assert path.read_bytes().startswith(PNG)
    inside, frame = pixels_inside(figure, matplotlib.image.imread(path)[..., :3])
    rows, columns = (inside.min(axis=2) > 0.9).nonzero()
    assert abs(columns.mean() / inside.shape[1] - 15.5 / 20) < 0.01  # x to the right
    assert abs(rows.mean() / inside.shape[0] - 3.5 / 10) < 0.01  # y down
    assert len(rows) == pytest.approx(inside.shape[0] * inside.shape[1] / 200, rel=0.1)
    assert frame.width / frame.height == pytest.approx(2, rel=0.01)  # equal scales


def test_where_there_is_no_patch_there_is_no_colour():
    coords = grid(4, 4)[np.arange(16) != 5]
    figure = heatmap(coords, np.arange(15), scale="linear")
    background = figure.axes[0].get_facecolor()[:3]
    np.testing.assert_allclose(colours_at(figure, [(1.5 * 256, 1.5 * 256)])[0], background, atol=1 / 255)
    assert_colours(figure, coords + 128, np.arange(15) / 14)


def test_a_patch_size_leaves_gaps_or_overlaps():
    coords, weights = grid(3, 1), np.array([0.0, 2.0, 1.0])
    figure = heatmap(coords, weights, scale="linear", patch_size=128)
    background = figure.axes[0].get_facecolor()[:3]
    np.testing.assert_allclose(colours_at(figure, [(192, 64)])[0], background, atol=1 / 255)
    figure = heatmap(coords, weights, scale="linear", patch_size=384)
    # The largest weight shows where patches overlap.
    assert_colours(figure, [(200, 200), (300, 200), (400, 200), (600, 200), (700, 200)], [0.0, 1.0, 1.0, 1.0, 0.5])


def test_the_largest_weight_shows_where_patches_coincide():
    coords, weights = np.concatenate([grid(3, 2)] * 2), np.zeros(12)
    weights[[1, 8]] = 1.0
    figure = heatmap(coords, weights, scale="linear")
    assert_colours(figure, grid(3, 2) + 128, [0.0, 1.0, 1.0, 0.0, 0.0, 0.0])


@pytest.mark.parametrize("columns", [239, 255, 320, 600])
def test_no_hot_patch_is_lost_between_pixels(columns):
    rows = columns // 3
    coords, place = grid(columns, rows), np.arange(columns * rows)
    for hot in range(columns // 2, columns // 2 + 8):
        weights = place == (hot - rows) * columns + hot
        figure = heatmap(coords, weights, scale="linear", cmap="gray", dpi=40, label="a label\nof two lines")
        inside, _ = pixels_inside(figure, drawn(figure))
        found = (inside.min(axis=2) > 0.8).nonzero()
        for pixels, size, expected in zip(found, inside.shape, ((hot - rows) / rows, hot / columns), strict=False):
            assert len(pixels) and abs(pixels.mean() / size - expected) < 0.03


@pytest.mark.parametrize(
    ("coords", "size"),
    [
        (grid(5, 4), 256),
        (grid(5, 4)[[0, 1, 7, 8, 19]], 256),
        (np.concatenate([grid(6, 6), grid(6, 6, start=(1280 + 37, 19))]), 256),  # a region with a grid of its own,
        (np.concatenate([grid(6, 6), grid(6, 6, start=(1280 + 37, 0))]), 256),  # also in the rows of the other
        (np.concatenate([grid(6, 6), grid(6, 6, start=(0, 1280 + 3))]), 256),
        (np.array([[0, 0], [512, 512], [1536, 1024]]), 512),  # none in a row or column
        (np.array([[5, 5], [5, 5]]), 1.0),
        (grid(7, 2, 0.25), 0.25),
    ],
)
def test_the_patch_size_is_found(coords, size):
    shuffled = np.random.default_rng(0).permutation(coords)
    figure = heatmap(shuffled, np.arange(len(coords)))
    x, y = figure.axes[0].get_xlim(), figure.axes[0].get_ylim()
    assert (x[1] - coords[:, 0].max(), y[0] - coords[:, 1].max()) == (size, size)
    assert (x[0], y[1]) == (coords[:, 0].min(), coords[:, 1].min())


@pytest.mark.parametrize("scale", ["linear", "log", "percentile"])
def test_one_patch_and_equal_weights(scale, tmp_path):
    for count in (1, 6):
        heatmap(grid(count, 1), np.full(count, 0.5), tmp_path / "equal.png", scale=scale)
    if scale == "percentile":
        figure = heatmap(grid(4, 1), np.array([1.0, 2.0, 2.0, 3.0]))
        assert_colours(figure, grid(4, 1) + 128, [0.25, 0.625, 0.625, 1.0])  # a tie has its mean rank


def test_log_takes_zeros_as_the_smallest_weight():
    figure = heatmap(grid(3, 1), np.array([0.0, 0.01, 1.0]), scale="log")
    assert_colours(figure, grid(3, 1) + 128, [0.0, 0.0, 1.0])


def test_labels(tmp_path):
    for scale, label in [("percentile", "attention percentile"), ("linear", "attention weight")]:
        figure = heatmap(grid(3, 2), np.arange(6), scale=scale, title="slide 7")
        assert figure.axes[0].get_title() == "slide 7" and figure.axes[1].get_ylabel() == label
    assert heatmap(grid(3, 2), np.arange(6), label="tumour").axes[1].get_ylabel() == "tumour"
    heatmap(grid(3, 2), np.arange(6), tmp_path / "no ending")
    assert (tmp_path / "no ending").read_bytes().startswith(PNG)
    heatmap(grid(3, 2), np.arange(6), str(tmp_path / "slide.pdf"))
    assert (tmp_path / "slide.pdf").read_bytes().startswith(b"%PDF")


@pytest.mark.parametrize("regular", [True, False])
def test_many_patches_are_drawn_fast(regular, tmp_path):
    generator = np.random.default_rng(0)
    coords = generator.permutation(grid(400, 250))
    coords = coords if regular else coords + generator.integers(0, 50, coords.shape)
    weights = np.exp(5 * generator.standard_normal(len(coords)))
    start = time.perf_counter()
    heatmap(coords, weights, tmp_path / "slide.png", patch_size=256)
    assert time.perf_counter() - start < 10  # about 1 s; a patch of matplotlib for each takes minutes


def test_bad_arguments_of_heatmap():
    coords, weights = grid(3, 2), np.arange(6.0)
    for args, options, error, match in [
        ((coords[:5], weights), {}, ValueError, r"coords must be \[6, 2\]; got shape \(5, 2\)"),
        ((coords[:, :1], weights), {}, ValueError, r"coords must be \[6, 2\]; got shape \(6, 1\)"),
        ((coords, weights[:, None]), {}, ValueError, r"weights must be \[n\].*got shape \(6, 1\)"),
        ((coords[:0], weights[:0]), {}, ValueError, "at least one patch"),
        (
            (coords, weights - np.array([0, 0, np.nan, 0, 0, 0])),
            {},
            ValueError,
            "weights must be finite; got nan for patch 2",
        ),
        ((np.where(coords > 300, np.inf, coords), weights), {}, ValueError, "coords must be finite; got"),
        ((coords, "hot"), {}, TypeError, "weights must be a tensor or array of numbers; got str"),
        ((coords, weights), {"scale": "rank"}, ValueError, "scale must be one of linear, log, percentile; got 'rank'"),
        ((coords, weights), {"cmap": "warm"}, ValueError, "cmap must be.*got 'warm'"),
        ((coords, weights), {"patch_size": 0}, ValueError, "patch_size must be positive and finite; got 0"),
        ((coords, weights), {"patch_size": "256"}, TypeError, "patch_size must be a number; got str"),
        ((coords, weights), {"dpi": -1}, ValueError, "dpi must be positive and finite; got -1"),
        ((coords, weights - 1), {"scale": "log"}, ValueError, "scale='log' needs weights from 0 on.*got -1.0"),
        ((coords, 0 * weights), {"scale": "log"}, ValueError, "scale='log' needs.*got only 0"),
    ]:
        with pytest.raises(error, match=match):
            heatmap(*args, **options)


# The module


@pytest.mark.parametrize("missing", ["numpy", "matplotlib"])
def test_what_is_missing_is_named(missing, monkeypatch):
    for name in list(sys.modules):
        if name.split(".")[0] == missing:
            monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    with pytest.raises(ImportError, match=rf"needs {missing}: pip install milkernels\[viz\]"):
        heatmap(torch.zeros(1, 2), torch.ones(1))
    if missing == "numpy":
        with pytest.raises(ImportError, match=r"needs numpy: pip install milkernels\[viz\]"):
            attention_arrays(pool(make_bags()), make_bags())


def test_no_global_state_of_matplotlib():
    script = """
        import sys, torch, milkernels.visualize as visualize
        assert "matplotlib" not in sys.modules
        figure = visualize.heatmap(torch.tensor([[0, 0], [1, 0]]), torch.ones(2))
        assert "matplotlib.pyplot" not in sys.modules and type(figure).__name__ == "Figure"
    """
    subprocess.run([sys.executable, "-c", "\n".join(line.strip() for line in script.splitlines())], check=True)


def test_the_examples_run():
    results = doctest.testmod(visualize)
    assert results.attempted > 5 and results.failed == 0
