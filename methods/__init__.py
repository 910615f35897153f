"""Federated methods, one paper a file: pure tensor mathematics, no Ray, no files, no tracker.

A method is registered by one line here: its name in an experiment, and where its class stands. So are the controllers,
which decide what each client may spend in a round. Nothing heavy is imported until one is asked for.
"""

CATALOGUE = {
    "fedavgm": "fedloom.methods.fedavgm:FedAvgM",
    "fedopt": "fedloom.methods.fedopt:FedOpt",
    "fedex": "fedloom.methods.fedex:FedExLoRA",
    "flasc": "fedloom.methods.flasc:FLASC",
    "florg": "fedloom.methods.florg:FLoRG",
    "flora": "fedloom.methods.flora:FLoRA",
    "hetlora": "fedloom.methods.hetlora:HetLoRA",
    "per_index": "fedloom.methods.per_index:PerIndex",
    "raflora": "fedloom.methods.raflora:RaFLoRA",
    "lora_a2": "fedloom.methods.lora_a2:LoRAA2",
    "lora_fair": "fedloom.methods.lora_fair:LoRAFair",
    "fedmomentum": "fedloom.methods.fedmomentum:FedMomentum",
    "fedrot": "fedloom.methods.fedrot:FedRot",
    "local_only": "fedloom.methods.local_only:LocalOnly",
    "fedsa": "fedloom.methods.fedsa:FedSA",
    "fed_plora": "fedloom.methods.fed_plora:FedPLoRA",
    "fedhl": "fedloom.methods.fedhl:FedHL",
    "rolora": "fedloom.methods.rolora:RoLoRA",
    "zero_padding": "fedloom.methods.zero_padding:ZeroPadding",
    "fed_sb": "fedloom.methods.fed_sb:FedSB",
    "ravan": "fedloom.methods.ravan:RAVAN",
    "ffa": "fedloom.methods.ffa:FFALoRA",
    "fedit": "fedloom.methods.fedit:FedIT",
    "flexlora": "fedloom.methods.flexlora:FlexLoRA",
    "florist": "fedloom.methods.florist:FLoRIST",
    "fslora": "fedloom.methods.fslora:FSLoRA",
    "head_only": "fedloom.methods.head_only:HeadOnly",
    "soft": "fedloom.methods.soft:SOFT",
}

CONTROLLERS = {
    "fixed": "fedloom.methods.controllers:Fixed",
    "greedy_deadline": "fedloom.methods.controllers:GreedyDeadline",
    "tsfa": "fedloom.methods.tsfa:TSFA",
}
