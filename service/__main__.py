"""`python -m unperturb.service --port N`: the same as `unperturb serve --port N`."""

import typer

from unperturb.service.cli import serve

if __name__ == "__main__":
    typer.run(serve)
