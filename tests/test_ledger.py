"""The ledger adds up, whatever was refused, and can be read back."""

import dataclasses
import io
import math

import pytest
from pyarrow import parquet

from fedloom.platform.record import Record
from fedloom.platform.world.ledger import clock_totals, ledger_bytes, round_latency_s, totals

QUICK = Record(
    client="quick",
    profile="p",
    rank=4.0,
    num_examples=10,
    bytes_down=100,
    bytes_up=50,
    loss=1.0,
    download_s=1.0,
    compute_s=2.0,
    upload_s=3.0,
    flop=10.0,
)
SLOW = dataclasses.replace(QUICK, client="slow", num_examples=30, loss=3.0, compute_s=8.0, ratio=0.5)
LATE = dataclasses.replace(SLOW, client="late", upload_s=9.0, refused="18 s is past the deadline of 15 s", fault="late")
BROKEN = dataclasses.replace(
    LATE, client="broken", refused="the training loss is nan", fault="not_finite", loss=math.nan
)


def test_bytes_count_for_everybody_and_losses_for_the_accepted():
    assert totals([QUICK, SLOW, LATE, BROKEN]) == {
        "train/loss": (10 * 1.0 + 30 * 3.0) / 40,
        "bytes/down": 400,
        "bytes/up": 200,
        "updates": 2,
        "stragglers": 1,
        "retries": 0,
        "refused/not_finite": 1,
    }


def test_a_round_lasts_as_long_as_its_slowest_accepted_client():
    assert round_latency_s([QUICK, SLOW], None) == SLOW.latency_s == 12.0
    assert round_latency_s([QUICK, BROKEN], None) == 6.0


def test_whoever_is_cut_was_waited_for_until_the_deadline():
    assert round_latency_s([QUICK, LATE], 15.0) == 15.0
    assert round_latency_s([LATE], 15.0) == 15.0
    metrics = clock_totals([QUICK, LATE], 15.0)
    assert metrics["sim/wait_s"] == 15.0 - 6.0


@pytest.mark.parametrize("records", [[QUICK], [QUICK, SLOW], [SLOW, LATE, BROKEN], [LATE], []])
def test_the_parts_of_a_round_add_up_to_its_latency(records):
    metrics = clock_totals(records, 15.0)
    parts = sum(metrics[f"sim/{part}_s"] for part in ("download", "compute", "upload", "wait"))
    assert parts == pytest.approx(metrics["sim/round_s"])
    assert metrics["sim/flop"] == 10.0 * len(records)


def test_an_empty_round_has_totals():
    metrics = totals([])
    assert math.isnan(metrics.pop("train/loss"))
    assert set(metrics.values()) == {0}


def test_the_file_holds_every_field_of_every_record():
    table = parquet.read_table(io.BytesIO(ledger_bytes([(1, [QUICK, LATE]), (2, []), (3, [BROKEN])])))

    assert table.column("round").to_pylist() == [1, 1, 3]
    assert table.column("latency_s").to_pylist() == [6.0, 18.0, 18.0]
    for field in dataclasses.fields(Record):
        values = table.column(field.name).to_pylist()
        expected = [getattr(record, field.name) for record in (QUICK, LATE, BROKEN)]
        assert [repr(value) for value in values] == [repr(value) for value in expected]


def test_a_run_without_a_single_client_has_a_ledger():
    assert parquet.read_table(io.BytesIO(ledger_bytes([]))).num_rows == 0
