"""Codes in the source and in docs/errors.md are the same, each on its room's page."""

import ast
import re
from pathlib import Path

import hamcli

PACKAGE = Path(hamcli.__file__).parent
PAGE = Path(__file__).parents[1] / "docs" / "errors.md"
CODE = re.compile(r"E[0-9]{3}")


def codes_of_the_source():
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                if CODE.fullmatch(node.value):
                    yield node.value
                else:  # a line that is put together by hand
                    yield from re.findall(r"HAM-(E[0-9]{3})", node.value)


def rows_of_the_page():
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 3 and CODE.fullmatch(cells[0]):
            yield cells


def test_every_code_is_on_the_page_once_with_meaning_and_cure():
    rows = list(rows_of_the_page())
    listed = [code for code, _, _ in rows]
    assert len(listed) == len(set(listed))
    assert all(meaning and cure for _, meaning, cure in rows)
    documented = set(re.findall(r"E[0-9]{3}", (PACKAGE / "errors.py").read_text()))
    assert set(codes_of_the_source()) - set(listed) - documented == set()


def test_the_page_has_no_code_that_is_gone():
    assert {code for code, _, _ in rows_of_the_page()} - set(codes_of_the_source()) == set()
