"""Small writes that leave together: in order, whole, and not too late."""

import asyncio

from proxy.outbox import SMALL_BYTES, Outbox
from tests.support.client import build_request, connect
from tests.support.fixtures import Starter, model_configuration
from tests.support.upstream import json_reply


class Transport:
    """Only what an outbox asks of one."""

    def __init__(self):
        self.written: list[bytes] = []
        self.is_closed = False
        self.backlog = 0

    def write(self, data: bytes) -> None:
        self.written.append(data)

    def is_closing(self) -> bool:
        return self.is_closed

    def get_write_buffer_size(self) -> int:
        return self.backlog


async def test_writes_of_one_turn_leave_together_at_its_end():
    outbox = Outbox(asyncio.get_running_loop())
    one, two = Transport(), Transport()
    outbox.write(one, b"a")
    outbox.write(two, b"b")
    outbox.write(one, b"c")
    assert one.written == two.written == []
    await asyncio.sleep(0)
    assert (one.written, two.written) == ([b"ac"], [b"b"])
    outbox.write(one, b"d")  # and again
    await asyncio.sleep(0)
    assert one.written == [b"ac", b"d"]


async def test_what_is_long_or_late_goes_out_at_once_behind_what_waits():
    outbox = Outbox(asyncio.get_running_loop())
    one = Transport()
    outbox.write(one, b"a")
    outbox.write(one, b"b" * SMALL_BYTES)
    assert one.written == [b"a" + b"b" * SMALL_BYTES]
    one.backlog = 1
    outbox.write(one, b"c")
    assert one.written[1:] == [b"c"]
    await asyncio.sleep(0)
    assert len(one.written) == 2


async def test_a_transport_that_is_closed_gets_nothing_and_spoils_nothing():
    outbox = Outbox(asyncio.get_running_loop())
    one, two, three = Transport(), Transport(), Transport()
    outbox.write(one, b"a")
    outbox.write(two, b"b")
    outbox.write(three, b"c")
    outbox.flush(two)
    one.is_closed = two.is_closed = True
    await asyncio.sleep(0)
    assert (one.written, two.written, three.written) == ([], [b"b"], [b"c"])


async def test_pipelined_requests_are_answered_in_order(start: Starter, upstream):
    """Those that wait for an upstream, and those that do not."""
    choice = {"message": {"content": "Hello"}, "finish_reason": "stop"}
    upstream.script(json_reply({"choices": [choice]}))
    proxy = await start(model_configuration(upstream.url))
    body = {"messages": [{"role": "user", "content": "hi"}]}
    path = "/v1/chat/completions"
    ask = build_request(proxy.url, "POST", path, {}, body, False)
    health = build_request(proxy.url, "GET", "/healthz", {}, None, False)
    wrong = build_request(proxy.url, "POST", path, {}, b"{", False)
    async with connect(proxy.url) as connection:
        await connection.send((ask + health + wrong) * 3)
        for _ in range(3):
            answer = await connection.reply()
            assert answer.json()["choices"][0]["message"]["content"] == "Hello"
            assert (await connection.reply()).status == 200
            assert (await connection.reply()).status == 400


async def test_a_transport_that_fails_costs_the_others_nothing(caplog):
    class Failing(Transport):
        def write(self, data: bytes) -> None:
            raise RuntimeError("made up")

    outbox = Outbox(asyncio.get_running_loop())
    one, two = Failing(), Transport()
    outbox.write(one, b"a")
    outbox.write(two, b"b")
    await asyncio.sleep(0)
    assert two.written == [b"b"]
    assert "cannot be written" in caplog.text
