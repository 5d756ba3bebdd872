"""Two processes never work in one run folder."""

import multiprocessing

import pytest

from kvc.errors import UserError
from kvc.runs import RunFolder


def hold(path, ready, done):
    claim = RunFolder(path).claim({"a": 1}, overwrite=False)
    ready.set()
    done.wait(20)
    assert claim.lock is not None


def test_a_second_process_is_refused_until_the_first_ends(tmp_path):
    context = multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()
    other = context.Process(target=hold, args=(tmp_path / "run", ready, done))
    other.start()
    assert ready.wait(20)
    with pytest.raises(UserError, match="in use by another process"):
        RunFolder(tmp_path / "run").claim({"a": 1}, overwrite=False)
    other.kill()
    other.join()
    assert RunFolder(tmp_path / "run").claim({"a": 1}, overwrite=False).known
