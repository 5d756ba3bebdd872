"""What TensorBoard's own reader finds in the folder of a comparison."""

from pathlib import Path
from typing import Any

import pytest
from finished_runs import make_run, twelve
from tensorboard import context
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.hparams import api_pb2, backend_context, get_experiment, list_session_groups

from kvc.__main__ import main
from kvc.report.folder import read_runs
from kvc.report.tensorboard import folders_of, hparams_of


def hparams_table(folder: Path) -> tuple[Any, list[Any]]:
    """The experiment and its session groups, as TensorBoard's HParams page asks for them."""
    multiplexer = EventMultiplexer().AddRunsFromDirectory(str(folder))
    multiplexer.Reload()
    provider = MultiplexerDataProvider(multiplexer, str(folder))
    backend = backend_context.Context(TBContext(data_provider=provider, logdir=str(folder)))
    request = context.RequestContext()
    experiment = get_experiment.Handler(request, backend, "", api_pb2.GetExperimentRequest()).run()
    wanted = api_pb2.ListSessionGroupsRequest(
        start_index=0, slice_size=100, allowed_statuses=list(api_pb2.Status.values())
    )
    for metric in experiment.metric_infos:
        wanted.col_params.add(metric=metric.name, include_in_result=True)
    for setting in experiment.hparam_infos:
        wanted.col_params.add(hparam=setting.name, include_in_result=True)
    return experiment, list(list_session_groups.Handler(request, backend, "", wanted).run().session_groups)


def test_twelve_runs_are_twelve_entries_with_metrics(tmp_path: Path) -> None:
    runs = twelve(tmp_path / "runs")
    board = tmp_path / "board"
    assert main(["compare", *map(str, runs), "--tensorboard", str(board)]) == 0
    experiment, groups = hparams_table(board)
    assert {info.name for info in experiment.hparam_infos} == {*("method", "seed_everything", "model.init_args.budget")}
    metrics = {"final/exact_match", "final/kv_bytes_peak", "final/perplexity"}
    assert {info.name.tag for info in experiment.metric_infos} == metrics
    assert len(groups) == 12
    assert {session.name for group in groups for session in group.sessions} == {run.name for run in runs}
    for group in groups:
        values = {value.name.tag: value.value for value in group.metric_values}
        assert values.keys() == metrics
        budget = group.hparams["model.init_args.budget"].number_value
        assert group.sessions[0].name == f"b{budget:.0f}-s{group.hparams['seed_everything'].number_value:.0f}"
        assert values["final/kv_bytes_peak"] == budget * 2048

    plots = EventAccumulator(str(board)).Reload()
    assert plots.Tags()["images"] == ["quality/exact_match against kv_bytes_peak", "curves/val/loss"]
    curve = EventAccumulator(str(board / "b8-s42")).Reload().Scalars("val/loss")
    assert [event.step for event in curve] == [10, 20, 30, 40, 50]


def test_an_earlier_comparison_is_replaced_and_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [str(make_run(tmp_path / "runs" / name, seed=i)) for i, name in enumerate("ab")]
    board = tmp_path / "runs" / "board"
    for chosen in (runs, runs[:1]):
        assert main(["compare", *chosen, "--tensorboard", str(board)]) == 0
    assert [path.name for path in board.iterdir() if path.is_dir()] == ["a"]
    # runs/* names the comparison too.
    assert main(["compare", *map(str, sorted((tmp_path / "runs").iterdir())), "--tensorboard", str(board)]) == 0
    capsys.readouterr()

    before = sorted(tmp_path.rglob("*"))
    assert main(["compare", *runs, "--tensorboard", runs[0]]) == 2
    assert "holds no earlier comparison" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_one_type_a_column(tmp_path: Path) -> None:
    paths = [make_run(tmp_path / "one", 8), make_run(tmp_path / "two", 16)]
    runs = read_runs(paths)
    runs[0].result["config"]["model"]["init_args"] |= {"flag": True, "mixed": 3, "only": 1.5, "number": 2}
    runs[1].result["config"]["model"]["init_args"] |= {"flag": False, "mixed": "three", "number": 0.5}
    table = hparams_of(runs)
    assert table["one"] == {
        "method": "kvc.methods.demo.Demo",
        "seed_everything": 42,
        "model.init_args.budget": 8,
        "model.init_args.flag": True,
        "model.init_args.mixed": "3",
        "model.init_args.only": "1.5",
        "model.init_args.number": 2,
    }
    assert table["two"]["model.init_args.only"] == "-"


def test_labels_stay_inside_the_folder() -> None:
    assert folders_of(["r:test", "r_test", "/tmp/x", "a/b"]) == ["r_test", "r_test_", "tmp/x", "a/b"]
