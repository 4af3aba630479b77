"""`python -m hstu_cli` is the same as `hstu`."""

from hstu_cli.cli import app

if __name__ == "__main__":
    app(prog_name="hstu")
