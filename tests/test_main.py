"""The command line, run as a user runs it."""

import asyncio
import json
import signal
import sys
from pathlib import Path

import pytest

from proxy.__main__ import main
from proxy.probe import probe
from tests.support.client import request
from tests.support.cody import read_chat
from tests.support.fixtures import QUESTION
from tests.support.instance import PRIVATE, CommandLine
from tests.support.process import ENVIRON, serve
from tests.support.upstream import (
    Hang,
    ScriptedUpstream,
    chunk,
    json_reply,
    openai_chunks,
    sse,
    sse_head,
)

DATA = Path(__file__).parent / "data"


async def chat(url: str, **headers: str) -> str:
    path = "/.api/completions/stream?api-version=2"
    raw = await request(url, path=path, body=QUESTION, headers=headers, within_s=10)
    return read_chat(raw, 2).text


async def test_serve_without_configuration_answers_by_a_simulator():
    async with serve() as running:
        assert "simulator" in await chat(running.url)
        status, out = await running.stop()
    assert status == 0
    (line,) = map(json.loads, out.splitlines())
    assert (line["event"], line["kind"]) == ("exchange", "ok")


async def test_serve_is_all_that_a_cody_client_needs():
    async with serve(COMPLETIONS_PROXY_TOKENS="cp_1") as running:
        client = CommandLine(running.url, "cp_1")
        outcome = await client.chat("hi")
        assert (outcome.ended, outcome.violations) == ("complete", [])
        assert "simulator" in outcome.text
        assert client.sent.total() == 70
        _, log = await running.stop()
        assert PRIVATE not in log + running.said


async def test_serve_in_front_of_tgi(upstream: ScriptedUpstream):
    upstream.script(json_reply({"model_id": "acme/large"}), path="/info")
    upstream.script(sse(*openai_chunks(["Hi"])), path="/v1/chat/completions")
    async with serve("--tgi-url", upstream.url) as running:
        assert "huggingface-tgi" in running.said and "acme/large" in running.said
        assert await chat(running.url) == "Hi"
    assert upstream.last.json()["model"] == "tgi"


async def test_serve_in_front_of_another_server(upstream: ScriptedUpstream):
    upstream.script(json_reply({"detail": "Not Found"}, 404), path="/info")
    models = {"object": "list", "data": [{"id": "org/tiny", "object": "model"}]}
    upstream.script(json_reply(models), path="/v1/models")
    upstream.script(sse(*openai_chunks(["Hi"])), path="/v1/chat/completions")
    async with serve("--tgi-url", f"{upstream.url}/v1/") as running:
        assert "openaicompatible" in running.said
        assert await chat(running.url) == "Hi"
    assert upstream.last.json()["model"] == "org/tiny"


async def test_serve_before_its_upstream_is_up(upstream: ScriptedUpstream):
    await upstream.stop()
    async with serve("--tgi-url", upstream.url) as running:
        assert "connection refused); taken for TGI" in running.said
        await upstream.start(upstream.port)
        upstream.script(sse(*openai_chunks(["Hi"])))
        assert await chat(running.url) == "Hi"


async def test_serve_the_blessed_configuration():
    async with serve("--config", str(DATA / "blessed.jsonc")) as running:
        assert "https://mistral.example.com/v1" in running.said


async def test_serve_with_a_token_from_the_environment():
    async with serve(COMPLETIONS_PROXY_TOKENS="cp_secret_token") as running:
        assert "cp_secret_token" not in running.said
        assert "authorization: token TOKEN" in running.said
        assert await chat(running.url, authorization="token cp_secret_token")
        assert await chat(running.url) == ""


async def test_port_that_is_taken_is_said_in_one_line(upstream: ScriptedUpstream):
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "proxy", "serve", "--listen", f"127.0.0.1:{upstream.port}"),
        stderr=asyncio.subprocess.PIPE,
        env=ENVIRON,
    )
    _, said = await asyncio.wait_for(process.communicate(), 15)
    assert process.returncode == 1
    assert said.decode() == (
        f"error: cannot listen on 127.0.0.1:{upstream.port}: address already in use\n"
    )


def test_check_prints_what_the_configuration_comes_to(capsys):
    assert main(["check", str(DATA / "blessed.jsonc")]) == 0
    said = capsys.readouterr().out
    for word in (
        "mistral::v1::mixtral-8x7b-instruct",
        "bigcode::v1::starcoder2-7b",
        "https://mistral.example.com/v1",
        "http://starcoder.example.com/v1",
        "127.0.0.1:8080",
    ):
        assert word in said


def test_check_lists_every_problem(tmp_path, capsys):
    file = tmp_path / "proxy.yaml"
    file.write_text("lisen: x\nmodelConfiguration: {providerOverrides: 7}\n")
    assert main(["check", str(file)]) == 2
    said = capsys.readouterr().err
    assert "The configuration cannot be used:" in said
    assert 'lisen: unknown key; did you mean "listen"?' in said
    assert "modelConfiguration.providerOverrides: " in said


def test_check_without_a_file(tmp_path, capsys):
    assert main(["check", str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml" in capsys.readouterr().err


@pytest.mark.parametrize("command", [[], ["serve"], ["check"], ["simulate"]])
def test_help_helps(command, capsys):
    with pytest.raises(SystemExit) as caught:
        main([*command, "--help"])
    assert caught.value.code == 0
    assert "completions-proxy" in capsys.readouterr().out


async def test_tgi_url_that_is_none(capsys):
    status = await asyncio.to_thread(main, ["serve", "--tgi-url", "ftp://x"])
    assert status == 2
    assert "--tgi-url: expected the URL of a server" in capsys.readouterr().err


async def test_what_a_server_says_of_itself(upstream: ScriptedUpstream):
    upstream.script(json_reply({}, 404), path="/info")
    listed = {"id": "tiny", "owned_by": "llamacpp", "meta": {"n_ctx_train": 2048}}
    upstream.script(json_reply({"data": [listed]}), path="/v1/models")
    found = await probe(f"{upstream.url.removeprefix('http://')}/v1/chat/completions")
    assert (found.url, found.type) == (f"{upstream.url}/v1", "openaicompatible")
    assert (found.model, found.profile) == ("tiny", "llamacpp")
    assert found.max_input_tokens == 2048
    upstream.script(json_reply({"model_id": "m", "max_input_tokens": 7}), path="/info")
    await probe(upstream.url)
    found = await probe(upstream.url)
    assert (found.model, found.max_input_tokens) == ("m", 7)


async def test_second_signal_stops_at_once(upstream: ScriptedUpstream):
    upstream.script(json_reply({"model_id": "m"}), path="/info")
    chunks = openai_chunks(["Hi"])[:2]
    upstream.script([sse_head(), *map(chunk, chunks), Hang()])
    async with serve("--tgi-url", upstream.url) as running:
        asking = asyncio.create_task(chat(running.url))
        await upstream.received(2)
        await asyncio.sleep(0.1)
        running.process.send_signal(signal.SIGTERM)
        await asyncio.sleep(0.3)
        status, out = await running.stop()
    assert status == 0
    assert json.loads(out)["kind"] == "shutting_down"
    assert await asking == "Hi"


@pytest.mark.parametrize("name", ["dummy", "tgi", "anything"])
async def test_any_model_name_will_do_for_one_server(name):
    async with serve() as running:
        body = {"model": name, "messages": [{"role": "user", "content": "hi"}]}
        raw = await request(running.url, path="/v1/chat/completions", body=body)
    assert raw.status == 200
