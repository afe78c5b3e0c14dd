"""What layers that go ahead of their chunk are worth: real engines, real NIXL, with and without.

- :mod:`lab.layers.ranks`: one process of the measurement, a prefill or a decode engine
- :mod:`lab.layers.measure`: the three of them, prompts in turns, medians
- :mod:`lab.layers.accelerator`: the same with computing that takes none of the cores
- :mod:`lab.layers.case`, :mod:`lab.layers.plot`: what was measured, and the picture
"""
