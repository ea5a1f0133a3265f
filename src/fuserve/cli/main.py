"""The ``fuserve`` command: what the commands are called and how errors are shown."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from fuserve.cli.bench import latency
from fuserve.cli.bench_serve import bench_serve
from fuserve.cli.chat import chat
from fuserve.cli.doctor import doctor
from fuserve.cli.eval import perplexity
from fuserve.cli.eval_compare import compare
from fuserve.cli.flags import DEBUG_KEY, expand_flags
from fuserve.cli.generate import generate
from fuserve.cli.image import image
from fuserve.cli.info import info
from fuserve.cli.plan import plan
from fuserve.cli.quantize import quantize
from fuserve.cli.serve import serve
from fuserve.errors import FuserveError

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130


class _Commands(TyperGroup):
    """Shows a ``FuserveError`` as one line on stderr; every other exception is a bug of ours."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except FuserveError as error:
            if ctx.meta.get(DEBUG_KEY):
                traceback.print_exc()
            else:
                print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
            raise typer.Exit(EXIT_USER_ERROR) from None
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            raise typer.Exit(EXIT_INTERRUPTED) from None


app = typer.Typer(
    name="fuserve",
    cls=_Commands,
    help="Serve large language models and paint with diffusion models, from the CPU.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
bench = typer.Typer(help="Measure speed.", no_args_is_help=True)
evaluate = typer.Typer(help="Measure quality.", no_args_is_help=True)
app.add_typer(bench, name="bench")
app.add_typer(evaluate, name="eval")


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(version("fuserve"))
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version.", callback=_show_version, is_eager=True),
    ] = False,
) -> None:
    """Serve large language models and paint with diffusion models, from the CPU."""


def _add(to: typer.Typer, name: str, command: Callable[..., None], example: str) -> None:
    to.command(name, epilog=f"Example: {example}")(expand_flags(command))


_add(app, "generate", generate, 'fuserve generate --model demo "The capital of France is"')
_add(app, "chat", chat, "fuserve chat --model demo --system 'Answer in one sentence.'")
_add(app, "serve", serve, "fuserve serve --model demo --port 8000")
_add(
    app,
    "image",
    image,
    'fuserve image "a red circle above a blue square" --model path/to/model --seed 7 --out x.png',
)
_add(app, "quantize", quantize, "fuserve quantize demo smollm2-gptq --scheme gptq")
_add(app, "info", info, "fuserve info demo --json")
_add(app, "doctor", doctor, "fuserve doctor")
_add(
    app,
    "plan",
    plan,
    "fuserve plan MODEL --memory 16GB --hosts 4 --bandwidth 10Gbit/s",
)
_add(
    bench,
    "latency",
    latency,
    "fuserve bench latency --model demo --prompt-tokens 512 --output-tokens 64 --batch 1,8,16",
)
_add(
    bench,
    "serve",
    bench_serve,
    "fuserve bench serve --base-url http://127.0.0.1:8000 --num-prompts 100 --request-rate 4",
)
_add(evaluate, "perplexity", perplexity, "fuserve eval perplexity --model demo --text book.txt")
_add(
    evaluate,
    "compare",
    compare,
    "fuserve eval compare demo --schemes int8,int4+g128,w8a8 --text book.txt --plot accuracy.png",
)


def main() -> None:
    """Entry point of the ``fuserve`` script."""
    app(prog_name="fuserve")
