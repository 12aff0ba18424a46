"""Several processes that make one model: how they are launched, meet, and end together."""
