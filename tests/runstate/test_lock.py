import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import filelock
import pytest

from hamcli.errors import OutputLocked
from hamcli.runstate import RunState
from hamcli.runstate.lock import RunLock
from tests.runstate import pico

ROOT = str(Path(__file__).parents[2])

HOLDER = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from hamcli.errors import HamError
from hamcli.runstate import RunState
if len(sys.argv) > 3:
    while not Path(sys.argv[3]).exists():
        pass
try:
    run = RunState(Path(sys.argv[1]))
except HamError as error:
    print(error.line(), flush=True)
    sys.exit(error.exit_code)
print("holding", flush=True)
sys.stdin.read()
"""


def start(out, *more, code=HOLDER):
    return subprocess.Popen(
        [sys.executable, "-c", code, str(out), ROOT, *map(str, more)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def end(process):
    process.stdin.close()
    process.stdout.close()
    return process.wait()


def test_the_second_of_two_names_process_and_host_of_the_first_at_once(tmp_path):
    holder = start(tmp_path / "o")
    assert holder.stdout.readline() == "holding\n"
    with pytest.raises(OutputLocked) as caught:
        RunState(tmp_path / "o", overwrite=True, resume=True)
    assert caught.value.code == "E601"
    assert caught.value.exit_code == 6
    assert f"process {holder.pid} on {socket.gethostname()}" in caught.value.line()
    assert end(holder) == 0
    RunState(tmp_path / "o").close()


def test_of_four_released_together_one_wins_and_the_others_name_it(tmp_path):
    for round_number in range(2):
        out, go = tmp_path / f"o{round_number}", tmp_path / f"go{round_number}"
        started = [start(out, go) for _ in range(4)]
        time.sleep(0.3)
        go.touch()
        lines = {process.pid: process.stdout.readline() for process in started}
        winners = [pid for pid, line in lines.items() if line == "holding\n"]
        assert len(winners) == 1
        for pid, line in lines.items():
            assert pid in winners or f"process {winners[0]} on" in line
        codes = sorted(end(process) for process in started)
        assert codes == [0, 6, 6, 6]


def test_the_lock_of_a_killed_process_is_free_at_once(tmp_path):
    holder = start(tmp_path / "o")
    holder.stdout.readline()
    holder.send_signal(signal.SIGKILL)
    end(holder)
    assert (tmp_path / "o.run" / "lock").exists()
    RunState(tmp_path / "o").close()


def test_a_dead_holder_not_yet_waited_for_does_not_count_as_alive(tmp_path):
    holder = start(tmp_path / "o")
    holder.stdout.readline()
    holder.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)
    RunState(tmp_path / "o").close()
    end(holder)


def mark(folder, **fields):
    folder.mkdir(exist_ok=True)
    (folder / "lock").write_text(json.dumps(fields))


def test_a_mark_of_a_process_whose_number_was_given_away_again_is_harmless(tmp_path):
    mark(tmp_path / "o.run", pid=os.getppid(), born=1, host=socket.gethostname(), id="x")
    RunState(tmp_path / "o").close()


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"pid": "x"}', "\0" * 100])
def test_a_lock_file_with_anything_in_it_is_harmless(tmp_path, content):
    (tmp_path / "o.run").mkdir()
    (tmp_path / "o.run" / "lock").write_text(content)
    RunState(tmp_path / "o").close()


def test_a_mark_from_another_host_is_harmless_when_the_lock_is_free(tmp_path):
    mark(tmp_path / "o.run", pid=1, born=1, host="elsewhere", id="x")
    RunState(tmp_path / "o").close()


def test_the_same_process_cannot_open_one_output_twice(tmp_path):
    with RunState(tmp_path / "o"), pytest.raises(OutputLocked, match=f"process {os.getpid()} on"):
        RunState(tmp_path / "o")
    RunState(tmp_path / "o").close()


def test_a_process_that_closed_its_run_and_lives_on_is_no_holder(tmp_path):
    with RunState(tmp_path / "o") as run:
        run.save(1, {}, {})
    holder = start(tmp_path / "o")
    assert "E113" in holder.stdout.readline()  # past the lock, which was free
    end(holder)


@pytest.fixture
def noop_lock(monkeypatch):
    """A file system on which every lock succeeds."""
    monkeypatch.setattr(filelock._unix.fcntl, "flock", lambda *_: None)


def test_where_locks_do_nothing_a_living_holder_is_still_seen(tmp_path, noop_lock):
    holder = start(tmp_path / "o")
    holder.stdout.readline()
    with pytest.raises(OutputLocked, match="E601"):
        RunState(tmp_path / "o")
    end(holder)


def test_where_locks_do_nothing_the_overtaken_run_stops_at_its_next_commit(tmp_path, noop_lock):
    first = RunState(tmp_path / "o")
    first.begin(pico.identity())
    first.save(1, pico.tensors(1), pico.values(1))
    second = RunState(tmp_path / "o", resume=True)
    second.begin(pico.identity())
    with pytest.raises(OutputLocked, match="E602"):
        first.save(2, pico.tensors(2), pico.values(2))
    stage = first.stage()
    pico.fill(stage)
    with pytest.raises(OutputLocked, match="E602"):
        first.publish(stage)
    first.close()
    assert second.newest_valid()[0].step == 1
    second.save(2, pico.tensors(2), pico.values(2))
    second.close()
    assert pico.sound_steps(second.folder) == ([1, 2], [])


def test_closing_an_overtaken_run_takes_nothing_from_the_other(tmp_path, noop_lock):
    first = RunState(tmp_path / "o")
    second = RunState(tmp_path / "o")
    second.begin(pico.identity())
    stage = second.stage()
    first.close()
    assert stage.exists()
    assert (second.folder / "run.json").exists()
    second.check_space(0, 0)
    second.close()


def test_a_file_system_without_locks_is_used_without_one(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(filelock._unix.fcntl, "flock", unsupported)
    with RunState(tmp_path / "o") as run:
        run.save(1, {}, {})
    assert run.checkpoints.steps() == [1]


def test_a_lock_that_is_removed_while_others_open_it_never_has_two_holders(tmp_path):
    """One process takes and removes the lock over and over; each time nobody else may hold it."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[2])\n"
        "from pathlib import Path\nfrom hamcli.runstate import RunState\n"
        "from hamcli.errors import OutputLocked\n"
        "out = Path(sys.argv[1]); won = 0\n"
        "for _ in range(200):\n"
        "    try: run = RunState(out)\n"
        "    except OutputLocked: continue\n"
        "    token = out.parent / 'token'\n"
        "    token.open('x').close(); token.unlink(); won += 1\n"
        "    run.close()\n"
        "print(won)\n"
    )
    started = [start(tmp_path / "o", code=code) for _ in range(2)]
    won = [process.stdout.read() for process in started]
    assert [end(process) for process in started] == [0, 0]
    assert all(int(text) > 0 for text in won)
    assert not (tmp_path / "o.run").exists()


def test_modes_of_the_lock_follow_the_umask(tmp_path):
    (tmp_path / "r").mkdir()
    before = os.umask(0o027)
    try:
        lock = RunLock(tmp_path / "r")
        assert lock.path.stat().st_mode & 0o777 == 0o640
        lock.release()
    finally:
        os.umask(before)


def test_a_mark_that_was_emptied_is_nobody_elses(tmp_path):
    lock = RunLock(tmp_path)
    os.truncate(tmp_path / "lock", 0)
    lock.check()
    assert lock.is_held()
    (tmp_path / "lock").write_text('{"pid": 1, "host": "elsewhere"}')
    with pytest.raises(OutputLocked, match=r"E602.*process 1 on elsewhere"):
        lock.check()
    assert not lock.is_held()
    lock.release(remove=True)
    assert (tmp_path / "lock").exists()  # another's now


def test_a_lock_whose_mark_cannot_be_written_is_let_go(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space") as caught:
        RunLock(tmp_path)
    monkeypatch.undo()
    RunLock(tmp_path).release(remove=True)
    assert caught.value.errno == 28  # its frames, and so the first lock, have lived until now
    assert list(tmp_path.iterdir()) == []
