"""Which tokens of a sliding window move: computed once, by the target, and written into its grant.

The source never computes it. It submits what it still holds, and the grant cuts; where it holds less than the grant
asks for, the room fails by name.
"""

from __future__ import annotations

import math

from kvbaton.errors import LayoutError


def window_range(
    token_count: int, window: int, *, prefix: int = 0, target_page: int, source_page: int | None = None
) -> range:
    """Tokens that a target grants in a window pool, for a prompt of ``token_count`` tokens.

    From ``floor(max(prefix, token_count - window))`` to the end, where floor goes to the granularity that both page
    sizes have in common, so that a source that keeps whole pages of the window holds all of it. Where the source's
    page size is unknown, to the target's page: the source must then hold as much before the window. With
    ``prefix == token_count`` the target holds everything and the range is empty.

    Args:
        window: tokens of the pool's window (:attr:`kvbaton.layout.Pool.window`); 0: all tokens.
        prefix: tokens that the target's window pool holds already; a multiple of its page, or the whole prompt.
    """
    if token_count < 0 or window < 0 or target_page < 1 or (source_page is not None and source_page < 1):
        raise LayoutError(
            f"a window of {window} tokens over {token_count} tokens in pages of {target_page} and {source_page} tokens "
            "makes no sense: counts must not be negative, page sizes must be positive"
        )
    if not 0 <= prefix <= token_count or (prefix % target_page and prefix != token_count):
        raise LayoutError(
            f"a prefix of {prefix} of {token_count} tokens is not whole pages of {target_page} tokens; round it down"
        )
    if prefix == token_count:
        return range(token_count, token_count)
    granularity = math.gcd(target_page, source_page) if source_page is not None else target_page
    start = max(prefix, token_count - window if window else 0)
    return range(start // granularity * granularity, token_count)
