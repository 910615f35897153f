"""The simulated clock: seconds from bytes, operations and links, and what the deadline cuts."""

import dataclasses
import math

import pytest
from small import make_data, make_experiment, save_llama

from fedloom.platform.data.federated import collate
from fedloom.platform.experiment import TrainingSection
from fedloom.platform.preparation import assemble
from fedloom.platform.trainer import batches
from fedloom.platform.world.clock import Timing, elapsed, flop_of, lateness, training_tokens

TIMING = Timing(
    downlink_bit_per_s=8e6,
    delay_down_s=0.5,
    flop=4e9,
    flop_per_rank=1e9,
    speed_flop_per_s=2e9,
    power_w=10.0,
    uplink_bit_per_s=4e6,
    delay_up_s=0.25,
    transmit_power_w=2.0,
    deadline_s=10.0,
)


def test_seconds_are_bytes_over_rates_and_operations_over_speed():
    times = elapsed(TIMING, rank=2, bytes_down=3_000_000, bytes_up=1_000_000)

    assert times.download_s == 3.0 + 0.5
    assert times.flop == 6e9
    assert times.compute_s == 3.0
    assert times.upload_s == 2.0 + 0.25
    assert times.total_s == 8.75
    assert times.energy_j == 10.0 * 3.0 + 2.0 * 2.25


def test_before_the_upload_nothing_of_it_is_counted():
    times = elapsed(TIMING, rank=2, bytes_down=3_000_000, bytes_up=None)
    assert (times.upload_s, times.total_s) == (0.0, 6.5)


def test_unlimited_links_and_machines_take_no_time():
    free = Timing(
        downlink_bit_per_s=math.inf,
        delay_down_s=0.0,
        flop=1e12,
        flop_per_rank=1e12,
        speed_flop_per_s=math.inf,
        uplink_bit_per_s=math.inf,
        delay_up_s=0.0,
    )
    assert elapsed(free, rank=8, bytes_down=10**9, bytes_up=10**9).total_s == 0.0


def test_a_dead_link_takes_for_ever():
    dead = dataclasses.replace(TIMING, uplink_bit_per_s=0.0)
    times = elapsed(dead, rank=2, bytes_down=1, bytes_up=1)
    assert times.total_s == math.inf
    assert lateness(dead, times) is not None


@pytest.mark.parametrize(("bytes_up", "late"), [(1_625_000, False), (1_625_001, True)])
def test_an_update_at_the_deadline_is_in_time(bytes_up, late):
    """6.5 s before the upload, 0.25 s delay: 3.25 s are left, which is 1,625,000 bytes."""
    times = elapsed(TIMING, rank=2, bytes_down=3_000_000, bytes_up=bytes_up)
    assert (lateness(TIMING, times) is not None) == late


@pytest.mark.parametrize("settings", [{"steps": 7}, {"epochs": 2}, {}])
def test_tokens_are_those_of_the_batches_that_are_trained(settings):
    data = make_data()
    training = TrainingSection(batch_size=4, **settings)

    counted = training_tokens(data, training, "c1", seed=3)

    trained = [collate(data, indices)["input_ids"] for indices in batches(data.clients["c1"], training, 3)]
    assert counted == sum(batch.numel() for batch in trained) > 0


def test_operations_of_a_small_llama_by_hand(tmp_path):
    """Two blocks of 16 hidden features, 8 of keys and values, 24 in the MLP, and a head of three classes."""
    prepared = assemble(make_experiment(save_llama(tmp_path / "llama")), make_data())

    flop, flop_per_rank = flop_of(100, prepared.base_parameters, prepared.shapes)

    attention, mlp, head = 2 * 16 * 16 + 2 * 8 * 16, 3 * 16 * 24, 3 * 16
    assert flop == 4 * 100 * (2 * (attention + mlp) + head)
    assert flop_per_rank == 6 * 100 * 2 * ((16 + 16) + (16 + 8))  # q_proj and v_proj of each block
