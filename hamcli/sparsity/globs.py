"""Globs over dotted names: matching, and the nearest thing to one that matches nothing."""

import difflib
import glob
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase


def matches(pattern: str, names: Iterable[str]) -> bool:
    """Whether the glob matches one of the names; `*` crosses dots, upper case counts."""
    return any(fnmatchcase(name, pattern) for name in names)


def is_literal(pattern: str) -> bool:
    """Whether the pattern is a plain name."""
    return glob.escape(pattern) == pattern


def literal(name: str) -> str:
    """A pattern that matches this name only."""
    return glob.escape(name)


def covering_globs(names: Sequence[str], others: Sequence[str]) -> list[str]:
    """Few globs that match all of `names` and none of `others`: stars for numbers if they can."""
    globs = []
    for name in names:
        starred = _numbers_as_stars([name])[0]
        globs.append(
            literal(name) if any(matches(starred, [other]) for other in others) else starred
        )
    return list(dict.fromkeys(globs))


def nearest(pattern: str, names: Sequence[str]) -> list[str]:
    """Up to three patterns or names close to `pattern`, each of which matches; best first."""
    return list(dict.fromkeys([*_longer(pattern, names), *_respelt(pattern, names)]))[:3] or (
        difflib.get_close_matches(pattern, _numbers_as_stars(names), n=3, cutoff=0.5)
    )


def _longer(pattern: str, names: Sequence[str]) -> list[str]:
    """The pattern with what it lacks in front or behind."""
    tries = [f"{pattern}.*", f"*.{pattern}", f"*.{pattern}.*"]
    return [longer for longer in tries if matches(longer, names)][:1]


def _respelt(pattern: str, names: Sequence[str]) -> list[str]:
    """The pattern with each unknown word replaced by the nearest known one."""
    words = sorted({word for name in names for word in name.split(".")})
    respelt = []
    for word in pattern.split("."):
        if not is_literal(word) or word in words:
            respelt.append(word)
            continue
        close = difflib.get_close_matches(word, words, n=1)
        respelt.append(close[0] if close else word)
    candidate = ".".join(respelt)
    return [candidate] if matches(candidate, names) else []


def _numbers_as_stars(names: Iterable[str]) -> list[str]:
    """`layer.0.query` and `layer.1.query` become one `layer.*.query`."""
    shapes = (
        ".".join("*" if word.isdigit() else word for word in name.split(".")) for name in names
    )
    return list(dict.fromkeys(shapes))
