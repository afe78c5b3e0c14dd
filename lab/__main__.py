"""``python -m lab COMMAND``, from the root of the repository."""

import sys

from lab.commands import LAB

if __name__ == "__main__":
    sys.exit(LAB.main())
