"""The command line: ``completions-proxy serve | check | simulate``."""

import argparse
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path

from proxy.errors import ConfigError
from proxy.status import guarded, say, version

# What a command needs it imports itself: the parent of workers is to stay small.

_DESCRIPTION = """\
A reverse proxy for completions: it stands in front of a model server (Hugging Face
TGI, vLLM, llama.cpp, anything OpenAI-like, or a hosted one) and answers Sourcegraph
Cody clients in their own protocol."""

_SERVE = """\
Without options it stands in front of an embedded simulator of a model server, so that
there is something to try at once:

  completions-proxy serve
  completions-proxy serve --tgi-url http://127.0.0.1:3000
  completions-proxy serve --config proxy.yaml

Client tokens come from the configuration or from COMPLETIONS_PROXY_TOKENS (separated
by commas). Without any, only loopback addresses are listened on.

Signals:
  SIGHUP         read the configuration file again, as a change of it or of a file that
                 it names does; open replies go on, and a file with a mistake in it
                 changes nothing. listen, and whether there is tls, need a restart.
                 Without --config: stop.
  SIGTERM, ^C    stop: health checks (/healthz) answer 503; after shutdown.delay no
                 new connection is taken; open replies have shutdown.grace to end, and
                 then end with an error. Once more: at once.

Exit status: 0 after a signal, 1 if an address cannot be had or a worker failed while
stopping, 2 if the configuration cannot be used."""

_SIMULATE = """\
A server that answers like Hugging Face TGI, without a model; asked to, with faults:

  completions-proxy simulate --fault cut=rst,after=3      for every answer, or by request
  curl -H 'x-simulator-faults: cut=rst, after=3' …        by a header
  {"model": "tgi+cut=rst+after=3", …}                     by the name of the model

Faults (a value in brackets may be left out):

%s

A reply in one piece counts as two events, its halves."""


class _Parser(argparse.ArgumentParser):
    """``describe`` gives a description that is not to be had without imports."""

    describe: Callable[[], str] | None = None

    def format_help(self) -> str:
        if self.describe is not None:
            self.description = self.describe()
        return super().format_help()


def _describe_simulate() -> str:
    from proxy import simulator

    return (_SIMULATE % simulator.describe()).replace("%", "%%")


def main(arguments: list[str] | None = None) -> int:
    """Run one command; return its exit status."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.INFO)
    return guarded(lambda: int(options.command(options)))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser("completions-proxy", description=_DESCRIPTION)
    parser.add_argument("--version", action="version", version=version())
    commands = parser.add_subparsers(required=True, metavar="command")

    serve = commands.add_parser(
        "serve",
        help="run the proxy",
        description=_SERVE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    source = serve.add_mutually_exclusive_group()
    source.add_argument("--config", type=Path, metavar="FILE", help="a YAML file")
    source.add_argument(
        "--tgi-url",
        metavar="URL",
        help="base URL of a TGI or another OpenAI-compatible server",
    )
    serve.add_argument(
        "--listen", metavar="HOST:PORT", help="default: the file's, or 127.0.0.1:8080"
    )
    serve.add_argument(
        "--workers",
        type=_count,
        default=1,
        metavar="N",
        help="processes that share the port, started again when they die; one per"
        " core is enough (default: 1, and then no process watches over it)",
    )
    serve.set_defaults(command=_serve)

    check = commands.add_parser(
        "check", help="validate a configuration and print what it comes to"
    )
    checked = check.add_mutually_exclusive_group(required=True)
    checked.add_argument(
        "config", type=Path, nargs="?", metavar="FILE", help="a YAML file"
    )
    checked.add_argument(
        "--from-site-config",
        type=Path,
        metavar="FILE",
        help="a Sourcegraph site configuration: print the proxy's, made of it",
    )
    check.set_defaults(command=_check)

    simulate = commands.add_parser(
        "simulate",
        help="run only the simulator of a TGI server",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    simulate.describe = _describe_simulate
    simulate.add_argument("--host", default="127.0.0.1")
    simulate.add_argument("--port", type=int, default=3000)
    simulate.add_argument(
        "--tokens-per-second",
        type=float,
        default=50.0,
        metavar="N",
        help="how fast it answers; 0: as fast as it can (default: 50)",
    )
    simulate.add_argument(
        "--first-token",
        type=float,
        default=0.1,
        metavar="SECONDS",
        help="how long the first token takes (default: 0.1)",
    )
    simulate.add_argument(
        "--fault",
        type=_faults,
        metavar="FAULTS",
        help="what goes wrong with every answer, see above",
    )
    simulate.set_defaults(command=_simulate)
    return parser


def _faults(text: str) -> object:
    from proxy import simulator

    try:
        return simulator.parse(text)
    except simulator.FaultError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _count(text: str) -> int:
    number = int(text)
    if not 1 <= number <= 256:
        raise argparse.ArgumentTypeError("expected a number from 1 to 256")
    return number


# ------------------------------------------------------------------------------ check


def _check(options: argparse.Namespace) -> int:
    if options.from_site_config is not None:
        return _convert(options.from_site_config)
    from proxy import config

    settings = config.read(options.config, os.environ)
    print(config.describe(settings))
    return 0


def _convert(path: Path) -> int:
    """Print the file, then say on the standard error what has to be seen to."""
    from proxy import config, siteconfig

    converted = siteconfig.convert(config.read_text(path))
    print(converted.text, end="")
    sys.stdout.flush()
    for warning in converted.warnings:
        say(f"warning: {warning}")
    # What the variables will hold does not matter to what is wrong.
    environ = dict.fromkeys(converted.variables, "http://variable.invalid")
    settings = config.load(converted.text, environ=environ, directory=path.parent)
    for warning in settings.warnings:
        say(f"warning: {warning}")
    return 0


# --------------------------------------------------------------------------- simulate


def _simulate(options: argparse.Namespace) -> int:
    from proxy import simulator
    from proxy.serve import run_loop, stop_signal

    async def until_stopped() -> int:
        settings = simulator.Settings(
            tokens_per_s=options.tokens_per_second,
            first_token_s=options.first_token,
            faults=options.fault,
        )
        running = await simulator.start(settings, options.host, options.port)
        say(f"A simulated TGI server answers at {running.url}")
        await stop_signal()
        await running.stop()
        return 0

    return run_loop(until_stopped())


# ------------------------------------------------------------------------------ serve


def _serve(options: argparse.Namespace) -> int:
    if options.workers == 1:
        from proxy import serve

        return serve.run(options)
    if options.config is None and options.tgi_url is None:
        raise ConfigError(["--workers: only with --config or --tgi-url"])
    from proxy import workers

    return workers.run(options)


if __name__ == "__main__":
    sys.exit(main())
