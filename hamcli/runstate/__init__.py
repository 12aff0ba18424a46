"""A run on disk: lock, stage, commit, verify, resume. Imports torch only to handle tensors."""

from hamcli.runstate.checkpoints import Checkpoint
from hamcli.runstate.disk import check_space, disk_errors
from hamcli.runstate.finished import Finished, finished, remove_leftovers
from hamcli.runstate.folders import check_out, run_folder
from hamcli.runstate.identity import RunIdentity, installed_versions
from hamcli.runstate.run import RunState

__all__ = [
    "Checkpoint",
    "Finished",
    "RunIdentity",
    "RunState",
    "check_out",
    "check_space",
    "disk_errors",
    "finished",
    "installed_versions",
    "remove_leftovers",
    "run_folder",
]
