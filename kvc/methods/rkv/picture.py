"""The picture of an eviction report."""

from itertools import cycle

from matplotlib.figure import Figure

from kvc.core.results import Summary, Value
from kvc.methods.rkv.summary import NO_CONTEXT, policy_and_budget

MARKERS = "osD^vP*X<>"


def accuracy_by_budget(summary: Summary) -> Figure:
    """Accuracy against the budget, a line for each policy, full and no context as bands."""
    import matplotlib

    figure = Figure(figsize=(8.2, 4.4), layout="constrained")
    axis = figure.subplots()
    lines: dict[str, list[tuple[int, Value]]] = {}
    for arm, values in summary.arms.items():
        if (parts := policy_and_budget(arm)) is not None:
            lines.setdefault(parts[0], []).append((parts[1], values["accuracy"]))
    colors = matplotlib.colormaps["tab10"].colors  # type: ignore[attr-defined]
    widest = max((budget for points in lines.values() for budget, _ in points), default=0)
    for number, ((policy, points), color, marker) in enumerate(zip(lines.items(), cycle(colors), cycle(MARKERS))):
        points.sort(key=lambda point: point[0])
        # Set apart, intervals at the same budget can be told from each other.
        aside = (number - (len(lines) - 1) / 2) * 0.006 * widest
        cost, quality = [budget + aside for budget, _ in points], [y.value for _, y in points]
        low = [y.value - (y.value if y.low is None else y.low) for _, y in points]
        high = [(y.value if y.high is None else y.high) - y.value for _, y in points]
        axis.errorbar(
            cost,
            quality,
            (low, high),
            label=policy,
            color=color,
            marker=marker,
            ms=5,
            capsize=2,
            lw=1.4,
            elinewidth=0.8,
        )
    ends = {"full memory": summary.metrics}
    if NO_CONTEXT in summary.arms:
        ends[NO_CONTEXT] = summary.arms[NO_CONTEXT]
    for name, values in ends.items():
        level = values["accuracy"]
        axis.axhline(level.value, color="0.35", ls="--" if name != NO_CONTEXT else ":", lw=1.2)
        if level.low is not None and level.high is not None:
            axis.axhspan(level.low, level.high, color="0.5", alpha=0.15, lw=0)
        rows = values["kv_tokens_peak"].value
        # Where the lines leave room: few rows are never right, many are.
        x, side, below, up = (1, "right", "bottom", 3) if name == NO_CONTEXT else (0, "left", "top", -4)
        axis.annotate(
            f"{name} ({rows:.0f} rows at the peak)", (x, level.value), (-4 if x else 4, up), ha=side, va=below,
            xycoords=("axes fraction", "data"), textcoords="offset points", fontsize="small", color="0.25",
        )  # fmt: skip
    axis.set_xlabel("budget: rows per layer and KV head after a compression")
    axis.set_xticks(sorted({budget for points in lines.values() for budget, _ in points}))
    axis.set_ylabel("accuracy")
    axis.set_ylim(-0.03, 1.03)
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    return figure
