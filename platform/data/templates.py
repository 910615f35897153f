"""How an instruction, its input and the answer become a prompt and a completion.

``alpaca`` is the wording of Stanford Alpaca's prompts, which FedIT, FLoRA, FlexLoRA and FLoRIST train on. It is a
format, to the letter; models that were trained on it know it.
"""

from collections.abc import Sequence

_TASK = "Below is an instruction that describes a task"
_ANSWER = "Write a response that appropriately completes the request."
WITH_INPUT = (
    f"{_TASK}, paired with an input that provides further context. {_ANSWER}\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
WITHOUT_INPUT = f"{_TASK}. {_ANSWER}\n\n### Instruction:\n{{instruction}}\n\n### Response:\n"


def alpaca_prompts(instructions: Sequence[str], inputs: Sequence[str] | None) -> list[str]:
    """Return the prompts of instructions; an empty input, or none at all, takes the shorter wording."""
    return [
        WITH_INPUT.format(instruction=instruction, input=given)
        if given
        else WITHOUT_INPUT.format(instruction=instruction)
        for instruction, given in zip(instructions, inputs or [""] * len(instructions), strict=True)
    ]
