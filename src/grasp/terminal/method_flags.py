"""The flags of `grasp compress` that belong to a method, and those of `grasp recover`: read off the
classes when the command runs, since these bring torch.
"""

from __future__ import annotations

from typing import Any

import click

from grasp.core.fields import declared
from grasp.recipes.method import MethodChoice
from grasp.terminal.config import recipe_of
from grasp.terminal.flags import Flag, Grouped, Place, option

CHOSEN = "grasp.method"
PLUGIN = "grasp.plugin"
"""Where a command's context keeps the name of the method that its flags are those of, and the
user's file that may define it.
"""


class MethodCommand(Grouped):
    """`grasp compress`: the flags of the method that is chosen, then the shared ones. The flags of
    the other methods are known but not shown, so that an error can say whose they are.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Find the method first, on the command line or in the recipe: it says what its flags
        are.
        """
        parser = self.make_parser(ctx)
        parser.ignore_unknown_options = True  # those of a plugin's methods
        said = parser.parse_args(list(args))[0]
        method = said.get("method")
        if said.get("plugin"):
            ctx.meta[PLUGIN] = Place().convert(said["plugin"], None, ctx)
        if method is None and said.get("config"):
            place = Place().convert(said["config"], None, ctx)
            method = recipe_of(place).get("method")
        ctx.meta[CHOSEN] = method
        return super().parse_args(ctx, args)

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        own = super().get_params(ctx)
        taken: dict[str | None, Any] = {param.name: param for param in own}
        behind = list(taken).index("method") + 1
        method = [one for one in _options(ctx) if one.name not in taken]
        return [*own[:behind], *method, *own[behind:]]

    def before_flags(self, title: str, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The methods there are and how to see their flags; what the chosen one does."""
        from grasp.methods import class_of, known

        plugin = ctx.meta.get(PLUGIN)
        about = class_of(_chosen(ctx), plugin).about()
        if title == MethodChoice.title:
            formatter.write_text(f"{', '.join(known(plugin))}")
            formatter.write_text("Flags of another one: grasp compress --method NAME --help")
        elif title.startswith(TITLE):
            formatter.write_text(about)
        else:
            return
        formatter.write_paragraph()


TITLE = "Flags of --method"


def _chosen(ctx: click.Context) -> str:
    return str(ctx.meta.get(CHOSEN) or declared(MethodChoice)["method"].default)


def _options(ctx: click.Context) -> list[Flag]:
    """The flags of the method that is chosen, then, hidden, those that only others have."""
    from grasp.methods import known

    methods, chosen = known(ctx.meta.get(PLUGIN)), _chosen(ctx)
    found: dict[str, Flag] = {}
    for name in sorted(methods, key=lambda name: name != chosen):
        for one in declared(methods[name]).values():
            if one.name not in found:
                shown = name == chosen
                found[one.name] = option(
                    one, f"{TITLE} {chosen}" if shown else "", hidden=not shown
                )
    return list(found.values())


TRAINING = "Training"
"""Title of the flags of `grasp recover`."""


class TrainingCommand(Grouped):
    """`grasp recover`: its own flags, then one for each field of the training's recipe."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        from grasp.compensation.recipe import Recipe

        own = super().get_params(ctx)
        taken: dict[str | None, Any] = {param.name: param for param in own}
        more = [option(one, TRAINING) for one in declared(Recipe).values() if one.name not in taken]
        return [*own, *more]
