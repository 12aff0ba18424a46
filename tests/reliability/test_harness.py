"""The harness itself: what it claims of a case is so."""

import os
import signal
import time

import pytest

from tests.reliability import faults, tiny
from tests.reliability.assertions import assert_clean_error
from tests.reliability.server import SECRET, Outcome

FINE = Outcome(5, "", "ham: error[HAM-E501]: full: /x: why (right)\n  hint: do\n", 0.0, 0)


def spoilt(**changes):
    fields = ("code", "stdout", "stderr", "seconds", "peak_rss")
    return Outcome(**{**{name: getattr(FINE, name) for name in fields}, **changes})


def test_a_clean_error_is_accepted():
    assert_clean_error(FINE, 5, "full: /x")
    assert_clean_error(spoilt(stdout='{"a": 1}', stderr="ham: warning: x\n" + FINE.stderr), 5, "")


@pytest.mark.parametrize(
    "changes",
    [
        {"code": 1},
        {"stderr": ""},
        {"stderr": FINE.stderr.replace("full", "other")},
        {"stderr": FINE.stderr.replace("E501", "5x1")},
        {"stderr": FINE.stderr + "more\n"},
        {"stderr": FINE.stderr + "  hint: x\n" * 3},
        {"stderr": FINE.stderr.replace("why", "why" * 100)},
        {"stderr": FINE.stderr.replace("why", "w\u202ehy")},
        {"stderr": FINE.stderr.replace("why", "w\x1bhy")},
        {"stderr": "Traceback (most recent call last)\n" + FINE.stderr},
        {"stderr": f"ham: {SECRET}\n" + FINE.stderr},
        {"stdout": SECRET},
        {"stdout": "half of {"},
        {"stderr": "Usage: ham\n" + FINE.stderr},
    ],
    ids=str,
)
def test_an_unclean_error_is_not(changes):
    with pytest.raises(AssertionError):
        assert_clean_error(spoilt(**changes), 5, "full: /x")


@pytest.mark.slow
def test_a_case_has_its_own_folder_environment_streams_and_limits(server, tmp_path):
    done = server.run(["recipe", "list"], cwd=tmp_path)
    assert (done.code, done.stderr) == (0, "")
    assert "quick" in done.stdout
    reader, writer = os.pipe()
    assert server.run(["--version"], stdout=writer).code == 0
    os.close(writer)
    assert os.read(reader, 100).startswith(b"ham ")
    os.close(reader)
    done = server.run(["inspect", "x" * 10], cwd=tmp_path)
    assert_clean_error(done, 4, "no such checkpoint")
    assert done.grown_bytes < 2**26
    assert done.seconds > 0
    here = "tests.reliability.test_harness"
    assert server.run([], before=f"{here}:end_with_the_variable", env={"CODE": "33"}).code == 33
    assert server.run([], before=f"{here}:end_with_the_variable", env={"CODE": None}).code == 44
    assert server.run([], before=f"{here}:end_with_the_umask", umask=0o27).code == 0o27
    assert server.run([], before=f"{here}:end_with_memory", limit_bytes=2**24).code == 7
    assert server.run([], before=f"{here}:end_with_memory").code == 8


@pytest.mark.slow
def test_a_case_that_hangs_is_ended(server):
    with pytest.raises(AssertionError, match="still running"):
        server.run([], before="tests.reliability.test_harness:hang", timeout=0.2)


@pytest.mark.slow
def test_the_calls_of_a_killed_case_are_told_up_to_the_fatal_one(server, tiny_folder, tmp_path):
    out = tmp_path / "o"
    words = tiny.sparsify(tiny_folder, out)
    whole = server.run(words, shim=faults.Fault(out))
    assert whole.code == 0
    assert whole.struck == ""
    out = tmp_path / "p"
    killed = server.run(tiny.sparsify(tiny_folder, out), shim=faults.killed(out, 20))
    assert killed.code == -signal.SIGKILL
    assert len(killed.calls) == 20
    assert killed.calls[-1] == killed.struck
    assert [call.split(" ")[0] for call in whole.calls[:20]] == [
        call.split(" ")[0] for call in killed.calls
    ]


def end_with_the_variable():
    os._exit(int(os.environ.get("CODE", "44")))


def end_with_the_umask():
    os._exit(os.umask(0))


def end_with_memory():
    import hamcli.cli

    hamcli.cli.main = try_memory


def try_memory(argv):
    try:
        bytearray(2**26)
    except MemoryError:
        os._exit(7)
    os._exit(8)


def hang():
    time.sleep(60)
