"""A whole request, answered without a task as far as that goes."""

import asyncio

from proxy.admission import Permit
from proxy.server.handling import Asking, Attempt, Begun, Handling


class Visit(Handling):
    """A request of which only the body is new. Callbacks answer it, and a task goes on
    with it once anything has to be waited for but the upstream.
    """

    _task: asyncio.Task[None] | None = None
    _is_resting = False  # the task has begun with the rest
    _asked: Asking
    _permit: Permit | None = None
    _begun: Attempt | None = None

    def begin(self, body: bytes) -> bool:
        """Ask an upstream. False: nothing was done; whatever it is that is wrong, or has
        to be waited for, the usual way will come to it, too.
        """
        service = self._service
        door, permit = service.admission, None
        if len(body) > service.body_bytes:
            return False
        try:
            asked = self._parse(body)
            if door is not None:
                user = self.outcome.user
                permit = door.enter_now(
                    user,
                    "" if user else self._client.remote,
                    asked.completion.feature,
                    asked.course.provider_id,
                )
                if permit is None:
                    return False
        except Exception:
            return False
        self._asked = asked
        self._permit = permit
        try:
            self._turn_knobs(asked)
            attempt = self._attempt(asked, self.started_s)
        except Exception:  # it will come again, and be said
            self._go_on()
            return True
        assert attempt is not None  # nobody was tried yet
        self._begun = attempt
        attempt.relay.begin(self._finish, self._go_on)
        return True

    def client_gone(self) -> None:
        if self._task is not None:
            self._task.cancel()
        if self._is_resting:
            return
        # What was cancelled before its first step does not even end.
        if self._begun is not None:
            self._begun.relay.abandon()
        self.outcome.kind = "client_gone"
        self._finish()

    def _finish(self) -> None:
        """All was said without a task, or nobody is there to hear it."""
        service, door, permit = self._service, self._service.admission, self._permit
        now_s = service.loop.time()
        try:
            if self._begun is not None:
                self._settle(self._begun, now_s)
            if door is not None and permit is not None:
                self._leave(door, permit)
        finally:
            self._end(now_s)

    def _end(self, now_s: float) -> None:
        self.outcome.status = self.response.status
        try:
            self._service.ended(self.outcome, self.started_s, now_s, is_logged=True)
        finally:  # else the connection would wait for ever
            self._client.visited(now_s, keep_alive=self.response.keep_alive)

    def _go_on(self) -> None:
        """Let a task do the rest."""
        self._task = self._service.loop.create_task(self._rest())

    async def _rest(self) -> None:
        self._is_resting = True
        self._say_error = self._asked.writer.error_reply
        try:
            begun = Begun(self._permit, self._begun)
            await self._carry_out(self._complete(self._asked, begun))
        except asyncio.CancelledError:
            self.outcome.kind = "client_gone"
            raise
        except ConnectionError:
            if self.outcome.kind in ("", "ok"):
                self.outcome.kind = "client_gone"
            self.response.keep_alive = False
        finally:
            self._end(self._service.loop.time())
