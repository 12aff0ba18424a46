import os
import pty
import signal
import subprocess
import sys
import threading
import time

import pytest

from hamcli.errors import Interrupted, Preempted
from hamcli.signals import ignore_signals, raise_on_signals, stop_on_signals


@pytest.fixture(autouse=True)
def hangups_are_heard():
    """As in a terminal, also where the tests run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGUSR2", "SIGHUP"])
def test_a_preempting_signal_sets_the_flag_and_means_75(name):
    with stop_on_signals() as stop:
        assert stop.requested is None
        os.kill(os.getpid(), getattr(signal, name))
        assert stop.requested == name
        assert stop.exit_code == 75


def test_ctrl_c_sets_the_flag_and_means_130():
    with stop_on_signals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested == "SIGINT"
        assert stop.exit_code == 130


def test_the_first_signal_decides():
    with stop_on_signals() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested == "SIGTERM"
        assert stop.exit_code == 75


def handlers():
    return {
        name: signal.getsignal(getattr(signal, name))
        for name in ("SIGTERM", "SIGUSR1", "SIGUSR2", "SIGHUP", "SIGINT")
    }


def test_handlers_are_as_before_after_the_block_and_after_an_exception():
    before = handlers()
    with stop_on_signals():
        assert handlers() != before
    assert handlers() == before
    with pytest.raises(KeyError), stop_on_signals():
        raise KeyError
    assert handlers() == before


def test_blocks_nest():
    with stop_on_signals() as outer:
        with stop_on_signals() as inner:
            os.kill(os.getpid(), signal.SIGTERM)
        assert inner.requested == "SIGTERM"
        assert outer.requested is None
        os.kill(os.getpid(), signal.SIGUSR1)
        assert outer.requested == "SIGUSR1"


def test_outside_the_main_thread_it_does_nothing():
    found = []

    def work():
        with stop_on_signals() as stop:
            found.append(stop.requested)

    before = handlers()
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [None]
    assert handlers() == before


def test_an_ignored_hangup_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_on_signals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.requested is None
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


LOOP = """
import sys, time
from hamcli.errors import Interrupted, Preempted
from hamcli.signals import ignore_signals, raise_on_signals, stop_on_signals
with stop_on_signals(lambda: print("restored", flush=True)) as stop:
    print("ready", flush=True)
    while stop.requested is None:
        time.sleep(0.01)
    print(stop.requested, flush=True)
    if len(sys.argv) > 1:
        time.sleep(float(sys.argv[1]))  # a save that takes long
sys.exit(stop.exit_code)
"""


def start(*arguments, **options):
    process = subprocess.Popen(
        [sys.executable, "-c", LOOP, *arguments],
        stdout=subprocess.PIPE,
        text=True,
        **({"stderr": subprocess.PIPE} | options),
    )
    assert process.stdout.readline() == "ready\n"
    return process


def test_one_interrupt_lets_the_save_finish():
    process = start("0.2")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=5)
    assert (process.returncode, out, err) == (130, "SIGINT\n", "")


def test_a_second_interrupt_ends_at_once_with_130_and_the_terminal_restored():
    process = start("30")
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "SIGINT\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)  # it would sleep for longer
    assert process.returncode == 130
    assert out == "restored\n"
    assert "ham: error[HAM-E902]: interrupted twice" in err
    assert "\x1b" not in err
    assert "Traceback" not in err


def test_five_interrupts_at_once_end_with_130():
    process = start("30")
    for _ in range(5):
        process.send_signal(signal.SIGINT)
        time.sleep(0.01)
    process.communicate(timeout=5)
    assert process.returncode == 130


def test_on_a_terminal_the_cursor_is_shown_again():
    master, slave = pty.openpty()
    process = start("30", stderr=slave)
    os.close(slave)
    process.send_signal(signal.SIGINT)
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    process.wait(5)
    assert b"\x1b[?25h" in os.read(master, 4096)
    os.close(master)
    process.stdout.close()


def test_a_closed_stderr_does_not_keep_the_process_alive():
    process = start("30")
    process.stderr.close()
    process.send_signal(signal.SIGINT)
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    assert process.wait(5) == 130
    process.stdout.close()


# ---- a guard that raises ----


def send(name):
    os.kill(os.getpid(), getattr(signal, name))


STOPS = [
    ("SIGINT", Interrupted, "E902.*interrupted.*nothing is kept"),
    *(
        (name, Preempted, f"E901.*stopped by {name}.*nothing is kept")
        for name in ("SIGTERM", "SIGUSR1", "SIGUSR2", "SIGHUP")
    ),
]


@pytest.mark.parametrize(("name", "kind", "told"), STOPS)
def test_an_armed_guard_raises_at_once(name, kind, told):
    before = handlers()
    with raise_on_signals() as guard:
        guard.arm()
        with pytest.raises(kind, match=told):
            send(name)
    assert handlers() == before


@pytest.mark.parametrize(("name", "kind", "told"), STOPS)
def test_a_signal_before_raises_where_the_guard_is_armed(name, kind, told):
    with raise_on_signals() as guard:
        send(name)
        send("SIGTERM")
        with pytest.raises(kind, match=told):
            guard.arm()


def test_a_guard_that_is_held_lets_the_job_end():
    with raise_on_signals() as guard:
        guard.arm()
        guard.hold()
        for name, _, _ in STOPS:
            send(name)
        send("SIGINT")


def test_cleaning_up_after_a_signal_is_not_disturbed_by_another():
    with raise_on_signals() as guard:
        guard.arm()
        with pytest.raises(Preempted):
            send("SIGTERM")
        send("SIGTERM")
        send("SIGHUP")


CLEANING = """
import os, signal
from hamcli.signals import raise_on_signals
with raise_on_signals() as guard:
    guard.arm()
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    finally:
        os.kill(os.getpid(), signal.SIGINT)
        print("went on")
"""


def test_cleaning_up_ends_at_ctrl_c():
    done = subprocess.run([sys.executable, "-c", CLEANING], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (130, "")
    assert "HAM-E902" in done.stderr


def test_a_process_about_to_end_can_be_made_deaf():
    before = handlers()
    try:
        ignore_signals()
        assert set(handlers().values()) == {signal.SIG_IGN}
    finally:
        for name, handler in before.items():
            signal.signal(getattr(signal, name), handler)
