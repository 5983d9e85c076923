"""`gptc doctor`: what this machine has, and whether everything on it works."""

from __future__ import annotations

import json

import click

_EPILOG = """\b
Examples:
  gptc doctor
  gptc doctor --json
"""


@click.command("doctor", epilog=_EPILOG)
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@click.pass_context
def doctor_command(ctx: click.Context, as_json: bool) -> None:
    """Show what this machine has, and test every layer on every device it can use.

    Exits with 1 if something that should work does not. What is merely not installed is no failure.
    """
    from gptc.bench import doctor

    report = doctor.examine()
    click.echo(json.dumps(report, indent=2) if as_json else doctor.table(report))
    ctx.exit(0 if report["ok"] else 1)
