"""The picture of an eviction report."""

from itertools import cycle

from matplotlib.figure import Figure

from kvc.core.results import Summary, Value
from kvc.methods.rkv.summary import NO_CONTEXT, policy_and_budget

MARKERS = "osD^vP*X<>"


def accuracy_by_memory(summary: Summary) -> Figure:
    """Accuracy against the mean peak of rows in memory, a line for each policy, full and no context as bands."""
    import matplotlib

    figure = Figure(figsize=(8.2, 4.4), layout="constrained")
    axis = figure.subplots()
    lines: dict[str, list[tuple[Value, Value]]] = {}
    for arm, values in summary.arms.items():
        if (parts := policy_and_budget(arm)) is not None:
            lines.setdefault(parts[0], []).append((values["kv_tokens_peak"], values["accuracy"]))
    colors = matplotlib.colormaps["tab10"].colors  # type: ignore[attr-defined]
    widest = max((x.value for points in lines.values() for x, _ in points), default=0)
    for number, ((policy, points), color, marker) in enumerate(zip(lines.items(), cycle(colors), cycle(MARKERS))):
        points.sort(key=lambda point: point[0].value)
        # Policies need the same rows at the same budget: set apart, their intervals can be told from each other.
        aside = (number - (len(lines) - 1) / 2) * 0.006 * widest
        cost, quality = [x.value + aside for x, _ in points], [y.value for _, y in points]
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
        axis.annotate(
            f"{name} ({rows:.0f} rows)", (1, level.value), (-4, 3 if name == NO_CONTEXT else -4),
            ha="right", va="bottom" if name == NO_CONTEXT else "top",
            xycoords=("axes fraction", "data"), textcoords="offset points", fontsize="small", color="0.25",
        )  # fmt: skip
    axis.set_xlabel("peak rows in memory, per layer and KV head (mean over answers)")
    axis.set_ylabel("accuracy")
    axis.set_ylim(-0.03, 1.03)
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    return figure
