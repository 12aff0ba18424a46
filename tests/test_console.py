"""Progress where there is no terminal: rare lines, and none missing where a part takes long."""

import io
import time
from contextlib import suppress

import pytest
from rich.console import Console

from hamcli import console


@pytest.fixture
def soon(monkeypatch):
    monkeypatch.setattr(console, "PLAIN_SECONDS", 0.2)


def lines(capsys):
    return capsys.readouterr().err.splitlines()


def test_a_part_that_begins_soon_after_a_line_is_told_if_it_lasts(soon, capsys):
    with console.Screen().watcher() as watcher:
        watcher.stage("opening")
        watcher.stage("passing")
        watcher.stage("building, about a minute")
        assert lines(capsys) == ["ham: opening"]
        time.sleep(0.5)
        assert lines(capsys) == ["ham: building, about a minute"]


@pytest.mark.parametrize("fails", [False, True])
def test_only_what_has_come_to_its_end_gets_a_tick(fails):
    out = Console(file=io.StringIO(), force_terminal=True, width=80)
    with suppress(ZeroDivisionError), console.LiveWatcher(console.Screen(), out) as one:
        one.stage("opening")
        1 / (not fails)
    assert ("✓" in out.file.getvalue()) is not fails


@pytest.mark.parametrize("later", ["steps", "end"])
def test_a_part_that_is_over_is_not_told_any_more(later, soon, capsys):
    with console.Screen().watcher() as watcher:
        watcher.stage("opening")
        watcher.stage("measuring")
        if later == "steps":
            watcher.begin_steps(steps=20, done=0, target=0.9)
            time.sleep(0.5)
    time.sleep(0.5)
    assert lines(capsys) == ["ham: opening"]
