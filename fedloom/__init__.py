"""Federated LoRA fine-tuning over unequal machines.

The rooms of the house are ``fedloom.platform`` (runtime), ``fedloom.methods`` (one paper a file), ``fedloom.tuning``
(comparisons and sweeps) and ``fedloom.jobs`` (command line and presets). They stand at the repository root and are
linked here, so that they are one import package.
"""

__version__ = "0.1.0"
