import pytest

from proxy.redact import Redactor


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Authorization: Bearer abc.def-123", "Authorization: Bearer [redacted]"),
        ("http://h/p?key=AIza99&alt=sse", "http://h/p?key=[redacted]&alt=sse"),
        ("bad api_key=xyz123 given", "bad api_key=[redacted] given"),
        ("sk-ant-api03-abcdefgh is wrong", "[redacted] is wrong"),
        ("my-own-secret is wrong", "[redacted] is wrong"),
        ("my-own-secret-too", "[redacted]"),
        ("the keyboard = fine, token count 5", "the keyboard = fine, token count 5"),
        ("the answer", "the answer"),
    ],
)
def test_redactor_takes_out_credentials_and_nothing_else(text, expected):
    redact = Redactor(["my-own-secret", "my-own-secret-too", "the", ""])
    assert redact(text) == expected


def test_redactor_blanks_headers_by_name():
    headers = {"Authorization": "x", "X-API-Key": "y", "Set-Cookie": "z", "Host": "h"}
    assert Redactor().headers(headers) == {
        "Authorization": "[redacted]",
        "X-API-Key": "[redacted]",
        "Set-Cookie": "[redacted]",
        "Host": "h",
    }
