"""``fedloom doctor``: what this machine offers to clients, what it lacks, and DeepSpeed's C++ part compiled."""

import importlib.metadata
import importlib.util
import os
import platform
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from fedloom.jobs.display import bytes_in_words
from fedloom.platform.deepspeed_build import INSTALL, compiler, ensure_built, library, missing_packages
from fedloom.platform.quantization import INSTALL as INSTALL_QUANTIZATION


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line of the report: what was looked for, what was found, and what helps where it is not there."""

    subject: str
    found: str | None
    remedy: str = ""


def examine(*, compile_parts: bool, limit_s: float) -> list[Finding]:
    """Look at this machine, and compile DeepSpeed's C++ part where that is wanted and can be done.

    Raises:
        MachineError: the compiler failed or took longer than ``limit_s``.
    """
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return [
        Finding(subject="Python", found=platform.python_version()),
        Finding(subject="PyTorch", found=str(torch.__version__)),
        Finding(subject="CPUs", found=str(os.cpu_count())),
        Finding(subject="memory", found=bytes_in_words(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))),
        Finding(subject="GPUs", found=", ".join(gpus) or None, remedy=_without_gpus()),
        _package("bitsandbytes", f"for model.quantization: {INSTALL_QUANTIZATION}"),
        _package("deepspeed", f"for trainer: deepspeed: {INSTALL}"),
        _package("ninja", f"for trainer: deepspeed: {INSTALL}"),
        Finding(subject="C++ compiler", found=compiler(), remedy="for trainer: deepspeed: apt-get install g++"),
        _compiled(compile_parts=compile_parts, limit_s=limit_s),
    ]


def show(findings: list[Finding]) -> None:
    """Print the report."""
    table = Table("", Column("found", overflow="fold"), "what helps", box=None)
    for finding in findings:
        table.add_row(finding.subject, escape(finding.found or "no"), "" if finding.found else escape(finding.remedy))
    Console().print(table, highlight=False)


def _package(name: str, remedy: str) -> Finding:
    found = importlib.metadata.version(name) if importlib.util.find_spec(name) is not None else None
    return Finding(subject=name, found=found, remedy=remedy)


def _without_gpus() -> str:
    if torch.version.cuda is None:
        return "this PyTorch is built for CPUs; for model.quantization, and profiles with num_gpus"
    return "no CUDA device answers; for model.quantization, and profiles with num_gpus"


def _compiled(*, compile_parts: bool, limit_s: float) -> Finding:
    subject = "DeepSpeed's C++ part"
    if missing_packages():
        return Finding(subject=subject, found=None, remedy="comes after the package deepspeed")
    if compile_parts and compiler() is not None:
        return Finding(subject=subject, found=str(ensure_built(limit_s=limit_s)))
    built = str(library()) if library().is_file() else None
    return Finding(subject=subject, found=built, remedy="a C++ compiler, and `fedloom doctor` without --no-compile")
