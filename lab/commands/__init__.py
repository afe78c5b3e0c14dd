"""The commands of the lab, one module each."""

from __future__ import annotations

from kvbaton.cli.program import Program

LAB = Program(
    name="python -m lab",
    description="What proves kvbaton: faults, endurance, every kind of model, mutation; and what is generated.",
    commands={
        "chaos": (
            "lab.commands.chaos",
            "kill, stop, cut and starve real servers at each phase of a hand-off, and check everybody afterwards",
        ),
        "soak": (
            "lab.commands.soak",
            "hand over many small rooms while peers are killed, and watch what grows",
        ),
        "failover": (
            "lab.commands.failover",
            "kill, stop or end one of two workers under load, and compare every answer with a single process",
        ),
        "policies": (
            "lab.commands.policies",
            "the router's policies in front of the same servers: cache hits, throughput and skew of each",
        ),
        "flood": (
            "lab.commands.flood",
            "flood a running pair in every way known, and watch p99 of honest requests, memory and readiness",
        ),
        "conformance": (
            "lab.commands.conformance",
            "hand over every kind of model between every topology, and compare each token with a single process",
        ),
        "mutate": ("lab.commands.mutate", "make small changes to the protocol, each of which some test must notice"),
        "rules": ("lab.commands.rules", "take each rule of the deployment out of the source; its tests must fail"),
        "mutants": ("lab.commands.mutants", "plant the bugs of the field, and write which seed finds each"),
        "docs": ("lab.commands.docs", "write what is generated in docs/, or check that it is up to date"),
        "models": ("lab.commands.models", "make a tiny random checkpoint of every model family"),
        "wheel": ("lab.commands.wheel", "build the wheel, install it in an empty environment, use it there"),
        "vllm": ("lab.commands.vllm", "run the connector in real vLLM processes, token for token and with failures"),
        "clients": ("lab.commands.clients", "run clients of others, their own code, in front of our servers"),
        "real": ("lab.commands.real", "serve a model that people use, single and as a pair, token for token"),
        "sglang": ("lab.commands.sglang", "run the transfer backend in real SGLang processes, likewise"),
        "layers": ("lab.commands.layers", "measure what layers that go ahead of their chunk are worth"),
        "gpu": ("lab.commands.gpu", "move memory of a GPU between processes, and run the engine on it"),
        "throughput": (
            "lab.commands.throughput",
            "measure the embedded engine against generate, in turns",
        ),
        "revisions": (
            "lab.commands.revisions",
            "measure the embedded engine of an earlier revision against the one here, in turns",
        ),
        "train": ("lab.commands.train", "train the bundled recall model again"),
    },
)
