"""The picture of a task report."""

from matplotlib.figure import Figure

from kvc.core.results import Summary, Value
from kvc.data.synthetic.tasks import TASKS
from kvc.methods.lm.arms import ARMS, FULL

COLORS = ("#1b9e77", "#d95f02", "#7570b3", "#e7298a")


def arms_by_task(summary: Summary, levels: dict[str, list[str]]) -> Figure:
    """A panel for each task: exact match (perplexity for dialogue) of every arm, a line for each difficulty.

    Args:
        summary: Of a task report.
        levels: Task to the names of its difficulties.
    """
    columns = min(4, len(levels))
    rows = -(-len(levels) // columns)
    figure = Figure(figsize=(3.4 * columns, 3.3 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis in axes[len(levels) :]:
        axis.set_visible(False)
    for axis, (task, names) in zip(axes, levels.items()):
        metric = "perplexity" if task == "dialogue" else "exact_match"
        for color, level in zip(COLORS, names):
            values = [_value(summary, arm, f"{metric}/{task}_{level}") for arm in ARMS]
            middle = [value.value for value in values]
            low = [value.value - (value.value if value.low is None else value.low) for value in values]
            high = [(value.value if value.high is None else value.high) - value.value for value in values]
            axis.errorbar(
                range(len(values)), middle, (low, high), marker="o", ms=4, capsize=2, color=color, label=level
            )
        axis.set_title(task.replace("_", "-"))
        axis.set_ylabel(metric.replace("_", " "))
        axis.set_xticks(range(len(ARMS)), list(ARMS), rotation=40, ha="right")
        if metric == "exact_match":
            axis.set_ylim(-0.03, 1.03)
        axis.grid(alpha=0.3)
        axis.legend(title=TASKS[task].unit, fontsize="small", title_fontsize="small", frameon=False)
    return figure


def _value(summary: Summary, arm: str, metric: str) -> Value:
    return summary.metrics[metric] if arm == FULL else summary.arms[arm][metric]
