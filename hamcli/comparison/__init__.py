"""`ham compare`: methods, sparsities and seeds under one budget, tuned alike, measured in pairs."""

from hamcli.comparison.comparing import compare
from hamcli.comparison.grid import Grid
from hamcli.comparison.records import Comparison

__all__ = ["Comparison", "Grid", "compare"]
