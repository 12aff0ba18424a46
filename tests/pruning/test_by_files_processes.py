"""Pruning and exporting by files as processes: stopped, on a full disk, with a large model."""

import os
import resource
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from tests.pruning.test_by_files import ALBERT, RESNET, by_files

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def command(*words):
    return [sys.executable, "-m", "hamcli", *map(str, words)]


def test_neither_pruning_nor_inspecting_loads_torch(tmp_path):
    words = [
        ["prune", str(RESNET), "--target", "0.9", "--out", "out"],
        ["prune", str(ALBERT), "--pattern", "2:4", "--out", "packed", "--format", "packed"],
        ["inspect", str(RESNET)],
        ["inspect", str(ALBERT), "--values", "--json"],
    ]
    code = (
        "import sys\nfrom hamcli.cli import main\n"
        f"for words in {words!r}:\n"
        "    try:\n        main(words)\n"
        "    except SystemExit as stop:\n        assert not stop.code, words\n"
        "assert not {'torch', 'transformers', 'datasets', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run(
        [sys.executable, "-c", code], check=True, env=ENVIRONMENT, cwd=tmp_path, capture_output=True
    )


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A bare file that takes a second or so."""
    folder = tmp_path_factory.mktemp("large")
    values = torch.randn(2048, 8192, generator=torch.Generator().manual_seed(0))
    save_file({f"w{i}": values + i for i in range(3)}, folder / "m.safetensors")
    return folder / "m.safetensors"


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 75), (signal.SIGKILL, -9)],
    ids=["INT", "TERM", "KILL"],
)
def test_whatever_stops_it_leaves_nothing_half(large, number, code, tmp_path):
    out = tmp_path / "out"
    words = command("prune", large, "--target", "0.9", "--out", out, "-q")
    process = subprocess.Popen(words, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    while process.poll() is None:
        stages = list(tmp_path.glob("out.run/.stage-*/m.safetensors"))
        if stages and stages[0].exists():
            process.send_signal(number)
            break
    _, told = process.communicate(timeout=120)
    assert process.returncode == code, told
    assert not out.exists()
    if number != signal.SIGKILL:
        assert "nothing is kept" in told
        assert list(tmp_path.iterdir()) == []
    else:
        by_files(RESNET, out)  # another model to the same place sweeps what is left
        assert (out / "report.json").exists()
        assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("is_folder", [True, False], ids=["folder", "file"])
def test_ctrl_c_in_an_export_leaves_nothing(large, is_folder, tmp_path):
    source, out = large.parent if is_folder else large, tmp_path / "out.safetensors"
    if is_folder:
        source = tmp_path / "model"
        source.mkdir()
        os.link(large, source / "model.safetensors")
        before = [source]
    else:
        before = []
    words = command("export", source, "--format", "packed", "--out", out, "-q")
    process = subprocess.Popen(
        words, env={**ENVIRONMENT, "HAM_NATIVE": "0"}, stderr=subprocess.PIPE, text=True
    )
    while process.poll() is None:
        if len(list(tmp_path.iterdir())) > len(before):
            process.send_signal(signal.SIGINT)
            break
    _, told = process.communicate(timeout=120)
    assert process.returncode == 130, told
    assert list(tmp_path.iterdir()) == before


def test_a_full_disk_leaves_nothing(large, tmp_path):
    limit = 64 * 2**20
    done = subprocess.run(
        command("prune", large, "--target", "0.9", "--out", tmp_path / "out", "-q"),
        env=ENVIRONMENT, capture_output=True, text=True,
        preexec_fn=lambda: (
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN),
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        ),
    )  # fmt: skip
    assert done.returncode == 5
    assert "HAM-E501" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_model(tmp_path):
    values = torch.randn(4096, 8192, generator=torch.Generator().manual_seed(0))
    save_file({f"w{i}": (values + i).bfloat16() for i in range(6)}, tmp_path / "m.safetensors")
    code = (
        "from hamcli.cli import main\n"
        f"try:\n    main({['prune', str(tmp_path / 'm.safetensors'), '--out', 'out', '-q']!r})\n"
        "except SystemExit as stop:\n    assert not stop.code\n"
        # getrusage would tell the peak of the process that started this one, if that was higher
        "told = dict(line.split(':', 1) for line in open('/proc/self/status'))\n"
        "print(told['VmHWM'].split()[0])"
    )
    launched = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, check=True, env=ENVIRONMENT, cwd=tmp_path,
    )  # fmt: skip
    assert int(launched.stdout.split()[-1]) < 200 * 1024
