"""One process of a launch of `ham`; one of them is killed once a run checkpoint lies there.

OUT VICTIM and words of the command line.
"""

import os
import signal
import sys
import threading
import time
from pathlib import Path

from hamcli.cli import main


def die(out: str) -> None:
    checkpoints = Path(f"{out}.run") / "checkpoints"
    while not (checkpoints.is_dir() and any(checkpoints.iterdir())):
        time.sleep(0.05)
    Path(f"{out}.died").write_text(str(time.time()))
    os.kill(os.getpid(), signal.SIGKILL)


if os.environ["RANK"] == sys.argv[2]:
    threading.Thread(target=die, args=(sys.argv[1],), daemon=True).start()
main(["sparsify", *sys.argv[3:]])
