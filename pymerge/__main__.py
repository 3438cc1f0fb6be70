"""`python -m pymerge`: the same as the command `pymerge`."""

from .cli import main

if __name__ == "__main__":
    main(prog_name="python -m pymerge")
