"""The optimizer: HAM around AdamW, Adam or SGD, and its mirror step alone."""

from hamcli.optim.cpu import ham_step_
from hamcli.optim.ham import HAM, ExponentStatistics

__all__ = ["HAM", "ExponentStatistics", "ham_step_"]
