"""The three files of a report, written into a folder that the caller stages and makes durable."""

from pathlib import Path

from hamcli.report import card, html
from hamcli.report.records import REPORT_NAME, Report


def write_report(report: Report, folder: Path) -> tuple[Path, ...]:
    """Write `report.json`, `report.html` and `README.md` into `folder`.

    Args:
        report: What to write.
        folder: An existing folder; files of these names in it are replaced.

    Returns:
        The paths written.

    Raises:
        OSError: The disk is full or the folder may not be written.
    """
    pages = {
        REPORT_NAME: report.to_json(),
        html.HTML_NAME: html.render(report),
        card.CARD_NAME: card.render(report),
    }
    for name, text in pages.items():
        (folder / name).write_text(text, encoding="utf-8", newline="\n")
    return tuple(folder / name for name in pages)
