"""``serve``: the proxy from its settings to its end, with new settings in between.

In one process, or as one of several workers whose parent (``workers``) reads the
configuration, watches it and sends it here.
"""

import argparse
import asyncio
import contextlib
import ctypes
import functools
import gc
import os
import pickle
import shutil
import signal
import socket
import sys
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

from proxy import config, lean  # noqa: F401 (before what imports aiohttp)
from proxy.config import Settings
from proxy.errors import ConfigError
from proxy.listener import Listener
from proxy.log import ExchangeLog
from proxy.metrics import Board
from proxy.plan import LENGTH, METRICS_DIR_VARIABLE, NUMBER_VARIABLE, Plan
from proxy.probe import Found, probe
from proxy.redact import Redactor
from proxy.relay import LAST_WRITE_S
from proxy.server import Proxy
from proxy.status import say, version
from proxy.tls import BadFile
from proxy.upstream import Upstream
from proxy.watch import POLL_S, Watch

# How often what has become garbage in cycles is looked for.
COLLECT_S = 30.0
LOG_DELAY_S = 0.05
_READ_BYTES = 64 * 1024
_M_MMAP_THRESHOLD = -3  # of mallopt(3)
_MAPPED_BYTES = 128 * 1024


def run(options: argparse.Namespace) -> int:
    """Serve in this process until a signal to stop."""
    return run_loop(_serve(options))


def run_loop(coroutine: Coroutine[Any, Any, int]) -> int:
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        return runner.run(coroutine)


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    try:
        import uvloop
    except ImportError:  # the extra "speed" is not installed
        return asyncio.new_event_loop
    return uvloop.new_event_loop


async def stop_signal() -> None:
    """Wait for a signal to stop."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    await stop.wait()


# --------------------------------------------------------------------------- settings


async def _read(
    options: argparse.Namespace, stack: contextlib.AsyncExitStack
) -> Settings:
    """From a file, from a server that is running, or for the embedded simulator.

    Raises: ConfigError.
    """
    if options.config is not None:
        return config.read(options.config, os.environ, listen=options.listen)
    if options.tgi_url is not None:
        found = await probe(options.tgi_url)
        if found.warning:
            say(f"warning: {found.warning}")
    else:
        # Here, since a proxy with something real behind it starts faster without it.
        from proxy import simulator

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


def _read_again(options: argparse.Namespace, running: Settings) -> Settings:
    """Return what the file says now. Raises: ConfigError: it cannot take its place."""
    settings = config.read(options.config, os.environ, listen=options.listen)
    problems = []
    # To go on listening elsewhere than the file says would also go round the check
    # that nothing without tokens can be reached from other machines.
    if settings.listen != running.listen:
        problems.append("listen: cannot change while the proxy runs; restart it")
    if (settings.tls is None) is not (running.tls is None):
        text = "cannot be switched on or off while the proxy runs; restart it"
        problems.append(f"tls: {text}")
    if problems:
        raise ConfigError(problems)
    return settings


def _say_why_not(error: ConfigError) -> None:
    lines = [f"  - {problem}" for problem in error.problems]
    head = "The new configuration cannot be used; the old one stays in force:"
    say("\n".join([head, *lines]))


def _say_reloaded(settings: Settings, before: Settings) -> None:
    new = [text for text in settings.warnings if text not in before.warnings]
    lines = [f"  warning: {text}" for text in new]
    head = "The configuration was read again; new requests go by it."
    say("\n".join([head, *lines]))


def _banner(settings: Settings, addresses: list[tuple[str, int]]) -> str:
    host, port = addresses[0]
    host = f"[{host}]" if ":" in host else host
    url = f"{'https' if settings.tls else 'http'}://{host}:{port}"
    question = '{"messages":[{"speaker":"human","text":"What is your name?"}]}'
    token = "-H 'authorization: token TOKEN' " if settings.tokens else ""
    return f"""\
completions-proxy {version()}

{config.describe(settings)}

Serving {url}; try:

  curl -N '{url}/.api/completions/stream?api-version=2' {token}\\
    --data-raw '{question}'
"""


# ---------------------------------------------------------------------------- one process


@contextlib.contextmanager
def _files_checked() -> Iterator[None]:
    """Raises: ConfigError: a file that was good when it was checked is so no more."""
    try:
        yield
    except BadFile as bad:
        raise ConfigError([f"tls.{bad.key}: {bad}"]) from None


def _board() -> Board | None:
    """Where workers leave their counts; None if there is one process only."""
    directory = os.environ.get(METRICS_DIR_VARIABLE)
    number = os.environ.get(NUMBER_VARIABLE, "")
    return Board(Path(directory), int(number)) if directory and number else None


def _proxy(settings: Settings) -> Proxy:
    redact = Redactor(config.secrets(settings))
    upstream = Upstream()
    loop = asyncio.get_running_loop()
    log = ExchangeLog(
        sys.stdout, redact, functools.partial(loop.call_later, LOG_DELAY_S)
    )
    return Proxy(settings, upstream, log, redact, _board())


class _Service:
    """A listener that new settings, a wish to stop and impatience can reach."""

    def __init__(
        self, settings: Settings, listening: list[socket.socket] | None = None
    ) -> None:
        self.settings = settings
        with _files_checked():
            self.listener = Listener(_proxy(settings), listening)
        self.stopping = asyncio.Event()

    async def start(self, *, announce: bool = True) -> None:
        """Raises: OSError: an address cannot be had. ConfigError."""
        with _files_checked():
            addresses = await self.listener.start()
        if announce:
            say(_banner(self.settings, addresses))
        _calm_collector(asyncio.get_running_loop())
        _give_buffers_back()

    def reload(self, settings: Settings) -> None:
        """Raises: ConfigError: nothing has changed."""
        with _files_checked():
            self.listener.swap(_proxy(settings))
        self.settings = settings

    def stop(self) -> None:
        """Stop gracefully; asked for once more, at once."""
        if self.stopping.is_set():
            self.listener.hurry()
        self.stopping.set()


async def _serve(options: argparse.Namespace) -> int:
    loop = asyncio.get_running_loop()
    watch = Watch([str(options.config)] if options.config else [])
    async with contextlib.AsyncExitStack() as stack:
        settings = await _read(options, stack)
        watch.follow(settings.files)
        service = _Service(settings)
        stack.push_async_callback(service.listener.stop)
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, service.stop)
        again = asyncio.Event()
        # Without a file a terminal that is closed ends the proxy, as other programs.
        hang_up = again.set if options.config is not None else service.stop
        loop.add_signal_handler(signal.SIGHUP, hang_up)
        await service.start()
        if options.config is not None:
            keeping = loop.create_task(_keep_up(options, service, watch, again))
            stack.callback(keeping.cancel)
        await service.stopping.wait()
        if service.listener.is_busy or service.settings.shutdown.delay_s:
            say(stopping_text(service.settings))
    return 0


def stopping_text(settings: Settings) -> str:
    shutdown = settings.shutdown
    first = f"health checks fail for {shutdown.delay_s:g} s, then " * (
        shutdown.delay_s > 0
    )
    return (
        f"Stopping: {first}open replies have {shutdown.grace_s:g} s;"
        " once more to stop now."
    )


async def _keep_up(
    options: argparse.Namespace,
    service: _Service,
    watch: Watch,
    again: asyncio.Event,
) -> None:
    """Read the configuration again when its files have changed, or when told to."""
    while not service.stopping.is_set():
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(POLL_S):
                await again.wait()
        if not again.is_set() and not watch.has_changed():
            continue
        again.clear()
        watch.look()
        before = service.settings
        try:
            # In a thread: to parse a long file would hold up every stream.
            settings = await asyncio.to_thread(_read_again, options, before)
            service.reload(settings)
        except ConfigError as error:
            _say_why_not(error)
        else:
            watch.follow(settings.files)
            _say_reloaded(settings, before)


def _calm_collector(loop: asyncio.AbstractEventLoop) -> None:
    """Let the garbage collector look at little, and seldom.

    A full collection stops every stream for 0.15 µs per live container; what was made
    at start lives to the end anyway, and little garbage here has cycles. But that which
    has may hold large buffers: by its own count the collector would come for old ones
    every 250 million objects, or never where nobody asks for anything any more.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 50, 100)

    def collect() -> None:
        gc.collect()
        loop.call_later(COLLECT_S, collect)

    loop.call_later(COLLECT_S, collect)


def _give_buffers_back() -> None:
    """Have large buffers mapped, so that they return to the system when they are freed.

    glibc begins so, but takes each large buffer that is freed for the usual size, and
    from then on puts those up to that size among small ones, where their room stays:
    after ten minutes of load with some large events 176 MiB, of which 12 were in use;
    128 this way. Other C libraries do not have the function, nor the habit.
    """
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _MAPPED_BYTES)


# -------------------------------------------------------------------------------- workers


def plan(options: argparse.Namespace, running: Plan | None) -> Plan | None:
    """Read the configuration for the parent, in a process of its own.

    Args:    running: what is in force already.
    Returns: None if the new configuration cannot be used; that has been said.
    Raises:  ConfigError: the first one cannot.
    """
    if running is not None:
        try:
            before: Settings = pickle.loads(running.settings)
            settings = _read_again(options, before)
        except ConfigError as error:
            _say_why_not(error)
            return None
        _say_reloaded(settings, before)
    else:
        settings = asyncio.run(_read_once(options))
    shutdown = settings.shutdown
    return Plan(
        settings.listen,
        settings.files,
        shutdown.delay_s + shutdown.grace_s + LAST_WRITE_S,
        stopping_text(settings),
        pickle.dumps(settings),
    )


async def _read_once(options: argparse.Namespace) -> Settings:
    async with contextlib.AsyncExitStack() as stack:
        return await _read(options, stack)


def work(
    settings: bytes, listening: list[socket.socket], control: int, *, announce: bool
) -> int:
    """Serve as one worker.

    Args: listening: sockets of this worker alone.
          control: a file descriptor; new settings come from it, and its end means
                   that the parent is gone.
    """
    return run_loop(_work(pickle.loads(settings), listening, control, announce))


async def _work(
    settings: Settings, listening: list[socket.socket], control: int, announce: bool
) -> int:
    loop = asyncio.get_running_loop()
    service = _Service(settings, listening)
    loop.add_signal_handler(signal.SIGTERM, service.stop)
    parent = _Control(service, control)
    loop.add_reader(control, parent.receive)
    try:
        await service.start(announce=announce)
        await service.stopping.wait()
    finally:
        await service.listener.stop()
    if parent.is_gone:  # it would have put this away
        shutil.rmtree(os.environ[METRICS_DIR_VARIABLE], ignore_errors=True)
    return 0


class _Control:
    def __init__(self, service: _Service, control: int) -> None:
        self._service = service
        self._control = control
        self._received = bytearray()
        self.is_gone = False

    def receive(self) -> None:
        data = os.read(self._control, _READ_BYTES)
        if not data:  # without a parent nobody would ever end us
            self.is_gone = True
            asyncio.get_running_loop().remove_reader(self._control)
            self._service.stop()
            return
        received = self._received
        received += data
        while len(received) >= LENGTH.size:
            (length,) = LENGTH.unpack_from(received)
            end = LENGTH.size + length
            if len(received) < end:
                break
            settings = pickle.loads(received[LENGTH.size : end])
            del received[:end]
            self._reload(settings)

    def _reload(self, settings: Settings) -> None:
        try:
            self._service.reload(settings)
        except ConfigError as error:
            _say_why_not(error)
