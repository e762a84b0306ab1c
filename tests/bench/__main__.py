"""Run the benchmarks: ``python -m tests.bench [name ...]``."""

import sys

from tests.bench import limits, requests, sse, translate

BENCHMARKS = {
    "sse": sse.run,
    "translate": translate.run,
    "limits": limits.run,
    "requests": requests.run,
}


def main(names: list[str]) -> None:
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown:
        sys.exit(
            f"no benchmark {', '.join(unknown)}; there are: {', '.join(BENCHMARKS)}"
        )
    for name in names or BENCHMARKS:
        print(f"== {name} ==\n")
        BENCHMARKS[name]()
        print()


if __name__ == "__main__":
    main(sys.argv[1:])
