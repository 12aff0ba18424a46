"""`ham prune`: exact pruning without training, file by file or in memory."""
