"""Federated methods, one paper a file: pure tensor mathematics, no Ray, no files, no tracker.

A method is registered by one line here: its name in an experiment, and where its class stands. Nothing heavy is
imported until a method is asked for.
"""

CATALOGUE = {
    "fedit": "fedloom.methods.fedit:FedIT",
    "flexlora": "fedloom.methods.flexlora:FlexLoRA",
    "florist": "fedloom.methods.florist:FLoRIST",
    "fslora": "fedloom.methods.fslora:FSLoRA",
    "head_only": "fedloom.methods.head_only:HeadOnly",
    "soft": "fedloom.methods.soft:SOFT",
}
