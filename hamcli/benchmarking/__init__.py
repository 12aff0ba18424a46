"""What the parts of `ham` cost on this machine."""
