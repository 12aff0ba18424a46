"""One process of a launch of `ham`; one of them is killed once a run checkpoint lies there.

OUT VICTIM and words of the command line; VICTIM is a rank, or machine:RANK, whose launcher dies
too.
"""

import os
import signal
import sys
import threading
import time
from pathlib import Path

from hamcli.cli import main


def die(out: str, with_launcher: bool) -> None:
    checkpoints = Path(f"{out}.run") / "checkpoints"
    while not (checkpoints.is_dir() and any(checkpoints.iterdir())):
        time.sleep(0.05)
    Path(f"{out}.died").write_text(str(time.time()))
    if with_launcher:
        os.kill(os.getppid(), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


what, _, victim = sys.argv[2].rpartition(":")
if os.environ["RANK"] == victim:
    threading.Thread(target=die, args=(sys.argv[1], what == "machine"), daemon=True).start()
main(["sparsify", *sys.argv[3:]])
