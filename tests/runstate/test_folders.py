import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from hamcli.errors import ResourceError, UsageError
from hamcli.runstate import check_out, run_folder
from tests.runstate import pico


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "models" / "dense"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "config.json").write_text("{}")
    return folder


def refused(code, out, **given):
    with pytest.raises(UsageError) as caught:
        check_out(Path(out), **given)
    assert caught.value.code == code
    assert caught.value.exit_code == 2
    return caught.value


def overlaps(model):
    parent = model.parent
    yield "the same", model
    yield "with a slash and dots", f"{parent}/./x/../dense/"
    yield "inside", model / "out"
    yield "deep inside", model / "a" / "b"
    yield "around", parent
    yield "high above", parent.parent
    yield "by a link", parent / "link"
    yield "inside by a link", parent / "link" / "out"
    yield "inside by a dotted link", parent / "link" / "." / "out"
    yield "relative", os.path.relpath(model)
    yield "relative inside", os.path.relpath(model / "out")


def test_out_and_model_may_not_hold_each_other_by_any_spelling(model):
    (model.parent / "link").symlink_to(model)
    before = pico.contents(model)
    for name, out in overlaps(model):
        for spelled in (model, model.parent / "link", Path(os.path.relpath(model))):
            with pytest.raises(UsageError) as caught:
                check_out(Path(out), inputs=[spelled], overwrite=True)
            assert caught.value.code in ("E110", "E111"), name
    assert pico.contents(model) == before


def test_a_place_that_is_spelled_through_the_model_lies_in_it(model, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (model / "a").mkdir()
    (model / "a" / "inside").symlink_to(tmp_path / "elsewhere")
    refused("E110", model / "a" / "inside" / "out", inputs=[model])
    check_out(tmp_path / "elsewhere" / "out", inputs=[model / "config.json"])


def test_out_beside_the_model_or_sharing_the_start_of_its_name_is_fine(model):
    for name in ("dense-sparse", "dens", "dense.run2", "Dense2"):
        assert check_out(model.parent / name, inputs=[model]) == model.parent / name


def test_a_run_folder_that_is_the_model_is_refused(tmp_path, model):
    odd = model.parent / "out.run"
    model.rename(odd)
    refused("E110", odd.parent / "out", inputs=[odd], overwrite=True)
    refused("E110", odd.parent / "out", inputs=[odd / "model.safetensors"], overwrite=True)


def test_out_around_a_bare_file_is_refused_and_beside_it_is_fine(model):
    file = model / "model.safetensors"
    refused("E110", model, inputs=[file], overwrite=True)
    check_out(model / "sparse", inputs=[file])


def test_out_that_shares_files_with_the_model_by_hard_links_is_refused(tmp_path, model):
    out = tmp_path / "out"
    out.mkdir()
    os.link(model / "model.safetensors", out / "other-name")
    refused("E110", out, inputs=[model], overwrite=True)
    refused("E110", out, inputs=[model / "model.safetensors"], overwrite=True)


def test_a_link_in_the_model_does_not_lead_out_of_it(tmp_path, model):
    (tmp_path / "data").mkdir()
    (model / "sub").symlink_to(tmp_path / "data")
    refused("E110", model / "sub" / "out", inputs=[model])


def test_hard_links_to_something_else_are_fine(tmp_path, model):
    out = tmp_path / "out"
    out.mkdir()
    (tmp_path / "a").write_text("x")
    os.link(tmp_path / "a", out / "b")
    check_out(out, inputs=[model], overwrite=True)


def test_the_folder_where_a_cache_keeps_the_bytes_counts_as_the_model(tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    (blobs / "1234").write_bytes(b"weights")
    (snapshot / "model.safetensors").symlink_to("../../blobs/1234")
    refused("E110", blobs, inputs=[snapshot], overwrite=True)


def test_links_that_go_round_in_the_input_are_left_to_who_reads_it(tmp_path):
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "x").symlink_to("x")
    check_out(tmp_path / "out", inputs=[loop, tmp_path / "model", tmp_path / "missing"])


@pytest.mark.parametrize("kind", ["file", "link", "dangling", "loop", "fifo"])
def test_out_that_is_no_folder_is_refused(tmp_path, kind):
    out = tmp_path / "out"
    (tmp_path / "real").mkdir()
    if kind == "file":
        out.write_text("mine")
    elif kind == "fifo":
        os.mkfifo(out)
    else:
        out.symlink_to({"link": "real", "dangling": "nowhere", "loop": "out"}[kind])
    refused("E111", out, overwrite=True)


def test_a_run_folder_that_is_a_file_or_a_link_is_refused(tmp_path):
    run_folder(tmp_path / "a").write_text("mine")
    run_folder(tmp_path / "b").symlink_to(tmp_path)
    refused("E111", tmp_path / "a", overwrite=True)
    refused("E111", tmp_path / "b", overwrite=True)


@pytest.mark.parametrize("name", ["/", "x" * 256, "x" * 253, "nul\0"])
def test_a_name_that_cannot_be_a_folder_is_refused(tmp_path, name):
    refused("E111", tmp_path / name)


def test_out_that_holds_something_needs_overwrite(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    check_out(out)
    (out / ".hidden").touch()
    error = refused("E112", out)
    assert any("--overwrite" in hint for hint in error.hints)
    check_out(out, overwrite=True)


def test_a_missing_parent_is_told_with_the_command_that_makes_it(tmp_path):
    with pytest.raises(ResourceError) as caught:
        check_out(tmp_path / "a" / "b" / "out")
    assert caught.value.code == "E505"
    assert caught.value.hints == (f"mkdir -p {tmp_path / 'a' / 'b'}",)


def test_a_parent_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ResourceError, match="E505"):
        check_out(tmp_path / "file" / "out")


def test_odd_names_are_fine(tmp_path):
    for name in ("with space", "é-😀", "a\nb", "x" * 200, "-rf", ".hidden", "out.run"):
        assert check_out(tmp_path / name) == tmp_path / name


def test_links_on_the_way_to_out_are_resolved_once(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "way").symlink_to("real")
    assert check_out(tmp_path / "way" / "out") == tmp_path / "real" / "out"


def test_nothing_is_made_or_changed_by_a_check(tmp_path, model):
    before = sorted(tmp_path.rglob("*"))
    check_out(tmp_path / "out", inputs=[model])
    assert sorted(tmp_path.rglob("*")) == before


FOREIGN = """
import os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from hamcli.errors import HamError
from hamcli.runstate import RunState
if os.getuid() == 0:
    os.setgid(65534); os.setuid(65534)
try:
    RunState(Path(sys.argv[1]), overwrite=True)
except HamError as error:
    print(error.code, error.exit_code)
"""


@pytest.mark.parametrize("kind", ["parent", "out", "run"])
def test_a_folder_of_somebody_else_is_refused_before_anything_is_made(kind):
    base = Path(tempfile.mkdtemp())  # pytest's own folder lets nobody else in
    base.chmod(0o755 if kind == "parent" else 0o777)
    out = base / "out"
    if kind == "out":
        out.mkdir(mode=0o555)
        out.chmod(0o555)
    elif kind == "run":
        run_folder(out).mkdir()
        run_folder(out).chmod(0o555)
    if kind == "parent" and os.getuid() != 0:
        base.chmod(0o555)
    root = str(Path(__file__).parents[2])
    found = subprocess.run(
        [sys.executable, "-c", FOREIGN, str(out), root], capture_output=True, text=True, check=False
    )
    assert found.stdout.split() == ["E502", "5"], found.stderr
    assert not (out / "lock").exists()
    shutil.rmtree(base)


def test_a_deleted_working_folder_is_one_line(tmp_path):
    code = (
        "import os,sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path\n"
        "from hamcli.errors import HamError\nfrom hamcli.runstate import check_out\n"
        "os.mkdir('gone'); os.chdir('gone'); os.rmdir('../gone')\n"
        "try: check_out(Path('out'))\nexcept HamError as error: print(error.code)\n"
        "print(check_out(Path(sys.argv[2])))"
    )
    root = str(Path(__file__).parents[2])
    found = subprocess.check_output(
        [sys.executable, "-c", code, root, str(tmp_path / "out")], cwd=tmp_path, text=True
    )
    assert found.split("\n")[:2] == ["E505", str(tmp_path / "out")]
