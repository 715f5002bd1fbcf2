"""`python -m decay_pruning` is the command `decay-pruning`."""

from decay_pruning.cli import main

if __name__ == "__main__":
    main()
