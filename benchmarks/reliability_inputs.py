"""Run the reliability tests of inputs and numbers (F to K) once and write their figures down.

    python benchmarks/reliability_inputs.py results/DATE-reliability-inputs.json [LANE ...]

LANE is `commit` (what runs on every commit) or `nightly`; both by default. A file that is there is
added to. Seconds are those of a wall clock, so a busy machine stretches them; each figure is what
the test itself counted.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
FILES = ["f_models", "g_recipes", "h_execution", "i_numerics", "j_numbers", "k_terminal"]
LANES = {"commit": "not nightly and not gpu", "nightly": "nightly and not gpu"}


def run(lane: str) -> dict[str, Any]:
    """Test -> cases, those that passed, seconds and figure."""
    with tempfile.TemporaryDirectory() as place:
        figures, junit = Path(place) / "figures.json", Path(place) / "junit.xml"
        files = [f"tests/reliability/test_{name}.py" for name in FILES]
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "pytest",
                "-q",
                "-m",
                LANES[lane],
                f"--junitxml={junit}",
                *files,
            ],
            cwd=ROOT,
            env={**os.environ, "HAM_RELIABILITY_FIGURES": str(figures)},
        )
        told = json.loads(figures.read_text()) if figures.exists() else {}
        found: dict[str, Any] = {}
        for case in ElementTree.parse(junit).iter("testcase"):
            name = case.attrib["name"].partition("[")[0]
            row = found.setdefault(name, {"cases": 0, "passed": 0, "seconds": 0.0})
            row["cases"] += 1
            row["passed"] += not {one.tag for one in case} & {"failure", "error", "skipped"}
            row["seconds"] = round(row["seconds"] + float(case.attrib["time"]), 1)
        for name, figure in told.items():
            found[name.partition("[")[0]].setdefault("figures", {})[name] = figure
    print(f"{lane}: pytest ended with {done.returncode}")
    return found


def main() -> None:
    """Run the lanes and write them beside what is there."""
    path, lanes = Path(sys.argv[1]), sys.argv[2:] or list(LANES)
    document = json.loads(path.read_text()) if path.exists() else {}
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    document["environment"] = {
        "commit": commit.stdout.strip(),
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "safetensors", "pyyaml")},
        "load_average_before": [round(one, 1) for one in os.getloadavg()],
    }
    for lane in lanes:
        began = time.monotonic()
        tests = run(lane)
        seconds = round(time.monotonic() - began)
        document[lane] = {"seconds": seconds, "tests": dict(sorted(tests.items()))}
        path.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
