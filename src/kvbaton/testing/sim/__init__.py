"""A seeded simulator that tries to break the protocol: real facade, driver, core and plan, simulated everything else.

One seed makes one :class:`~kvbaton.testing.sim.scenario.Scenario` (topologies, requests, faults: plain data), one
scenario makes one run (``world.run``), and every run has one outcome: the first violation of an invariant, or none.
Nothing here sleeps, reads a clock or starts a thread. Above it: ``campaign`` runs many seeds on all cores, ``shrink``
makes a failing scenario small, ``coverage`` draws which cells of the transition table were reached.
"""
