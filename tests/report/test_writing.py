import pytest
from report_samples import SAMPLES, report

from hamcli.report.records import read_report
from hamcli.report.writing import write_report


@pytest.mark.parametrize("sample", SAMPLES)
def test_three_files_are_written_and_read_back(tmp_path, sample):
    paths = write_report(SAMPLES[sample](), tmp_path)
    assert sorted(path.name for path in paths) == ["README.md", "report.html", "report.json"]
    assert sorted(tmp_path.iterdir()) == sorted(paths)
    assert read_report(tmp_path) == SAMPLES[sample]()


def test_equal_reports_give_equal_bytes(tmp_path):
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
        write_report(report(), folder)
    for name in ("README.md", "report.html", "report.json"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()


def test_a_missing_folder_is_an_error_not_a_new_folder(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_report(report(), tmp_path / "absent")
