"""Complaints about a kernel's text that running it cannot bring up."""

from .signature import KernelText, Signature


def lint(kernel: KernelText, source: Signature) -> list[str]:
    raise NotImplementedError("lint is not there yet")
