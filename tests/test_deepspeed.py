"""Clients that several processes train together: the plain trainer's adapters, no process left behind, no hang."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from small import finished, make_data, make_experiment, save_llama
from typer.testing import CliRunner

from fedloom.jobs.doctor import examine
from fedloom.jobs.main import app
from fedloom.platform.data.federated import NO_LOSS
from fedloom.platform.deepspeed_build import built, library, missing_packages
from fedloom.platform.deepspeed_worker import DeepSpeedWorker
from fedloom.platform.errors import ExperimentError, GroupLostError, MachineError
from fedloom.platform.population import Group, groups_of
from fedloom.platform.preparation import assemble
from fedloom.platform.trainer import parts_of_rank

DATA = make_data()
with_deepspeed = pytest.mark.skipif(
    bool(missing_packages()) or not library().is_file(), reason="needs the extra deepspeed, and `fedloom doctor` once"
)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("models") / "llama")


def together(workers=2, **zero):
    return {"trainer": "deepspeed", "workers": workers, "num_cpus": workers, "deepspeed": {"zero_optimization": zero}}


def with_profiles(llama, profile, **changes):
    profiles = [{"name": f"rank-{rank}", "share": 1, "rank": rank, **profile} for rank in (2, 4)]
    return make_experiment(llama, population={"profiles": profiles}, **changes)


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("size", [None, 1, 2])
def test_the_processes_share_out_a_batch_and_its_mean(world, size):
    """Every example that counts is in one part, shares add up to 1, and all processes have equally many parts."""
    batch = {"input_ids": torch.arange(4), "labels": torch.full((4, 6), NO_LOSS)}
    for row, terms in enumerate((3, 0, 1, 5)):
        batch["labels"][row, 1 : 1 + terms] = 7

    parts = [list(parts_of_rank(batch, rank, world, size)) for rank in range(world)]

    counted = [int(row) for own in parts for part, share in own if share for row in part["input_ids"]]
    assert [row for row in counted if row != 1] == [0, 2, 3]
    assert sum(share for own in parts for _, share in own) == pytest.approx(1)
    assert len({len(own) for own in parts}) == 1
    assert all((part["labels"] != NO_LOSS).any() for own in parts for part, _ in own)


@pytest.mark.parametrize(
    ("profile", "words"),
    [
        ({"workers": 2}, "trainer 'plain'; set trainer: deepspeed"),
        ({"deepspeed": {"steps_per_print": 1}}, "trainer 'plain'; set trainer: deepspeed"),
        (together() | {"num_cpus": 1}, "set num_cpus to at least 2"),
        (together() | {"num_gpus": 1}, "set num_gpus: 2"),
        (together(stage=4), "must be 0, 1, 2 or 3, not 4"),
        (together(stage=2, offload_param={"device": "cpu"}), "offload_param needs zero_optimization.stage 3 or more"),
        (together(stage=3, offload_param={"device": "nvme"}), "offload_param: {device: cpu}"),
        (together() | {"deepspeed": {"bf16": {"enabled": True}}}, "deepspeed.bf16 is decided by model.dtype"),
    ],
)
def test_what_a_trainer_cannot_do_is_refused_with_the_nearest_right_answer(llama, profile, words):
    with pytest.raises(ValidationError) as refusal:
        with_profiles(llama, profile)

    assert words in str(refusal.value)


def test_quantized_weights_are_refused_without_a_gpu_before_anything_starts(llama):
    quantized = {"name": str(llama), "quantization": "4bit"}
    with pytest.raises(ValidationError, match=r"'4bit' needs a GPU and profile 'rank-2' has none; give it a share"):
        with_profiles(llama, {}, model=quantized)
    with pytest.raises(ValidationError, match=r"set model.quantization: none, or trainer: plain"):
        with_profiles(llama, together(workers=1) | {"num_gpus": 1}, model=quantized)
    if not torch.cuda.is_available():
        with pytest.raises(MachineError, match=r"key model.quantization: '4bit' needs a GPU"):
            finished(with_profiles(llama, {"num_gpus": 0.5}, model=quantized))


def test_a_head_of_another_dtype_is_refused_where_it_would_be_cut_up(llama):
    half = {"name": str(llama), "dtype": "bfloat16"}
    with pytest.raises(ValidationError, match=r"set model.dtype: float32, stage: 0, or data.task: causal_lm"):
        with_profiles(llama, together(stage=1), model=half)

    with_profiles(llama, together(stage=0), model=half)
    with_profiles(llama, together(stage=3), model=half, data={"task": "causal_lm"})


def test_profiles_that_share_actors_share_their_trainer(llama):
    profiles = [{"name": "a", "share": 1, "num_cpus": 2}, {"name": "b", "share": 1, **together()}]

    with pytest.raises(ExperimentError, match="'a' and 'b' ask for the same machine"):
        groups_of(make_experiment(llama, population={"profiles": profiles}))


def test_the_doctor_says_what_is_there_and_what_helps():
    """Every line has what was found, or words that help; nothing is compiled unless it is asked for."""
    done = CliRunner().invoke(app, ["doctor", "--no-compile"])

    assert done.exit_code == 0, done.output
    assert torch.__version__ in done.output
    assert ("fedloom[deepspeed]" in done.output) == bool(missing_packages())
    assert all(finding.found or finding.remedy for finding in examine(compile_parts=False, limit_s=1))


HANGS = """
import os, pathlib, signal, sys
folder = pathlib.Path(os.environ["TORCH_EXTENSIONS_DIR"]) / "op"
folder.mkdir()
(folder / "lock").touch()
(folder / "op.so").write_text("half")
print(os.getpid(), file=open(sys.argv[1], "w"), flush=True)
signal.pause()
"""
WORKS = """
import os, pathlib
folder = pathlib.Path(os.environ["TORCH_EXTENSIONS_DIR"]) / "op"
folder.mkdir()
(folder / "op.so").write_text("whole")
"""


def test_a_compile_that_takes_too_long_or_is_killed_makes_nobody_wait(tmp_path):
    """Neither its lock nor its half of a library is met again."""
    target, said = tmp_path / "cache" / "op" / "op.so", tmp_path / "said"
    hangs = [sys.executable, "-c", HANGS, str(said)]
    with pytest.raises(MachineError, match=r"took more than 2 s and was stopped; `fedloom doctor` tries again"):
        built(target, hangs, limit_s=2)
    os.mkfifo(said.with_suffix(".fifo"))
    hangs[-1] = str(said.with_suffix(".fifo"))
    script = f"from fedloom.platform.deepspeed_build import *; built(Path({str(target)!r}), {hangs!r}, limit_s=170)"
    builder = subprocess.Popen([sys.executable, "-c", script])
    compiler = int(Path(hangs[-1]).read_text())  # which waits until it is at work
    builder.kill()
    builder.wait()
    os.kill(compiler, signal.SIGKILL)

    built(target, [sys.executable, "-c", WORKS], limit_s=10)

    assert target.read_text() == "whole"
    assert not list(target.parent.parent.glob("building-*"))
    assert not (target.parent / "lock").exists()
    with pytest.raises(MachineError, match=r"cannot be compiled .*: no such flag"):
        built(tmp_path / "b" / "op" / "op.so", [sys.executable, "-c", "raise SystemExit('no such flag')"], limit_s=60)


@with_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize(("stage", "optimizer"), [(0, {}), (3, {"optimizer": "sgd", "learning_rate": 0.5})])
def test_deepspeed_gives_what_the_plain_trainer_gives(llama, stage, optimizer):
    """Two processes, uneven shares of a batch, micro-batches, a penalty, another rank in every client.

    Stage 3 multiplies in another order, and AdamW would make steps of the rounding of gradients that are nearly zero.
    """
    training = {"learning_rate": 0.01, "batch_size": 5, "micro_batch_size": 2, "steps": 3, "schedule": "linear"}
    training |= optimizer
    changes = {"method": {"name": "soft"}, "training": training, "rounds": 2}
    rounds, plain = finished(with_profiles(llama, {}, **changes))

    ours, adapter = finished(
        with_profiles(
            llama, together(stage=stage), **changes | {"training": training | {"gradient_checkpointing": True}}
        )
    )

    for name, tensor in plain.tensors().items():
        torch.testing.assert_close(adapter.tensors()[name], tensor, rtol=1e-3, atol=1e-4)
    for left, right in zip(rounds, ours, strict=True):
        assert left.metrics["eval/loss"] == pytest.approx(right.metrics["eval/loss"], abs=1e-5)
        assert {record.client: record.loss for record in left.records} == pytest.approx(
            {record.client: record.loss for record in right.records}, abs=1e-5
        )


@with_deepspeed
@pytest.mark.slow
def test_a_process_that_dies_ends_its_group_at_once(llama):
    experiment = with_profiles(llama, together())
    worker = DeepSpeedWorker(
        assemble(experiment, DATA).spec, DATA, group=Group(workers=2, options="{}"), device="cpu", threads=2
    )
    first, second = worker.pids()
    os.kill(second, signal.SIGKILL)

    with pytest.raises(GroupLostError, match=r"process 1|one has ended"):
        worker.initial_head(0)

    assert not worker.pids()
    with pytest.raises(ProcessLookupError):
        os.kill(first, 0)
