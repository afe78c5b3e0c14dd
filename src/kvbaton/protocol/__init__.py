"""The protocol, sans-IO: ``Core.handle(event, now) -> effects``. No threads, sockets, clocks, env, logging or torch.

``session`` is what two ranks know of each other, ``transfer`` one attempt of one pair to fill one room, ``room`` what
an engine sees: all pairs of a room together. ``core`` owns the tables and routes events to them.
"""
