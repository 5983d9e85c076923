"""`gptc doctor`: hardware, libraries and self-tests of this machine."""

from __future__ import annotations

import json

import click

from gptc.cli.command import Command

_EPILOG = """\b
Examples:
  gptc doctor
  gptc doctor --json
"""


@click.command("doctor", cls=Command, epilog=_EPILOG)
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@click.pass_context
def doctor_command(ctx: click.Context, as_json: bool) -> None:
    """Show this machine's hardware and libraries, and test every layer on every device.

    The exit code is 1 if a test fails. A missing optional package is not a failure.
    """
    from gptc.bench import doctor

    report = doctor.examine()
    click.echo(json.dumps(report, indent=2) if as_json else doctor.table(report))
    ctx.exit(0 if report["ok"] else 1)
