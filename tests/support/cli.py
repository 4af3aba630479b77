"""Runs the command line in this process and looks at what came out."""

import json
from typing import Any

from typer.testing import CliRunner, Result

from hstu_cli.cli import app


def invoke(*arguments: object) -> Result:
    """Run `hstu` with these arguments; an exception that is no exit is raised here."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def record_of(*arguments: object) -> dict[str, Any]:
    """The JSON record of a run that must succeed."""
    result = invoke(*arguments, "--format", "json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def failure_of(exit_code: int, *arguments: object) -> str:
    """The message of a run that must end with this code: on stderr alone, and no traceback."""
    result = invoke(*arguments)
    assert result.exit_code == exit_code, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    return " ".join(result.stderr.replace("│", " ").split())
