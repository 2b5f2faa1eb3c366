"""`python -m service --port N`: the same as `unperturb serve`."""

import typer

from service.main import serve

if __name__ == "__main__":
    typer.run(serve)
