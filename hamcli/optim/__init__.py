"""The optimizer: HAM around AdamW, Adam or SGD, and its mirror step alone."""

from hamcli.optim.ham import HAM, ExponentStatistics
from hamcli.optim.mirror import ham_step_

__all__ = ["HAM", "ExponentStatistics", "ham_step_"]
