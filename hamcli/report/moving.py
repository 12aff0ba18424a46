"""A report that goes with its model into another form: its files are those beside it.

Only a report as this version writes it is changed, so that going back gives the same bytes; a page
that somebody has edited stays as it is.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from hamcli.checkpoint.folder import sha256
from hamcli.errors import InputRefused
from hamcli.report import card, html
from hamcli.report.records import REPORT_NAME, FileRecord, Report, read_report

PAGES: dict[str, Callable[[Report], str]] = {
    html.HTML_NAME: html.render,
    card.CARD_NAME: card.render,
}


def restate(folder: Path, form: str) -> tuple[str, ...]:
    """Make the report in `folder`, copied from where its model was, say what lies here.

    Args:
        folder: A stage that holds the model in its new form and the report's three files as they
            were; a folder without a report stays as it is.
        form: dense or packed.

    Returns:
        The names of files that are left as they were, because they are not as this version writes
        them.

    Raises:
        OSError: The disk.
    """
    path = folder / REPORT_NAME
    if not path.is_file():
        return ()
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        report = read_report(path)
    except InputRefused:
        return (REPORT_NAME,)
    if report.to_json() != text:
        return (REPORT_NAME,)
    moved = replace(report, files=_files(report, folder), size=replace(report.size, format=form))
    _write(path, moved.to_json())
    left = []
    for name, render in PAGES.items():
        page = folder / name
        if not page.is_file():
            continue
        if page.read_bytes() == render(report).encode():
            _write(page, render(moved))
        else:
            left.append(name)
    return tuple(left)


def _files(report: Report, folder: Path) -> tuple[FileRecord, ...]:
    return tuple(
        FileRecord(one.path, (folder / one.path).stat().st_size, sha256(folder / one.path))
        for one in report.files
        if (folder / one.path).is_file()
    )


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")
