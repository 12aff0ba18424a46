"""G: recipes that are attacks or mistakes; code 2, one line a fault, with its place."""

import json
import random
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from hamcli.errors import HamError, RecipeError
from hamcli.recipe import read_recipe, recipe_layer, shipped_names
from hamcli.recipe.reading import shipped_text
from hamcli.recipe.schema import Recipe
from hamcli.recipe.text import RecipeLoader, parse
from tests.reliability import hostile_recipes, tiny, witness
from tests.reliability.assertions import assert_clean_error
from tests.reliability.server import answer_of

PLACE = re.compile(r"\w+\.yaml:\d+:\d+")
CODE = re.compile(r"ham: error\[HAM-(E2\d\d)\]: ")
SECONDS, GROWTH = 0.1, 50 * 2**20


def faults(text: str | bytes) -> list[str]:
    """The lines of a recipe's error; none when it is accepted."""
    try:
        read_recipe([parse(text, "r.yaml")])
    except RecipeError as error:
        return error.lines()
    return []


def assert_told(lines: list[str]) -> None:
    """Each fault is one printable line of limited length with a code of recipes, hints apart."""
    for line in lines:
        assert line.isprintable(), line
        assert len(line) <= 300, line
        assert CODE.match(line) or line.startswith("  hint: "), line


# ---- G1 ----


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """How every recipe of the corpus ended, read in a fork of its own without torch."""
    return answer_of("hostile_recipes", tmp_path_factory.mktemp("r"))


def test_G1_corpus(corpus: dict[str, Any], figure: Any) -> None:
    refused = [name for name in corpus if name not in hostile_recipes.ACCEPTED]
    for name in refused:
        found = corpus[name]
        assert (found["status"], found["code"][:2]) == (0, "E2"), (name, found)
        assert_told(found["lines"])
        if name not in {*hostile_recipes.WHOLE_FILE, *hostile_recipes.SPECIAL}:
            assert PLACE.search(found["lines"][0]), (name, found["lines"][0])
        assert "hf_abcdefgh" not in "".join(found["lines"])
    slowest = max(corpus, key=lambda name: corpus[name]["seconds"])
    figure(
        hostile_recipes=len(refused),
        slowest=slowest,
        slowest_cpu_seconds=round(corpus[slowest]["seconds"], 3),
        greatest_growth_bytes=max(found["growth"] for found in corpus.values()),
    )
    assert len(refused) >= 60
    assert corpus[slowest]["seconds"] <= SECONDS, slowest
    assert all(found["growth"] <= GROWTH for found in corpus.values())


def test_G1_what_is_accepted_means_what_it_says(corpus: dict[str, Any]) -> None:
    for name, (text, target) in hostile_recipes.ACCEPTED.items():
        assert (corpus[name]["status"], corpus[name]["code"]) == (0, ""), corpus[name]
        raw = text.encode() if isinstance(text, str) else text
        assert read_recipe([parse(raw, "r.yaml")]).recipe.sparsity.target == target


def test_G1_a_plain_reader_is_hurt_by_the_corpus() -> None:
    """The control: three attacks, which the safe loader of PyYAML alone lets through."""
    bomb = yaml.safe_load(hostile_recipes.alias_bomb(4))
    assert len(json.dumps(bomb)) > 50 * len(hostile_recipes.alias_bomb(4))
    assert yaml.safe_load("training: {steps: 1:30}")["training"]["steps"] == 90
    duplicate = hostile_recipes.REFUSED["duplicate section"]
    assert yaml.safe_load(duplicate)["sparsity"]["target"] == 0.6


# ---- G2 ----


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        ("1e-5", 1e-5), ("1E-5", 1e-5), ("5e4", 5e4), (".5", 0.5), ("5.", 5.0), ("+1.5", 1.5),
        ("-0.0", -0.0), ("0", 0), ("-7", -7), ("1_000", "1_000"), ("0777", "0777"),
        ("0x10", "0x10"), ("0o17", "0o17"), ("1:30", "1:30"), ("no", "no"), ("off", "off"),
        ("yes", "yes"), ("True", "True"), ("true", True), ("false", False), ("~", None),
        ("null", None), ("", None), (".nan", ".nan"), (".inf", ".inf"), ("1e999", float("inf")),
        ("'0.9'", "0.9"), ("90%", "90%"), ("90", 90), ("2024-99-99", "2024-99-99"),
        ("1e", "1e"), ("e5", "e5"), (".", "."), ("1.e5", 1e5), ("--1", "--1"),
    ],
)  # fmt: skip
def test_G2_numbers_mean_numbers(text: str, meaning: Any) -> None:
    found = parse(f"v: {text}", "r.yaml").data["v"]
    assert found == meaning
    assert type(found) is type(meaning)
    assert str(found) == str(meaning)  # -0.0 is not 0.0


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("90", "did you mean 0.9?"), ("90%", "did you mean 0.9?"), ("'0.9'", "remove the quotes"),
        ("1.5", "did you mean 0.015?"), (".nan", "finite"), (".inf", "finite"), ("1e999", "finite"),
        ("true", "number"), ("no", "number"), ("~", "number"), ("-0.1", "at least 0"),
        ("[0.9]", "number"), ("{a: 1}", "number"),
    ],
)  # fmt: skip
def test_G2_what_is_no_sparsity_is_refused_with_what_was_meant(text: str, right: str) -> None:
    (line,) = faults(f"sparsity: {{target: {text}}}")
    assert right in line
    assert "r.yaml:1:12: sparsity.target" in line


# ---- G3 ----

SCHEMA = Recipe.model_json_schema()
JUNK: list[Any] = [
    None, True, False, 0, 1, -1, 7, 10**30, 0.5, 90, 1e-300, 1e300, "", "auto", "x" * 300,
    "\x1b[2J", "${HOME}", [], [1], ["*"], {}, {"a": 1}, [[[]]], {"a": {"b": []}}, "no", 1.0, "1e-3",
]  # fmt: skip


def drawn_section(name: str, chance: random.Random) -> Any:
    if chance.random() < 0.03:
        return chance.choice(JUNK)
    place = SCHEMA["properties"][name]["$ref"].rpartition("/")[2]
    known = SCHEMA["$defs"][place]["properties"]
    keys = chance.sample(sorted(known), chance.randrange(min(4, len(known)) + 1))
    section = {key: drawn_value(known[key], chance) for key in keys}
    if chance.random() < 0.1:
        section[chance.choice(["targt", "a b", "x" * 200, "\u202e", "__class__", ""])] = 1
    return section


def drawn_value(known: dict[str, Any], chance: random.Random) -> Any:
    """Mostly of the right type, often out of range."""
    if chance.random() < 0.2:
        return chance.choice(JUNK)
    member = chance.choice(known.get("anyOf", [known]))
    if "$ref" in member:
        place = SCHEMA["$defs"][member["$ref"].rpartition("/")[2]]["properties"]
        return {key: drawn_value(place[key], chance) for key in sorted(place)[:2]}
    if "enum" in member or "const" in member:
        return chance.choice(member.get("enum", [member.get("const")]))
    drawn: dict[str, Any] = {
        "number": chance.choice([0.0, 0.1, 0.5, 0.9, 1.0, 1.5, -0.1]),
        "integer": chance.choice([0, 1, 2, 8, 1000, 2**31]),
        "string": chance.choice(["auto", "2:4", "*", "cpu", "5GB", "block:4x4"]),
        "boolean": True,
        "array": [0.5, 0.9],
    }
    return drawn.get(member.get("type", ""))


def test_G3_schema_fuzz(figure: Any) -> None:
    chance = random.Random(0)
    accepted = refused = 0
    for _ in range(2000):
        sections = chance.sample(sorted(SCHEMA["properties"]), chance.randrange(1, 4))
        recipe = {name: drawn_section(name, chance) for name in sections}
        lines = faults(json.dumps(recipe))
        assert_told(lines)
        if lines:
            refused += 1
            assert all(PLACE.search(line) for line in lines if CODE.match(line)), lines
        else:
            accepted += 1
    figure(generated=2000, accepted=accepted, refused=refused)
    # had all gone one way, the test would prove little
    assert accepted > 200
    assert refused > 500


def test_G3_a_misspelt_key_names_the_right_one(figure: Any) -> None:
    """Single edits of shipped recipes: one letter less in a key."""
    chance = random.Random(0)
    keys = [one for name in shipped_names() for one in keys_of(shipped_text(name))]
    helped = 0
    for _ in range(250):
        text, key, at = chance.choice(keys)
        gone = chance.randrange(len(key))
        wrong = key[:gone] + key[gone + 1 :]
        lines = faults(text[:at] + wrong + text[at + len(key) :])
        assert lines, wrong
        assert_told(lines)
        assert lines[0].count(".yaml:") == 1
        helped += f'did you mean "{key}"?' in "".join(lines)
    figure(misspelt=250, right_key_named=helped)
    assert helped > 240  # two keys may be as near


def test_G3_a_repeated_line_is_told_with_both(figure: Any) -> None:
    chance = random.Random(0)
    texts = [shipped_text(name) for name in shipped_names()]
    for _ in range(250):
        lines = chance.choice(texts).splitlines()
        at = chance.choice([n for n, line in enumerate(lines) if re.match(r" *\w+:", line)])
        indent = len(lines[at]) - len(lines[at].lstrip())
        end = at + 1
        while end < len(lines) and len(lines[end]) - len(lines[end].lstrip()) > indent:
            end += 1
        again = [*lines[:end], *lines[at:end], *lines[end:]]
        (line,) = faults("\n".join(again) + "\n")
        assert "E204" in line
        assert f"r.yaml:{end + 1}:{indent + 1}" in line
        assert f"first on line {at + 1}" in line
    figure(repeated=250)


def keys_of(text: str) -> list[tuple[str, str, int]]:
    """Every key of a recipe of at least four letters, with its position."""
    found = []

    def walk(node: yaml.Node) -> None:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                if len(key.value) > 3:
                    found.append((text, key.value, key.start_mark.index))
                walk(value)

    walk(RecipeLoader(text, "r.yaml").get_single_node())
    return found


# ---- G4 ----


@pytest.mark.slow
@pytest.mark.parametrize(
    ("include", "exclude", "pattern"),
    [
        ("[encoder.*]", "null", "names 0 of|matche[sd] (nothing|0)"),
        ("[model.layers.0.self_attn.qproj]", "null", r"nearest.*q_proj"),
        ("['*norm*']", "[]", "names 0 of"),
        ("['(a+)+$']", "null", "nothing|0 of"),
        ("['*']", "['*']", "no weights|nothing is left|none"),
        ("['*']", "[nothing.here]", "exclude"),
    ],
)
def test_G4_targets(
    server: Any, tiny_folder: Any, tmp_path: Any, include: str, exclude: str, pattern: str
) -> None:
    words = [f"targets.include={include}", f"targets.exclude={exclude}"]
    argv = tiny.sparsify(
        tiny_folder, tmp_path / "out", *(w for one in words for w in ("--set", one))
    )
    assert_clean_error(server.run(argv, cwd=tmp_path), 2, pattern)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("include", ["['*', 'model.layers.*']", "['*', '*']", "['*', '*_proj']"])
def test_G4_overlapping_globs_count_a_weight_once(
    server: Any, tiny_folder: Any, include: str
) -> None:
    argv = ["plan", str(tiny_folder / "untied"), "--recipe", str(tiny_folder / "recipe.yaml")]
    alone, twice = (
        json.loads(server.run([*argv, "--json", "--set", f"targets.include={one}"]).stdout)
        for one in ("['*']", include)
    )
    assert alone["prunable"] == twice["prunable"] > 0
    assert alone["targets"] == twice["targets"]


def test_G4_a_glob_is_no_regular_expression_that_hangs() -> None:
    from hamcli.sparsity.globs import matches, nearest

    names = [f"model.layers.{layer}.{'a' * 200}.weight" for layer in range(100)]
    for pattern in ("*a" * 60 + "b", "(a+)+$", "[" * 200, "*" * 2000 + "b", "?" * 5000):
        assert not matches(pattern, names)  # the test's own time limit is the bound
        assert len(nearest(pattern, names)) <= 3


# ---- G5 ----

CODE_LIKE = [
    "eval(\"__import__('os').system('touch canary')\")", "__import__('os')", "${HOME}",
    "$(touch canary)", "`touch canary`", "{{ 7 * 7 }}", "{% include '/etc/passwd' %}", "%(HOME)s",
    "os.system", "numpy.random:default_rng", "!include /etc/passwd", "!!python/name:os.system",
    "../../canary",
    "file:///etc/passwd", "http://127.0.0.1:9/x", "s3://bucket/x", "|touch canary", "~/canary",
]  # fmt: skip
OFFLINE = {"HF_HUB_OFFLINE": "1"}  # a name may be one of the hub's; asking for it is no attack
SCRATCH = Path(tempfile.gettempdir())
TEXT_KEYS = {
    "model.id": CODE_LIKE,
    "model.config": CODE_LIKE,
    "data.text": CODE_LIKE,
    "data.split": CODE_LIKE[::3],
    "data.source": CODE_LIKE[1::3],
    "data.evaluation": CODE_LIKE[2::3],
}


@pytest.mark.slow
def test_G5_no_code(server: Any, tiny_folder: Any, tmp_path: Any, figure: Any) -> None:
    """Whatever a text value looks like, it is a name of something that is not there."""
    base = ["plan", "--recipe", str(tiny_folder / "recipe.yaml")]
    tried = 0
    for key, texts in TEXT_KEYS.items():
        for text in texts:
            model = [] if key == "model.id" else [str(tiny_folder / "untied")]
            word = f"{key}={json.dumps(text)}"
            done, seen = witness.run(server, [*base, *model, "--set", word], tmp_path, env=OFFLINE)
            tried += 1
            # a config is not looked at where the folder has one; a column is one that is not there
            assert done.code in (0, 2, 4), (word, done.stderr)
            if done.code:
                assert_clean_error(done, done.code, "")
            assert not seen.processes
            assert not seen.sockets, (word, seen.sockets)
            assert not [path for path in seen.opened if path.endswith(("passwd", "canary"))]
            assert seen.written_outside(SCRATCH) == []
    assert list(tmp_path.iterdir()) == []
    figure(tried=tried, canaries=0, sockets=0, processes=0)


@pytest.mark.parametrize(
    "text",
    [
        "_target_: os.system", "sparsity: {_target_: os.system}", "defaults: [other]",
        "include: other.yaml", "extends: quick", "import: os", "sparsity: {target: '${TARGET}'}",
        "sparsity: {target: '{{ 0.5 }}'}", "sparsity: {target: eval(0.5)}",
        "optimizer: {base: torch.optim.AdamW}", "sparsity: {method: os.system}",
        "training: {device: 'cpu; touch canary'}", "sparsity: {pattern: '2:4; x'}",
        "export: {max_shard_size: '`x`'}", "sparsity: {score: 'lambda x: x'}",
    ],
)  # fmt: skip
def test_G5_import_paths_and_templates_are_refused(text: str) -> None:
    lines = faults(text)
    assert lines
    assert_told(lines)


def test_G5_the_environment_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TARGET", "0.123")
    for text in ("${TARGET}", "$TARGET", "%(TARGET)s", "{{ TARGET }}", "<<TARGET>>"):
        try:
            recipe = read_recipe([parse(f"data: {{source: '{text}'}}", "r.yaml")]).recipe
        except HamError:
            continue
        assert recipe.data.source == text


def test_every_shipped_recipe_is_accepted() -> None:
    for name in shipped_names():
        read_recipe([recipe_layer(name)])


@pytest.mark.slow
def test_G2_a_pattern_and_a_target_that_contradict_it_are_told(
    server: Any, tiny_folder: Any, tmp_path: Any
) -> None:
    both = tmp_path / "both.yaml"
    both.write_text("sparsity: {pattern: '2:4', target: 0.9}\n")
    model = str(tiny_folder / "untied")
    for more in (["--recipe", str(both)], ["--pattern", "2:4", "--target", "0.9"]):
        assert_clean_error(server.run(["plan", model, *more]), 2, "E209.*fixes the sparsity at 0.5")
    done = server.run(["plan", model, "--pattern", "2:4", "--json"])
    found = json.loads(done.stdout)
    assert found["zeros"] * 2 == found["prunable"]
