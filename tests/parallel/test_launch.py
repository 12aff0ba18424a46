"""What a launcher says, and what does not go together with it."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from hamcli.errors import InputRefused, RecipeError, ResourceError, UsageError
from hamcli.parallel import launch, world
from hamcli.parallel import mates as mates_
from hamcli.parallel.launch import (
    Launch,
    launched,
    planned_parallel,
    refuse_several,
    settled_parallel,
)
from hamcli.parallel.mates import LONGEST, MateFailed, Mates, News, _news_of, error_of
from hamcli.parallel.parts import fingerprint, part_of, refuse_uneven_batch
from tests.parallel.pico import ALBERT, environment

TWO = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}


def test_without_a_launcher_there_is_one_process():
    assert launched({}) == Launch(0, 1, 0, 1)
    assert settled_parallel("auto", {}) == "none"


def test_a_launcher_tells_who_this_is():
    assert launched(TWO) == Launch(1, 2, 1, 2)
    assert launched({"WORLD_SIZE": "4", "RANK": "3"}) == Launch(3, 4, 3, 4)
    assert launched({"WORLD_SIZE": "two", "RANK": "-1"}) == Launch(0, 1, 0, 1)


@pytest.mark.parametrize("said", [{"RANK": "1"}, {"RANK": "1", "WORLD_SIZE": "1"}])
def test_a_rank_that_is_left_over_silences_nobody(tmp_path, said):
    assert launched(said) == Launch()
    done = ham(tmp_path, "recipe", "list", **said)
    assert "quick" in done.stdout


@pytest.mark.parametrize(("size", "rank"), [("two", "0"), ("0", "0"), ("2", "2"), ("2", "x")])
def test_numbers_of_processes_that_are_none_are_refused_aloud(size, rank):
    said = {"WORLD_SIZE": size, "RANK": rank}
    assert launched(said).rank == 0  # who refuses is not silent
    with pytest.raises(UsageError, match=f"E240.*WORLD_SIZE={size} RANK={rank}"):
        settled_parallel("auto", said)


def test_a_launcher_of_one_process_that_says_so_is_none():
    said = {"ACCELERATE_MIXED_PRECISION": "no", "MASTER_PORT": "29500", "WORLD_SIZE": "1"}
    assert settled_parallel("auto", said) == "none"


def test_who_takes_over_speaks(monkeypatch):
    voice = launch._Voice()
    monkeypatch.setattr(launch, "_VOICE", voice)
    assert launch.speaks()
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(launch, "_VOICE", launch._Voice())
    monkeypatch.setattr(sys, "stderr", None)
    assert not launch.speaks()
    launch.take_over()
    assert launch.speaks()
    assert sys.stderr is sys.__stderr__


@pytest.mark.parametrize(
    ("word", "more", "kind"),
    [
        ("auto", {}, "ddp"),
        ("auto", {"ACCELERATE_USE_FSDP": "true"}, "fsdp"),
        ("ddp", {"ACCELERATE_USE_FSDP": "true"}, "ddp"),
        ("fsdp", {}, "fsdp"),
    ],
)
def test_the_recipe_or_the_launcher_says_how(word, more, kind):
    assert settled_parallel(word, TWO | more) == kind


@pytest.mark.parametrize(
    ("word", "said", "code"),
    [
        ("ddp", {}, "E241"),
        ("fsdp", {"WORLD_SIZE": "1", "RANK": "0"}, "E241"),
        ("auto", {"ACCELERATE_MIXED_PRECISION": "no", "MASTER_PORT": "29500"}, "E241"),
        ("none", TWO, "E242"),
        ("auto", TWO | {"ACCELERATE_USE_DEEPSPEED": "true"}, "E248"),
    ],
)
def test_a_launch_that_is_not_what_was_asked_for_is_refused(word, said, code):
    with pytest.raises(RecipeError, match=code):
        settled_parallel(word, said)


def test_a_plan_is_told_of_its_own_option_and_not_of_a_launcher():
    assert [planned_parallel(*said) for said in (("auto", 1), ("auto", 2), ("fsdp", 2))] == [
        "none", "ddp", "fsdp",
    ]  # fmt: skip
    with pytest.raises(RecipeError, match=r"E241.*fsdp, and --world is 1 \(--world N"):
        planned_parallel("fsdp", 1)
    with pytest.raises(RecipeError, match=r"E242.*none, and --world is 2 .*no --world"):
        planned_parallel("none", 2)


def test_other_commands_run_in_one_process(monkeypatch):
    refuse_several("prune")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match=r"E249.*ham prune.*WORLD_SIZE is 2"):
        refuse_several("prune")


def test_a_batch_is_cut_by_rows_and_must_divide():
    import torch

    whole = {"input_ids": torch.arange(12).view(6, 2), "labels": torch.arange(6)}
    assert [part_of(whole, rank, 3)["labels"].tolist() for rank in range(3)] == [
        [0, 1], [2, 3], [4, 5],
    ]  # fmt: skip
    refuse_uneven_batch(6, 3)
    with pytest.raises(RecipeError, match=r"E244.*32 examples to 5 processes.*as 35"):
        refuse_uneven_batch(32, 5)


def test_a_sum_of_bits_tells_weights_apart():
    import torch

    one, other = torch.tensor([1.0, 2.0]), torch.tensor([[3.0], [4.0]]).bfloat16()
    found = fingerprint([one, other])
    assert 0 <= found < 2**62
    assert fingerprint([one.clone(), other.clone()]) == found
    assert fingerprint([other, one]) != found
    assert fingerprint([torch.nextafter(one, one + 1), other]) != found
    assert fingerprint([one, -other]) != found


def ham(tmp_path, *words, **more):
    return subprocess.run(
        [sys.executable, "-m", "hamcli", *words], cwd=tmp_path, env=environment(**more),
        capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip


def test_ddp_without_a_launcher_is_one_clear_line(tmp_path):
    done = ham(tmp_path, "sparsify", str(ALBERT), "--target", "0.5", "--parallel", "ddp")
    assert done.returncode == 2
    assert "error[HAM-E241]: there is one process only: training.parallel" in done.stderr
    assert "torchrun" in done.stderr


def test_a_command_of_one_process_says_so_once(tmp_path):
    first = ham(tmp_path, "recipe", "list", WORLD_SIZE="2", RANK="0")
    second = ham(tmp_path, "recipe", "list", WORLD_SIZE="2", RANK="1")
    assert (first.returncode, second.returncode) == (2, 2)
    assert "error[HAM-E249]" in first.stderr
    assert second.stderr == second.stdout == ""


@pytest.mark.parametrize("rank", [0, 1])
def test_one_that_never_comes_is_not_waited_for_long(monkeypatch, rank):
    from torch.distributed import TCPStore

    # as torchrun keeps it, in a process of its own
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    said = {
        "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2,
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port, "TORCHELASTIC_USE_AGENT_STORE": True,
    }  # fmt: skip
    for key, value in said.items():
        monkeypatch.setenv(key, str(value))
    monkeypatch.setattr(world, "JOIN_SECONDS", 0.5)
    with pytest.raises(ResourceError, match="E547"), world.joined("ddp", "cpu"):
        pass


@pytest.mark.parametrize("error", [TimeoutError("timed out"), RuntimeError("Connection closed")])
def test_who_fails_while_they_meet_says_so_and_tells_those_who_came(monkeypatch, error):
    for key, value in TWO.items():
        monkeypatch.setenv(key, value)
    told = []

    def fail(*_):
        raise error

    monkeypatch.setattr(world, "_init", lambda device, launch: None)
    monkeypatch.setattr(world, "_shake_hands", fail)
    monkeypatch.setattr(Mates, "end_together", lambda self, error: told.append(error))
    with pytest.raises(ResourceError, match="E547") as caught, world.joined("ddp", "cpu"):
        pass
    assert told == [caught.value]


MATE = """
import sys, time
from hamcli.parallel.mates import Mates
from hamcli.errors import InputRefused
rank, port = int(sys.argv[1]), int(sys.argv[2])
mates = Mates(rank, 3)
if rank == 0:
    print(mates.listen("secret"), flush=True)
    mates.accept(20)
else:
    mates.connect("127.0.0.1", port, "secret", 20)
print("met", flush=True)
if sys.argv[3] == "leaves":
    mates.leave()
    print("left", flush=True)
elif sys.argv[3] == "fails":
    error = InputRefused("E452", "no rows", "x.txt")
    assert mates.end_together(error) is None
    sys.exit(error.exit_code)
time.sleep(60)
"""


def mates(*roles):
    """Processes 0 to 2 that have met; each then waits in a call that never returns."""
    made, port = [], 0
    for rank, role in enumerate(roles):
        words = [sys.executable, "-c", MATE, str(rank), str(port), role]
        told = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        known = environment(RANK=str(rank), WORLD_SIZE="3")
        made.append(subprocess.Popen(words, env=known, **told))
        if rank == 0:
            port = int(made[0].stdout.readline())
    for one in made:
        assert one.stdout.readline() == "met\n"
    return made


def ends(process):
    """Exit code and the lines told."""
    told = process.communicate(timeout=30)[1]
    return process.returncode, [line for line in told.splitlines() if "error[" in line]


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_when_one_dies_all_end_and_one_speaks(victim):
    made = mates("waits", "waits", "waits")
    time.sleep(0.2)
    os.kill(made[victim].pid, signal.SIGKILL)
    found = [ends(one) for one in made]
    assert found.pop(victim)[0] == -signal.SIGKILL
    assert [code for code, _ in found] == [5, 5]
    (line,) = found[0][1]  # the first one that is left speaks
    assert found[1][1] == []
    assert f"error[HAM-E545]: a process of the run died: process {victim} of 3" in line


def test_when_one_fails_all_end_with_its_code_and_line():
    made = mates("waits", "waits", "fails")
    found = [ends(one) for one in made]
    assert [code for code, _ in found] == [4, 4, 4]
    assert found[0][1] == ["ham: error[HAM-E452]: no rows: x.txt"]
    assert found[1][1] == []


def test_who_leaves_is_not_dead():
    made = mates("waits", "leaves", "leaves")
    for one in made[1:]:
        assert one.stdout.readline() == "left\n"
    made[1].kill()
    made[2].kill()
    time.sleep(4)
    assert made[0].poll() is None
    made[0].kill()
    assert [one.communicate()[1] for one in made] == ["", "", ""]


@pytest.fixture
def pair():
    """Processes 0 and 1 of two that have met, in one process; strangers came first."""
    first, second = Mates(0, 2), Mates(1, 2)
    port = first.listen("secret")
    accepting = threading.Thread(target=first.accept, args=(20,))
    accepting.start()
    for said in (b'{"token": "guess", "rank": 1}\n', b"x" * (LONGEST + 1), b"[]\n", b""):
        with socket.create_connection(("127.0.0.1", port), timeout=20) as stranger:
            stranger.sendall(said)
            if said:
                with contextlib.suppress(ConnectionResetError):
                    assert stranger.recv(1) == b""  # shown the door
    second.connect("127.0.0.1", port, "secret", 20)
    accepting.join(20)
    yield first, second
    for one in (first, second):
        one.leave()
        for link in one._links.values():
            link.close()


def test_only_who_knows_the_token_may_enter(pair):
    assert list(pair[0]._links) == [1]
    for one in pair:
        (link,) = one._links.values()
        assert link.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)


def test_who_knocks_and_says_nothing_keeps_nobody_out(monkeypatch):
    monkeypatch.setattr(mates_, "HELLO_SECONDS", 0.2)
    first, second = Mates(0, 2), Mates(1, 2)
    port = first.listen("secret")
    accepting = threading.Thread(target=first.accept, args=(60,))
    accepting.start()
    with socket.create_connection(("127.0.0.1", port), timeout=20):
        second.connect("127.0.0.1", port, "secret", 20)
        accepting.join(5)
        assert list(first._links) == [1]
    accepting.join(20)
    for one in (first, second):
        one.leave()
        for link in one._links.values():
            link.close()


def test_a_collective_that_another_broke_is_told_as_what_broke_it(pair):
    first, second = pair
    first._is_leaving = second._is_leaving = True
    line = "ham: error[HAM-E001]: process 1: ValueError: odd"
    first._news = News(1, 1, "E001", (line,))
    first._heard.set()
    found = first.end_together(RuntimeError("Connection closed by peer"))
    assert (found.exit_code, found.line()) == (1, line)


def test_a_failure_is_told_in_the_words_of_who_failed(pair):
    first, second = pair
    first._is_leaving = second._is_leaving = True  # no listening thread ends this process
    first._news = News(1, 4, "E452", ("ham: error[HAM-E452]: no rows", "hint"))
    found = first.end_together(ResourceError("E501", "disk full"))
    assert isinstance(found, MateFailed)
    assert (found.exit_code, found.line(), len(found.lines())) == (
        4, "ham: error[HAM-E452]: no rows", 2,
    )  # fmt: skip
    # what meets all alike is told by each itself
    assert second.end_together(InputRefused("E452", "no rows")) is None
    first._news = News(1, 4, "E452", ("line",))
    assert first.end_together(InputRefused("E453", "no column")) is None


@pytest.mark.parametrize(
    ("error", "exit_code", "code"),
    [
        (MemoryError(), 5, "E543"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), 5, "E543"),
        (OSError(28, "No space left on device"), 5, "E506"),
        (ValueError("odd"), 1, "E001"),
    ],
)
def test_what_the_system_refuses_one_process_all_end_with(error, exit_code, code):
    found = error_of(_news_of(error, 1), 2)
    assert (found.exit_code, found.code) == (exit_code, code)
    assert f"HAM-{code}" in found.line()


def test_news_of_the_dead_is_an_error_of_the_machine():
    found = error_of(News(2), 4)
    assert (found.code, found.exit_code) == ("E545", 5)
    assert "process 2 of 4" in found.line()


@pytest.mark.parametrize(("size", "torn_down"), [("1", True), ("2", False)])
def test_of_several_processes_none_waits_for_the_interpreters_end(size, torn_down):
    # gloo's threads may abort it; what was asked to run at exit runs all the same
    program = """
import atexit
from hamcli.parallel.launch import end_process

class Left:
    def __del__(self):
        print("torn down", flush=True)

left = Left()
atexit.register(print, "at exit", flush=True)
end_process(75)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment(WORLD_SIZE=size), capture_output=True,
        text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 75
    assert done.stdout.split("\n")[:-1] == ["at exit", *["torn down"] * torn_down]
