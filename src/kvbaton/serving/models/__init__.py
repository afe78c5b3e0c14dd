"""The small models that come with kvbaton, so that a hand-off can be checked without a download.

Each is a directory that ``transformers`` and the serving engines load by its path.
"""

from pathlib import Path

_ROOT = Path(__file__).resolve().parent


def builtin(name: str) -> Path:
    """Return the directory of the bundled model called ``name``.

    Raises ValueError, naming the bundled models, when there is none of that name.
    """
    names = sorted(config.parent.name for config in _ROOT.glob("*/config.json"))
    if name not in names:
        raise ValueError(f"no bundled model {name!r}; there are: {', '.join(names) or 'none'}")
    return _ROOT / name
