"""``serve --workers N``: the parent of the processes that serve.

It imports nothing of what serves, so that it stays small: each worker, and whatever
reads the configuration, is a fork that imports that for itself. The parent starts
workers, replaces them, watches the configuration, and passes on what it is told.

Every worker has listening sockets of its own on the shared ports (SO_REUSEPORT). One
socket for all would be simpler, but whichever worker wakes up first takes all that wait
there: of bursts of 64 connections that are kept, the busier one of two got 83 to 91 % in
the median and all in the worst case; with a socket each it is 53 to 56 and 64 %
(``python -m tests.bench.sharing``). The parent keeps the sockets open while a worker is
replaced, so that the connections waiting there are not lost.
"""

import argparse
import contextlib
import os
import pickle
import select
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

from proxy import sockets
from proxy.plan import METRICS_DIR_VARIABLE, NUMBER_VARIABLE, Plan, message
from proxy.status import guarded, say
from proxy.watch import POLL_S, Watch

# A worker that lived for so long died of something else than its start.
HEALTHY_S = 10.0
FIRST_BACKOFF_S = 0.1
LONGEST_BACKOFF_S = 30.0
# While no worker is about to listen on them, sockets must not collect connections.
HOLD_S = 1.0
PLAN_S = 30.0
# On top of what the configuration allows for stopping.
STOP_MARGIN_S = 5.0
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD)


def run(options: argparse.Namespace) -> int:
    """Serve by ``options.workers`` processes until a signal to stop."""
    parent = _Parent(options)
    try:
        return parent.run()
    finally:
        parent.close()


class _Worker:
    """A place that a process fills, one after the other. ``pid`` is 0 in between."""

    def __init__(self, number: int, listening: list[socket.socket]) -> None:
        self.number = number
        self.listening = listening
        self.pid = 0
        self.control = -1
        self.unsent = b""
        self.started_s = 0.0
        self.start_at_s = 0.0
        self.backoff_s = 0.0


class _Parent:
    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._workers: list[_Worker] = []
        self._stop_at_s: float | None = None
        self._status = 0
        self._has_announced = False
        self._metrics_dir = ""
        self._wake_r, self._wake_w = socket.socketpair()
        self._wake_r.setblocking(False)
        self._wake_w.setblocking(False)

    # ----------------------------------------------------------------------- life cycle

    def run(self) -> int:
        config = self._options.config
        self._watch = Watch([str(config)] if config else [])
        plan, status = self._make_plan(None)
        if plan is None:
            return status
        self._plan = plan
        self._watch.follow(plan.files)
        first = sockets.listen(plan.listen, share=True)
        self._addresses = [each.getsockname()[:2] for each in first]
        self._workers.append(_Worker(1, first))
        for number in range(2, self._options.workers + 1):
            self._workers.append(_Worker(number, sockets.beside(first)))
        self._metrics_dir = tempfile.mkdtemp(prefix="completions-proxy-")
        os.environ[METRICS_DIR_VARIABLE] = self._metrics_dir
        self._take_signals()
        while True:
            self._start_due()
            self._wait()
            for number in self._signals():
                self._obey(number)
            self._reap()
            if self._stop_at_s is not None:
                if not any(worker.pid for worker in self._workers):
                    return self._status
                self._kill_late()
            elif self._watch.has_changed():
                self._reload()

    def close(self) -> None:
        """Leave nothing behind, whatever has happened."""
        for worker in self._workers:
            sockets.close(worker.listening)
            if worker.pid:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(worker.pid, signal.SIGKILL)
        signal.set_wakeup_fd(-1)
        if self._metrics_dir:
            shutil.rmtree(self._metrics_dir, ignore_errors=True)

    def _take_signals(self) -> None:
        signal.set_wakeup_fd(self._wake_w.fileno(), warn_on_full_buffer=False)
        for number in _SIGNALS:
            signal.signal(number, lambda *_: None)

    def _signals(self) -> Iterator[int]:
        with contextlib.suppress(BlockingIOError):
            yield from self._wake_r.recv(4096)

    def _wait(self) -> None:
        """Until a signal, or the next thing to do or to look at."""
        waiting = [worker for worker in self._workers if not worker.pid]
        due_s = min((worker.start_at_s for worker in waiting), default=float("inf"))
        timeout_s = max(0.0, min(POLL_S, due_s - time.monotonic()))
        if self._stop_at_s is not None:
            timeout_s = POLL_S
        unsent = {worker.control: worker for worker in self._workers if worker.unsent}
        _, writable, _ = select.select([self._wake_r], list(unsent), [], timeout_s)
        for control in writable:
            _send(unsent[control])

    def _obey(self, number: int) -> None:
        # Without a file there is nothing to read again: then a terminal that is closed
        # ends the proxy, as it ends other programs.
        is_reload = number == signal.SIGHUP and self._options.config is not None
        if is_reload and self._stop_at_s is None:
            self._reload()
        elif number != signal.SIGCHLD and not is_reload:
            self._stop()

    def _stop(self) -> None:
        if self._stop_at_s is None:
            margin_s = self._plan.stop_s + STOP_MARGIN_S
            self._stop_at_s = time.monotonic() + margin_s
            say(self._plan.stopping_text)
            for worker in self._workers:
                sockets.close(worker.listening)
        for worker in self._workers:
            if worker.pid:
                os.kill(worker.pid, signal.SIGTERM)

    def _kill_late(self) -> None:
        assert self._stop_at_s is not None
        if time.monotonic() < self._stop_at_s:
            return
        for worker in self._workers:
            if worker.pid:
                say(f"worker {worker.number} (pid {worker.pid}) does not stop: killed")
                os.kill(worker.pid, signal.SIGKILL)
        self._stop_at_s = float("inf")

    # -------------------------------------------------------------------- configuration

    def _reload(self) -> None:
        self._watch.look()
        plan, _ = self._make_plan(self._plan)
        if plan is None:
            return
        self._plan = plan
        self._watch.follow(plan.files)
        for worker in self._workers:
            if worker.pid:
                worker.unsent += message(plan.settings)
                _send(worker)

    def _make_plan(self, running: Plan | None) -> tuple[Plan | None, int]:
        """Let a process read the configuration; return also its exit status."""
        ours, theirs = os.pipe()

        def read_it() -> int:
            os.close(ours)
            from proxy.serve import plan

            with open(theirs, "wb") as pipe:
                pickle.dump(plan(self._options, running), pipe)
            return 0

        pid = self._fork(read_it)
        os.close(theirs)
        data = _read_all(ours, PLAN_S)
        if data is None:
            say(f"error: to read the configuration takes more than {PLAN_S:g} s")
            os.kill(pid, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        found: Plan | None = pickle.loads(data) if data and status == 0 else None
        return found, status if status > 0 else 1

    # -------------------------------------------------------------------------- workers

    def _start_due(self) -> None:
        for worker in self._workers:
            is_due = not worker.pid and time.monotonic() >= worker.start_at_s
            if is_due and self._stop_at_s is None:
                try:
                    self._listen_again(worker)
                except OSError as error:
                    _put_off(worker)
                    say(f"worker {worker.number}: {error.strerror}")
                else:
                    self._start(worker)

    def _listen_again(self, worker: _Worker) -> None:
        if worker.listening:
            return
        others = (each.listening for each in self._workers if each.listening)
        other = next(others, None)
        worker.listening = (
            sockets.beside(other)
            if other
            else sockets.listen(self._addresses, share=True)
        )

    def _start(self, worker: _Worker) -> None:
        theirs, worker.control = os.pipe()
        os.set_blocking(worker.control, False)
        announce, self._has_announced = not self._has_announced, True

        def serve() -> int:
            from proxy.serve import work

            os.environ[NUMBER_VARIABLE] = str(worker.number)
            settings = self._plan.settings
            return work(settings, worker.listening, theirs, announce=announce)

        worker.started_s = time.monotonic()
        worker.pid = self._fork(serve, worker)
        os.close(theirs)

    def _fork(self, child: Callable[[], int], worker: _Worker | None = None) -> int:
        """Return the id of a process that runs ``child``, as ``worker`` if given."""
        sys.stdout.flush()
        sys.stderr.flush()
        # A signal to a child that is still like us would be taken for one to us.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        pid = os.fork()
        if pid:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            return pid
        status = 1
        try:
            self._become_child(worker)
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            status = guarded(child)
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            with contextlib.suppress(OSError, ValueError):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(status)

    def _become_child(self, worker: _Worker | None) -> None:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        # The terminal sends these to all of us; what is to be done the parent says.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        self._wake_r.close()
        self._wake_w.close()
        for each in self._workers:
            # Their ends of pipes and sockets must end with their owners.
            if each.control >= 0:
                os.close(each.control)
            if each is not worker:
                sockets.close(each.listening)

    def _reap(self) -> None:
        for worker in self._workers:
            if worker.pid:
                pid, status = os.waitpid(worker.pid, os.WNOHANG)
                if pid:
                    self._bury(worker, os.waitstatus_to_exitcode(status))

    def _bury(self, worker: _Worker, status: int) -> None:
        """See to what a process leaves behind, and when another follows."""
        pid, worker.pid = worker.pid, 0
        os.close(worker.control)
        worker.control, worker.unsent = -1, b""
        if self._stop_at_s is not None:
            if status not in (0, -signal.SIGTERM):
                self._status = 1
            return
        if time.monotonic() - worker.started_s >= HEALTHY_S:
            worker.backoff_s = 0.0
        _put_off(worker)
        how = (
            f"was killed by {signal.Signals(-status).name}"
            if status < 0
            else f"ended with status {status}"
        )
        say(
            f"worker {worker.number} (pid {pid}) {how};"
            f" another follows in {worker.backoff_s:g} s"
        )


def _put_off(worker: _Worker) -> None:
    """Wait the longer the more often a worker has died soon after its start."""
    longer_s = max(FIRST_BACKOFF_S, 2 * worker.backoff_s)
    worker.backoff_s = min(longer_s, LONGEST_BACKOFF_S)
    worker.start_at_s = time.monotonic() + worker.backoff_s
    if worker.backoff_s > HOLD_S:
        sockets.close(worker.listening)
        worker.listening = []


def _send(worker: _Worker) -> None:
    try:
        sent = os.write(worker.control, worker.unsent)
    except BlockingIOError:
        return
    except BrokenPipeError:  # it has died
        sent = len(worker.unsent)
    worker.unsent = worker.unsent[sent:]


def _read_all(descriptor: int, within_s: float) -> bytes | None:
    """Return what comes until the other side closes; None if that takes too long."""
    data, deadline_s = b"", time.monotonic() + within_s
    with open(descriptor, "rb", buffering=0) as pipe:
        while True:
            left_s = max(0.0, deadline_s - time.monotonic())
            if not select.select([pipe], [], [], left_s)[0]:
                return None
            piece = pipe.read(65536)
            if not piece:
                return data
            data += piece
