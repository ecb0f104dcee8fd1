"""`python -m s2dcli`, and the entry point for `accelerate launch -m s2dcli ...`."""

from s2dcli.cli import main

if __name__ == "__main__":
    main()
