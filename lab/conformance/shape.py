"""What a server of the table is: its half of a pair, its ranks, its pages."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Shape:
    """How a server is started: its half of the pair, its ranks, its pages. ``staged``: all goes through staging.
    ``layered``: every layer goes ahead of its chunk by itself.

    ``chooses``: it takes its data-parallel ranks in turn, so that the other side must ask which one has a room.
    """

    mode: str = "null"
    tensor: int = 1
    pipeline: int = 1
    page_size: int = 16
    radix: bool = False
    staged: bool = False
    layered: bool = False
    data: int = 1
    chooses: bool = False

    @property
    def arguments(self) -> list[str]:
        words = ["--disaggregation-mode", self.mode, "--page-size", str(self.page_size)]
        words += ["--tensor-parallel-size", str(self.tensor), "--pipeline-parallel-size", str(self.pipeline)]
        words += ["--data-parallel-size", str(self.data)]
        words += ["--load-balance-method", "round_robin"] if self.chooses else []
        words += ["--staging", "always"] if self.staged else []
        words += ["--layers-ahead", "always"] if self.layered else []
        return [*words, *(["--disaggregation-decode-enable-radix-cache"] if self.radix else [])]

    def __str__(self) -> str:
        parts = [f"TP {self.tensor}", f"PP {self.pipeline}" * (self.pipeline > 1), f"page {self.page_size}"]
        parts += [f"DP {self.data}" * (self.data > 1), "in turn" * self.chooses]
        parts += ["prefix cache" * self.radix, "staged" * self.staged, "layer by layer" * self.layered]
        return f"{self.mode} ({', '.join(part for part in parts if part)})"
