"""One process of a run that gets a SIGTERM at one of its steps: STEP OUT and words of sparsify."""

import os
import sys

from hamcli.errors import HamError
from hamcli.pipeline import sparsify
from hamcli.progress import Silent
from tests.parallel.pico import QUICK
from tests.stopping import StopsAt


def main() -> None:
    step, out, steps, parallel, victim = sys.argv[1:6]
    mine = os.environ.get("RANK", "0") == victim
    try:
        sparsify(
            model="m", data="smiles.txt", task="causal-lm", target=0.8, steps=int(steps),
            parallel=parallel, out=out, settings=QUICK,
            progress=StopsAt(int(step)) if mine else Silent(),
        )  # fmt: skip
    except HamError as error:
        sys.stderr.write(error.line() + "\n")
        os._exit(error.exit_code)


main()
