"""``vllm-steer fit``: fits a steer to a user's texts, with one command per method."""

import typer

from vllm_steer.cli.fit.concept import concept
from vllm_steer.cli.fit.condition import condition
from vllm_steer.cli.fit.delta import delta
from vllm_steer.cli.fit.lm_steer import lm_steer
from vllm_steer.cli.fit.low_rank import low_rank
from vllm_steer.cli.fit.vector import vector

fit = typer.Typer(
    name="fit",
    help="Fit a steer to texts.",
    no_args_is_help=True,
    rich_markup_mode=None,
    add_completion=False,
)
fit.command("lm-steer")(lm_steer)
fit.command()(concept)
fit.command()(condition)
fit.command()(delta)
fit.command("low-rank")(low_rank)
fit.command()(vector)
