"""Wire formats, one module each.

A dialect that a client speaks parses requests and writes replies; one that an
upstream speaks builds requests and reads replies; most can do both. What they have
in common is in ``base``; the error shapes that upstreams mix freely, in ``fault``.
"""
