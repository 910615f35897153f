"""What a tracked run logs beside the rounds' own metrics."""

from fedloom.platform.recording import over_costs


def test_evaluations_are_logged_over_simulated_seconds_and_megabytes():
    metrics = {"eval/accuracy": 0.5, "eval/loss": 1.0, "sim/seconds": 7.9, "bytes/total": 3_999_999, "seconds": 1.0}
    assert over_costs(metrics) == [
        (7, {"over_sim_seconds/accuracy": 0.5, "over_sim_seconds/loss": 1.0}),
        (3, {"over_megabytes/accuracy": 0.5, "over_megabytes/loss": 1.0}),
    ]


def test_without_an_evaluation_or_a_clock_there_is_nothing_to_draw():
    assert over_costs({"sim/seconds": 7.9, "bytes/total": 1e6}) == []
    assert over_costs({"eval/loss": 1.0}) == [(0, {"over_megabytes/loss": 1.0})]
