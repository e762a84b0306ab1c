"""What the tests talk to and talk with: raw servers, raw clients, strict readers.

Nothing here uses an HTTP library: the bytes that a test gives are the bytes that are
sent, and the bytes that arrive are the bytes that a test sees.
"""
