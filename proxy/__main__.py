"""The command line: ``completions-proxy serve | check | simulate``."""

import argparse
import asyncio
import contextlib
import gc
import logging
import os
import signal
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from proxy import __version__, config, simulator, siteconfig
from proxy.config import Settings
from proxy.errors import ConfigError
from proxy.log import ExchangeLog
from proxy.probe import Found, probe
from proxy.redact import Redactor
from proxy.server import Listener, Proxy
from proxy.upstream import Upstream

LOG_DELAY_S = 0.05
GRACE_S = 10.0

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
by commas). Without any, only loopback addresses are listened on."""

_SIMULATE = f"""\
A server that answers like Hugging Face TGI, without a model; asked to, with faults:

  completions-proxy simulate --fault cut=rst,after=3      for every answer, or by request
  curl -H 'x-simulator-faults: cut=rst, after=3' …        by a header
  {{"model": "tgi+cut=rst+after=3", …}}                     by the name of the model

Faults (a value in brackets may be left out):

{simulator.describe().replace("%", "%%")}

A reply in one piece counts as two events, its halves."""


def main(arguments: list[str] | None = None) -> int:
    """Run one command; return its exit status."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.INFO)
    try:
        command: Callable[[argparse.Namespace], int] = options.command
        return command(options)
    except ConfigError as error:
        _say("The configuration cannot be used:")
        for problem in error.problems:
            _say(f"  - {problem}")
        return 2
    except OSError as error:
        _say(f"error: {error.strerror or error}")
        return 1
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("completions-proxy", description=_DESCRIPTION)
    parser.add_argument("--version", action="version", version=__version__)
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
        description=_SIMULATE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
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


def _faults(text: str) -> simulator.Faults:
    try:
        return simulator.parse(text)
    except simulator.FaultError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _run(coroutine: Coroutine[Any, Any, int]) -> int:
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        return runner.run(coroutine)


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    try:
        import uvloop
    except ImportError:  # the extra "speed" is not installed
        return asyncio.new_event_loop
    return uvloop.new_event_loop


# ------------------------------------------------------------------------------ check


def _check(options: argparse.Namespace) -> int:
    if options.from_site_config is not None:
        return _convert(options.from_site_config)
    settings = config.read(options.config, os.environ)
    print(config.describe(settings))
    return 0


def _convert(path: Path) -> int:
    """Print the file, then say on the standard error what has to be seen to."""
    converted = siteconfig.convert(config.read_text(path))
    print(converted.text, end="")
    sys.stdout.flush()
    for warning in converted.warnings:
        _say(f"warning: {warning}")
    # What the variables will hold does not matter to what is wrong.
    environ = dict.fromkeys(converted.variables, "http://variable.invalid")
    settings = config.load(converted.text, environ=environ, directory=path.parent)
    for warning in settings.warnings:
        _say(f"warning: {warning}")
    return 0


# --------------------------------------------------------------------------- simulate


def _simulate(options: argparse.Namespace) -> int:
    return _run(_simulate_until_stopped(options))


async def _simulate_until_stopped(options: argparse.Namespace) -> int:
    settings = simulator.Settings(
        tokens_per_s=options.tokens_per_second,
        first_token_s=options.first_token,
        faults=options.fault,
    )
    running = await simulator.start(settings, options.host, options.port)
    _say(f"A simulated TGI server answers at {running.url}")
    await _stop_signal()
    await running.stop()
    return 0


# ------------------------------------------------------------------------------ serve


def _serve(options: argparse.Namespace) -> int:
    return _run(_serve_until_stopped(options))


async def _serve_until_stopped(options: argparse.Namespace) -> int:
    async with contextlib.AsyncExitStack() as stack:
        settings = await _settings(options, stack)
        redact = Redactor(config.secrets(settings))
        upstream = Upstream()
        stack.push_async_callback(upstream.close)
        loop = asyncio.get_running_loop()
        log = ExchangeLog(sys.stdout, redact, lambda f: loop.call_later(LOG_DELAY_S, f))
        stack.callback(log.flush)
        listener = Listener(Proxy(settings, upstream, log, redact), GRACE_S)
        stack.push_async_callback(listener.stop)
        addresses = await listener.start()
        _say(_banner(settings, addresses))
        _calm_collector()
        await _stop_signal()
        if listener.is_busy:
            _say(f"Stopping: open replies have {GRACE_S:g} s; once more to stop now.")
            hurry = asyncio.create_task(_stop_signal())
            hurry.add_done_callback(lambda _: listener.hurry())
            stack.callback(hurry.cancel)
    return 0


def _calm_collector() -> None:
    """Let the garbage collector look at little, and seldom.

    A full collection stops every stream for 0.15 µs per live container; what was made
    at start lives to the end anyway, and little garbage here has cycles.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 50, 100)


async def _settings(
    options: argparse.Namespace, stack: contextlib.AsyncExitStack
) -> Settings:
    """From a file, from a server that is running, or for the embedded simulator."""
    if options.config is not None:
        return config.read(options.config, os.environ, listen=options.listen)
    if options.tgi_url is not None:
        found = await probe(options.tgi_url)
        if found.warning:
            _say(f"warning: {found.warning}")
    else:
        running = await simulator.start(simulator.Settings())
        stack.push_async_callback(running.stop)
        found = Found(f"{running.url}/v1", model="simulator")
    return config.for_upstream(
        found.url,
        type=found.type,
        model=found.model,
        environ=os.environ,
        listen=options.listen,
        profile=found.profile,
        max_input_tokens=found.max_input_tokens or config.UNKNOWN_TOKENS,
        max_output_tokens=found.max_output_tokens or config.UNKNOWN_TOKENS,
    )


def _banner(settings: Settings, addresses: list[tuple[str, int]]) -> str:
    host, port = addresses[0]
    host = f"[{host}]" if ":" in host else host
    url = f"http://{host}:{port}"
    question = '{"messages":[{"speaker":"human","text":"What is your name?"}]}'
    token = "-H 'authorization: token TOKEN' " if settings.tokens else ""
    return f"""\
completions-proxy {__version__}

{config.describe(settings)}

Serving {url}; try:

  curl -N '{url}/.api/completions/stream?api-version=2' {token}\\
    --data-raw '{question}'
"""


async def _stop_signal() -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    await stop.wait()


if __name__ == "__main__":
    sys.exit(main())
