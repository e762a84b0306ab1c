"""Coverage-guided fuzzing: ``python -m tests.fuzz [TARGET…]``.

Each target runs in a process of its own for FUZZ_SECONDS (60), from its seeds and from
what earlier runs found (.fuzz/). An input that breaks it is printed and kept.
"""

import argparse
import os
import random
import subprocess
import sys
from pathlib import Path

from tests.fuzz.mutate import mutate

KEPT = Path(".fuzz")
MAX_BYTES = 4096
# One input may take so long; what takes longer is a bug as well.
INPUT_S = 10

try:
    import atheris
except ImportError:
    atheris = None


def main() -> int:
    if atheris is None:
        print("atheris is not installed (Linux and Python up to 3.13): nothing to run")
        return 0
    parser = argparse.ArgumentParser("python -m tests.fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="TARGET")
    parser.add_argument("--in-process", metavar="TARGET", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.in_process:
        _fuzz(options.in_process)
        return 0
    from tests.fuzz.targets import TARGETS

    if unknown := set(options.targets) - set(TARGETS):
        parser.error(f"no target {', '.join(unknown)}; there are: {', '.join(TARGETS)}")
    broken = [name for name in options.targets or TARGETS if not _run(name)]
    print("broken:", ", ".join(broken) or "none", flush=True)
    return 1 if broken else 0


def _run(name: str) -> bool:
    """Run one target; return whether it held."""
    print(f"--- {name}", flush=True)
    command = [sys.executable, "-m", "tests.fuzz", "--in-process", name]
    done = subprocess.run(command, stderr=subprocess.PIPE, check=False, text=True)
    lines = done.stderr.splitlines()
    if done.returncode == 0:
        # The last of the statistics (coverage, corpus), and the number of runs.
        shown = [line for line in lines if line.startswith(("#", "Done "))]
        shown = [line for line in shown if not line.startswith("##")][-2:]
    else:
        shown = [line for line in lines if not line.startswith("#")][-60:]
    print("\n".join(shown), flush=True)
    return done.returncode == 0


def _fuzz(name: str) -> None:
    """Fuzz until the time is over; does not return."""
    # Only what is imported within is seen by the fuzzer.
    with atheris.instrument_imports(include=["proxy"]):
        from tests.fuzz.targets import TARGETS
    target = TARGETS[name]
    corpus = KEPT / "corpus" / name
    corpus.mkdir(parents=True, exist_ok=True)
    (KEPT / "broken").mkdir(exist_ok=True)
    for number, seed in enumerate(target.seeds):
        (corpus / f"seed-{number}").write_bytes(seed)

    def run(data: bytes) -> None:
        try:
            target.run(data)
        except BaseException:
            print(f"breaks {name}: {data!r}", file=sys.stderr)
            raise

    def change(data: bytes, most: int, number: int) -> bytes:
        rng = random.Random(number)
        changed = None if rng.random() < 0.2 else mutate(data, rng)
        if changed is None or len(changed) > most:
            changed = atheris.Mutate(data, most)
        return bytes(changed)

    arguments = [
        f"-max_total_time={os.environ.get('FUZZ_SECONDS', '60')}",
        f"-max_len={MAX_BYTES}",
        f"-timeout={INPUT_S}",
        f"-artifact_prefix={KEPT}/broken/{name}-",
        str(corpus),
    ]
    atheris.Setup([name, *arguments], run, custom_mutator=change)
    atheris.Fuzz()


if __name__ == "__main__":
    sys.exit(main())
