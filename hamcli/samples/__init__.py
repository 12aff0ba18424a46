"""Public-domain sample data."""
