"""The paper's claims about HAM's implicit bias, measured with our own step (arXiv 2506.02630)."""

from hamcli.theory.checks import run_checks
from hamcli.theory.records import Check, Claim, Results

__all__ = ["Check", "Claim", "Results", "run_checks"]
