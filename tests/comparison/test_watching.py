"""What a person sees of a comparison under way."""

from hamcli import console
from hamcli.comparison import watching
from hamcli.progress import Silent, StepRecord


def test_time_left_is_that_of_the_runs_made_and_runs_found_cost_nothing(monkeypatch):
    said, clock = [], [0.0]
    watcher = Silent()
    watcher.stage = said.append
    monkeypatch.setattr(watching.time, "monotonic", lambda: clock[0])
    counter = watching.RunCounter(watcher, 6)
    counter.found()
    counter.begin("a")
    clock[0] = 100.0
    counter.end()
    counter.begin("b")
    clock[0] = 300.0
    counter.end()
    counter.begin("c")
    assert said == [
        "cell 2 of 6: a",
        "cell 3 of 6, about 7 min left: b",  # 4 runs of 100 s
        "cell 4 of 6, about 8 min left: c",  # 3 of 150 s
    ]


def test_lengths_of_time_in_words():
    words = [watching.in_words(seconds) for seconds in (0.1, 89, 91, 5399, 9000)]
    assert words == ["about 1 s", "about 89 s", "about 2 min", "about 90 min", "about 2.5 h"]


def test_without_a_terminal_a_line_of_steps_tells_its_run(capsys, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: clock[0])
    with console.Screen().watcher() as watcher:
        watcher.stage("writing")
        watcher.stage("cell 2 of 6, about 7 min left: gradual at 90 %, seed 0")
        watcher.begin_steps(steps=20, done=0, target=0.9)
        clock[0] = 11.0
        watcher.step(StepRecord(10, 1.0, 0.5, 1e-3, 1.0))
        watcher.stage("writing the page")
        clock[0] = 22.0
        watcher.step(StepRecord(20, 1.0, 0.5, 1e-3, 1.0))
    lines = capsys.readouterr().err.splitlines()
    assert lines[1].startswith("ham: cell 2 of 6, about 7 min left: step 10/20  loss 1  ")
    assert lines[2].startswith("ham: step 20/20")
