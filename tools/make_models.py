"""Make a tiny random checkpoint of every model family: ``python tools/make_models.py [DIRECTORY] [FAMILY ...]``."""

import sys
import time
from pathlib import Path

from kvbaton.conformance.families import FAMILIES, write_model


def main() -> None:
    directory = Path(sys.argv[1] if len(sys.argv) > 1 else "build/models")
    for family in sys.argv[2:] or FAMILIES:
        started = time.perf_counter()
        write_model(family, directory / family)
        print(f"{directory / family}: {time.perf_counter() - started:.1f} s")


if __name__ == "__main__":
    main()
