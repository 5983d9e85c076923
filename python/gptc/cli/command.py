"""Commands whose errors say how to spell a word that they do not take."""

from __future__ import annotations

from collections.abc import Sequence

import click

from gptc.files.elsewhere import as_typed, instead
from gptc.files.words import quoted

_WORDS = ("model", "data", "prompt", "preset")  # options whose name is easily left out
_READ = ("PATH", "FILE", "DIR", "MODEL")  # placeholders of paths
_WRITTEN = ("out", "runs", "table")  # paths that are not read


class Command(click.Command):
    """A command that names the option of a word without one, or how to do without an option."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parses the command line. UsageError for words that are left."""
        ctx.allow_extra_args = True  # click's error would not say what to type
        given = list(args)
        try:
            self._refuse_repeated(ctx, given)
            rest = super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            if ctx.resilient_parsing:
                raise
            name = as_typed(error.option_name, given)
            ctx.fail(f"no option {name}; {self._other_option(ctx, name, error.possibilities)}")
        if rest and not ctx.resilient_parsing:
            ctx.fail(f"unexpected argument {quoted(rest[0])}; {self._spelling(ctx, rest[0])}")
        return rest

    def _refuse_repeated(self, ctx: click.Context, args: Sequence[str]) -> None:
        """UsageError for several files of an option that takes one: click would read the last."""
        if ctx.resilient_parsing:
            return
        values, _, order = self.make_parser(ctx).parse_args(args=list(args))
        for param in order:
            once = param.metavar in _READ and not param.multiple and param.name not in _WRITTEN
            if once and order.count(param) > 1:
                name, last = min(param.opts, key=len), quoted(values[param.name])
                ctx.fail(f"{name} is given twice, last as {last}: give it once")

    def _other_option(self, ctx: click.Context, name: str, close: Sequence[str] | None) -> str:
        known = {known for option in self.params for known in option.opts if known[:1] == "-"}
        meant = f"did you mean {' or '.join(sorted(close))}?" if close else self._usage(ctx)
        return instead(name, known) or meant

    def _spelling(self, ctx: click.Context, word: str) -> str:
        """The options that a word may belong to, of those that are not given."""
        typed = click.core.ParameterSource.COMMANDLINE
        names = [
            min(option.opts, key=len)
            for option in self.params
            if option.name in _WORDS and ctx.get_parameter_source(option.name) != typed
        ]
        if not names:
            return f"{self._usage(ctx)}; a value of several words needs quotes"
        return "did you mean " + " or ".join(f"{name} {quoted(word)}" for name in names) + "?"

    def _usage(self, ctx: click.Context) -> str:
        return f"usage: {ctx.command_path} {' '.join(self.collect_usage_pieces(ctx))}"
