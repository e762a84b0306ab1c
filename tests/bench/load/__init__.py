"""The proxy under load, beside nginx in front of the same simulator.

``python -m tests.bench.load`` (``make load``). What counts is the CPU time of each
proxy's processes, as a ratio to nginx's in the same round: per request it survives a
busy machine, which wall-clock does not.
"""
