"""`python -m hamcli`, and the console script `ham`."""

from hamcli.cli import main

if __name__ == "__main__":
    main()
