"""One picture of a clustering: the questions in two dimensions, and what each cluster is about."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kvc.core.files import atomic
from kvc.data.clustering.embedder import Vectors
from kvc.data.clustering.kmeans import Clusters

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, MUTED, GRID = "#1b1d21", "#646a73", "#dfe2e6"
TERMS = 5  # words of a cluster in the legend
LINE = 0.19  # inches of a line of the legend


def draw_clusters(vectors: Vectors, clusters: Clusters, terms: Sequence[Sequence[str]], title: str) -> "Figure":
    """Scatter plot on the first two principal components, and a legend with sizes and typical words.

    Args:
        vectors: `[N, D]`.
        clusters: Their clusters.
        terms: Typical words of each cluster.
        title: Above the plot.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    points, centres, shares = project(vectors, clusters.centroids)
    colours = _colours(clusters.k)
    settings: Any = {"text.parse_math": False, "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans"]}
    with mpl.rc_context(settings):
        height = max(6.0, 1.1 + LINE * clusters.k)
        figure = Figure(figsize=(11.5, height), facecolor="white", layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(1.5, 1))
        # In a random order no cluster lies on top of all others.
        order = np.random.default_rng(0).permutation(len(points))
        size = float(np.clip(9000 / len(points), 5, 40))
        left.scatter(*points[order].T, s=size, c=colours[clusters.labels[order]], alpha=0.55, lw=0)
        extent = np.maximum(np.ptp(points, axis=0), 1e-9)
        for number, (centre, place) in enumerate(zip(centres, apart(centres / extent) * extent)):
            left.plot(*zip(centre, place), color=colours[number], lw=1)
            box = {"boxstyle": "circle,pad=0.22", "fc": "white", "ec": colours[number], "lw": 1.4}
            left.text(*place, str(number), fontsize=7.5, color=INK, ha="center", va="center", bbox=box)
        for axis, share, name in zip((left.xaxis, left.yaxis), shares, ("first", "second")):
            axis.set_label_text(f"{name} principal component ({share:.1%} of the variance)", color=MUTED)
        left.tick_params(colors=MUTED, labelsize=8)
        left.grid(color=GRID, lw=0.6)
        left.set_axisbelow(True)
        for spine in left.spines.values():
            spine.set_color(GRID)
        left.set_title(title, loc="left", fontsize=11, color=INK)
        right.set(xlim=(0, 1), ylim=(clusters.k + 0.5, -1.5))
        right.axis("off")
        for x, text in ((0.075, "cluster"), (0.24, "questions"), (0.27, "typical words")):
            right.text(x, -1, text, fontsize=8, color=MUTED, ha="right" if x < 0.25 else "left", va="center")
        for number, (count, words) in enumerate(zip(clusters.sizes, terms)):
            right.plot(0.02, number, "o", color=colours[number], ms=7)
            right.text(0.075, number, str(number), fontsize=8, color=INK, ha="right", va="center")
            right.text(0.24, number, f"{count}", fontsize=8, color=INK, ha="right", va="center")
            right.text(0.27, number, ", ".join(words[:TERMS]), fontsize=8, color=INK, va="center")
    return figure


def project(
    vectors: Vectors, centroids: Vectors
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """The first two principal components of the vectors; missing ones are zero.

    Returns:
        Points `[N, 2]`, centroids `[k, 2]`, and shares of the variance `[2]`.
    """
    from sklearn.decomposition import PCA

    with np.errstate(invalid="ignore"):
        found = PCA(min(2, *vectors.shape), svd_solver="full").fit(vectors.astype(np.float64))
    missing = 2 - found.n_components_
    points, centres = (np.pad(found.transform(x), ((0, 0), (0, missing))) for x in (vectors, centroids))
    return points, centres, np.pad(np.nan_to_num(found.explained_variance_ratio_), (0, missing))


def apart(places: NDArray[np.float64], gap: float = 0.034, rounds: int = 200) -> NDArray[np.float64]:
    """Places of labels `[k, 2]`, pushed from each other until none are nearer than `gap`, as far as `rounds` allow."""
    # Two labels at one place need a direction to part in.
    places = places + np.random.default_rng(0).normal(scale=1e-4, size=places.shape)
    for _ in range(rounds):
        away = places[:, None] - places[None]
        distances = np.linalg.norm(away, axis=2) + np.eye(len(places)) * gap
        push = np.maximum(gap - distances, 0) / 2
        if not push.any():
            break
        places = places + (away / distances[..., None] * push[..., None]).sum(1)
    return places


def write_png(figure: "Figure", path: Path) -> None:
    """Write a picture in 256 colours, which scattered points compress well in."""
    from PIL import Image

    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=100)
    reduced = Image.open(data).convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    with atomic(path) as temporary:
        reduced.save(temporary, format="png", optimize=True)


def _colours(k: int) -> NDArray[np.float64]:
    """A colour for each cluster `[k, 4]`; neighbours in number differ most."""
    import matplotlib as mpl

    if k <= 20:
        return np.asarray(mpl.colormaps["tab20"](np.arange(k)))
    # Steps of the golden ratio around the colour circle, at three brightnesses.
    hues = np.arange(k) * 0.618034 % 1
    colours = np.asarray(mpl.colormaps["hsv"](hues))
    colours[:, :3] *= np.array([0.95, 0.75, 0.55])[np.arange(k) % 3][:, None]
    return colours
