"""HAM's optimizer. Imports nothing else of ours; could be lifted out as a package."""

from hamcli.optim.ham import HAM, ExponentStatistics, ham_step_

__all__ = ["HAM", "ExponentStatistics", "ham_step_"]
