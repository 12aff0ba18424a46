"""`python -m hamcli`, and the console script `ham`."""

import sys


def main() -> None:
    """Run the command line; Ctrl-C while it loads ends as quietly as later."""
    try:
        from hamcli.cli import main as run
    except KeyboardInterrupt:
        sys.stderr.write("\nham: interrupted before anything was saved\n")
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
