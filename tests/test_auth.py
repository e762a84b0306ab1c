import hashlib
import hmac

import pytest
from hypothesis import given, strategies as st

from proxy.auth import Access
from proxy.config import Token
from proxy.errors import Unauthorized


def token(name, text):
    return Token(name, hashlib.sha256(text.encode()).digest())


ALICE = token("alice", "cp_alice")
BOB = token("bob", 'b"ob')
ACCESS = Access([ALICE, BOB], open=False)

ABSENT = "cody is not enabled: not authenticated"
SCHEME = "unrecognized HTTP Authorization request header scheme (known: token, Bearer)"
UNKNOWN = "Invalid access token."


@pytest.mark.parametrize(
    ("header", "found"),
    [
        ("token cp_alice", ALICE),
        ("Bearer cp_alice", ALICE),
        ('token token="cp_alice"', ALICE),
        ("TOKEN cp_alice", ALICE),
        ("bearer cp_alice", ALICE),
        ('Token Token="cp_alice"', ALICE),
        ("  token   cp_alice  ", ALICE),
        ("token\tcp_alice", ALICE),
        ('token token=" cp_alice "', ALICE),
        ('token b"ob', BOB),
    ],
)
def test_check_lets_in(header, found):
    assert ACCESS.check(header) is found


@pytest.mark.parametrize(
    ("header", "text"),
    [
        (None, ABSENT),
        ("", ABSENT),
        ("  ", ABSENT),
        ("cp_alice", SCHEME),
        ("Basic cp_alice", SCHEME),
        ("tokencp_alice", SCHEME),
        ('token-sudo token="cp_alice",user="root"', SCHEME),
        ("token", UNKNOWN),
        ("Bearer ", UNKNOWN),
        ('token token=""', UNKNOWN),
        ("token cp_alic", UNKNOWN),
        ("token cp_alice2", UNKNOWN),
        ("token CP_ALICE", UNKNOWN),
        ("token cp_alice cp_alice", UNKNOWN),
        ('token token="cp_alice", user="root"', UNKNOWN),
        (f"token {ALICE.sha256.hex()}", UNKNOWN),
        ("token \udcff", UNKNOWN),
    ],
)
def test_check_refuses(header, text):
    with pytest.raises(Unauthorized) as caught:
        ACCESS.check(header)
    assert caught.value.message == text
    assert caught.value.status == 401


@pytest.mark.parametrize("header", [None, "", "token x", "Basic x"])
def test_check_when_open(header):
    assert Access([], open=True).check(header) is None


def test_check_without_tokens_lets_nobody_in():
    with pytest.raises(Unauthorized, match="Invalid access token"):
        Access([], open=False).check("token x")


def test_check_never_lets_an_empty_token_in():
    with pytest.raises(Unauthorized, match="Invalid access token"):
        Access([token("empty", "")], open=False).check("token ")


def test_check_takes_bytes_that_are_no_text():
    # What the environment and a header make of the byte 0xff.
    digest = hashlib.sha256(b"cp_\xff").digest()
    found = Access([Token("raw", digest)], open=False).check("token cp_\udcff")
    assert found is not None and found.name == "raw"


def test_check_compares_in_constant_time(monkeypatch):
    compared = []

    def compare(left, right):
        compared.append((left, right))
        return hmac_compare(left, right)

    hmac_compare = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", compare)
    Access([ALICE], open=False).check("token cp_alice")
    assert compared == [(ALICE.sha256, ALICE.sha256)]


def test_two_processes_key_their_tokens_differently():
    other = Access([ALICE], open=False)
    assert set(vars(other)["_tokens"]).isdisjoint(vars(ACCESS)["_tokens"])


@given(st.text(st.characters(codec="utf-8")))
def test_check_of_any_header_lets_in_or_refuses(header):
    try:
        assert ACCESS.check(header) in (ALICE, BOB)
    except Unauthorized as error:
        assert error.message in (ABSENT, SCHEME, UNKNOWN)


@given(st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1))
def test_check_of_any_token(text):
    found = token("any", text)
    access = Access([found], open=False)
    for header in (f"token {text}", f"Bearer {text}"):
        if not text.lower().startswith('token="'):
            assert access.check(header) is found
