"""A whole request, answered without a task as far as that goes."""

import asyncio

from proxy.outcome import Outcome, new_id
from proxy.response import Response
from proxy.server.handling import Asking, Begun, Client, Handling
from proxy.server.service import Service
from proxy.server.target import Known


class Visit(Handling):
    """A request of which only the body is new. Callbacks answer it, and a task goes on
    with it once anything has to be waited for but the upstream.
    """

    _task: asyncio.Task[None] | None = None
    _is_resting = False  # the task has begun with the rest
    _asked: Asking
    _begun: Begun

    def __init__(self, service: Service, client: Client, known: Known) -> None:
        id = new_id()
        target = known.target
        response = Response(client, id)
        response.more = known.more
        outcome = Outcome(
            id=id,
            route=target.path,
            api_version=target.api_version,
            client=target.client,
            user=known.user,
        )
        limit_s = known.limit_s
        super().__init__(
            service, client, target, known.head, limit_s, response, outcome
        )

    def begin(self, body: bytes) -> bool:
        """Ask an upstream. False: nothing was done; whatever it is that is wrong, or has
        to be waited for, the usual way will come to it, too.
        """
        door, permit = self._service.admission, None
        try:
            if len(body) > self._service.settings.limits.body_bytes:
                return False
            asked = self._parse(body)
            if door is not None:
                user = self.outcome.user
                permit = door.enter_now(
                    user,
                    "" if user else self._client.remote,
                    asked.completion.feature,
                    asked.course.settings.id,
                )
                if permit is None:
                    return False
        except Exception:
            return False
        self._asked = asked
        self._begun = begun = Begun(permit)
        try:
            self._turn_knobs(asked)
            begun.attempt = attempt = self._attempt(asked, ())
        except Exception:  # it will come again, and be said
            self._go_on()
            return True
        assert attempt is not None  # nobody was tried yet
        attempt.relay.begin(self._finish, self._go_on)
        return True

    def client_gone(self) -> None:
        if self._task is not None:
            self._task.cancel()
        if self._is_resting:
            return
        # What was cancelled before its first step does not even end.
        if (attempt := self._begun.attempt) is not None:
            attempt.relay.abandon()
        self.outcome.kind = "client_gone"
        self._finish()

    def _finish(self) -> None:
        """All was said without a task, or nobody is there to hear it."""
        begun, door = self._begun, self._service.admission
        try:
            if begun.attempt is not None:
                self._settle(begun.attempt)
            if door is not None and begun.permit is not None:
                self._leave(door, begun.permit)
        finally:
            self._end()

    def _end(self) -> None:
        self.outcome.status = self.response.status
        try:
            self._service.ended(self.outcome, self.started_s, is_logged=True)
        finally:  # else the connection would wait for ever
            self._client.visited(keep_alive=self.response.keep_alive)

    def _go_on(self) -> None:
        """Let a task do the rest."""
        self._task = self._service.loop.create_task(self._rest())

    async def _rest(self) -> None:
        self._is_resting = True
        self._say_error = self._asked.writer.error_reply
        try:
            await self._carry_out(self._complete(self._asked, self._begun))
        except asyncio.CancelledError:
            self.outcome.kind = "client_gone"
            raise
        except ConnectionError:
            if self.outcome.kind in ("", "ok"):
                self.outcome.kind = "client_gone"
            self.response.keep_alive = False
        finally:
            self._end()
