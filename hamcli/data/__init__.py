"""Data for training and measuring: a file, a folder, a dataset id or a built-in sample → batches.

Every batch is a pure function of its number, so a resumed run sees what it would have seen.
"""

from hamcli.data.batches import Data, Examples, batch, evaluation_batches
from hamcli.data.opening import label_names, open_data

__all__ = ["Data", "Examples", "batch", "evaluation_batches", "label_names", "open_data"]
