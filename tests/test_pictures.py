"""Pictures are drawn from what was measured, and only from that."""

import dataclasses
import math

from fedloom.platform.pictures import pictures
from fedloom.platform.plots import bars, curves
from fedloom.platform.record import Record


def test_accuracy_and_loss_are_drawn_against_rounds_and_against_what_was_spent():
    rounds = [
        (0, {"eval/accuracy": 0.1, "eval/loss": 2.0}, ()),
        (1, {"bytes/total": 5e6, "sim/seconds": 3.0}, ()),
        (2, {"eval/accuracy": 0.4, "eval/loss": 1.0, "bytes/total": 1e7, "sim/seconds": 7.0}, ()),
    ]

    images = pictures(rounds)

    costs = ("round", "bytes", "sim_seconds")
    assert set(images) == {f"{name}_by_{cost}.png" for name in ("accuracy", "loss") for cost in costs}
    for cost, label, end in (("bytes", "megabytes sent so far", 10.0), ("sim_seconds", "simulated seconds", 7.0)):
        points = [(0.0, 0.1), (end, 0.4)]
        expected = curves({"eval/accuracy": points}, x_label=label, y_label="eval/accuracy")
        assert images[f"accuracy_by_{cost}.png"] == expected


def test_what_was_not_measured_is_not_drawn():
    assert pictures([(0, {"eval/loss": 2.0}, ())]).keys() == {"loss_by_round.png"}
    assert pictures([(0, {}, ())]) == {}


def test_the_round_s_time_is_split_and_ranks_are_counted():
    record = Record(client="a", profile="p", rank=2, num_examples=1, bytes_down=1)
    records = (record, record, dataclasses.replace(record, rank=8))
    metrics = {"sim/download_s": 1.0, "sim/compute_s": 2.0, "sim/upload_s": 3.0, "ratio/mean": 0.5}

    images = pictures([(1, metrics, records)])

    assert images.keys() == {"latency_by_round.png", "ratio_by_round.png", "ranks.png"}
    labels = {"x_label": "rank that a client trained", "y_label": "clients, over all rounds"}
    assert images["ranks.png"] == bars({"2": 2.0, "8": 1.0}, **labels)
    split = {name: [(1.0, metrics[name])] for name in ("sim/download_s", "sim/compute_s", "sim/upload_s")}
    assert images["latency_by_round.png"] == curves(split, x_label="round", y_label="simulated seconds")


def test_curves_are_images_that_repeat_to_the_byte():
    points = {"fedit": [(0.0, 0.1), (1.0, math.nan), (2.0, 0.3)], "soft": [(0.5, 0.2)], "empty": []}
    image = curves(points, x_label="round", y_label="accuracy")
    assert image[:8] == b"\x89PNG\r\n\x1a\n"
    assert (int.from_bytes(image[16:20], "big"), int.from_bytes(image[20:24], "big")) == (960, 600)
    assert image == curves(points, x_label="round", y_label="accuracy")
    assert image != curves(points, x_label="round", y_label="loss")
