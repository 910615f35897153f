"""An experiment file is refused whole, with the place, the value and the remedy, or it is run as it stands."""

import contextlib
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedloom.jobs.presets import experiment_path, preset_titles
from fedloom.platform.errors import ExperimentError, FedloomError
from fedloom.platform.experiment import Experiment
from fedloom.platform.experiment_file import experiment_yaml, load_experiment, validated, with_method


@pytest.fixture
def write(tmp_path):
    def writer(text):
        path = tmp_path / "mine.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return writer


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "training: {learnig_rate: 1}",
            r"mine\.yaml, key training\.learnig_rate: unknown key\. Did you mean 'learning",
        ),
        ("rond: 3", r"key rond: unknown key\. Did you mean 'rounds'\? Known: name, seed, rounds"),
        ("rounds: 0", "key rounds: 0 is not allowed: input should be greater than or equal to 1"),
        ("rounds: many", "key rounds: 'many' is not allowed: input should be a valid integer"),
        ("data: {task: regression}", "key data.task: 'regression' is not allowed: input should be 'classification' or"),
        ("training: {steps: 1, epochs: 2}", r"key training: training\.steps and training\.epochs exclude each other"),
        ("partition: {kind: iid}", "key partition: partition.kind 'iid' needs num_clients, e.g. num_clients: 20"),
        ("cohort: {size: 2, min_updates: 3}", "cohort.min_updates is 3 but a cohort has only 2 clients"),
        ("population: {profiles: []}", "population.profiles is empty"),
        ("population: {profiles: [{name: a, share: 1, cpu: 2}]}", r"profiles\.0\.cpu: unknown key.*num_cpus"),
        ("population: {profiles: [{name: a}]}", "profile 'a' needs either share or count"),
        (
            "population: {profiles: [{name: a, share: 1}, {name: a, share: 1}]}",
            "population.profiles names 'a' twice",
        ),
        ("method: {name: flexlor}", r"key method\.name: no method called 'flexlor'\. Did you mean 'flexlora'\? Known:"),
        ("method: {name: florist, ta: 1}", r"key method\.ta: the method 'florist' has no such option\..*tau"),
        (
            "method: {name: florist, tau: 2}",
            r"key method\.tau: 2 is not allowed: input should be less than or equal to 1",
        ),
        ("method: {name: fedit, tau: 1}", r"the method 'fedit' has no such option.* It has none\."),
        ("- a list", "it must be a mapping of keys, not a list"),
        ("a: [", "not valid YAML"),
        ("rounds: 1\nrounds: 2", "the key 'rounds' stands twice"),
    ],
)
def test_what_is_wrong_is_named_with_its_remedy(write, text, message):
    with pytest.raises(ExperimentError, match=message):
        load_experiment(write(text))


def test_all_mistakes_are_told_at_once(write):
    with pytest.raises(ExperimentError) as error:
        load_experiment(write("rounds: 0\nseed: -1\ncohort: {size: x}"))

    assert len(str(error.value).splitlines()) == 3


def test_overrides_reach_every_depth_and_are_validated_like_the_file(write):
    path = write("method: {name: florist}\npopulation: {profiles: [{name: a, share: 1, rank: 4}]}")

    experiment = load_experiment(
        path, ["method.tau=0.5", "population.profiles.0.rank=2", "training.max_grad_norm=null", "name=x=y"]
    )

    assert experiment.method.options == {"tau": 0.5}
    assert experiment.population.profiles[0].rank == 2
    assert experiment.training.max_grad_norm is None
    assert experiment.name == "x=y"
    with pytest.raises(ExperimentError, match=r"key training\.batchsize: unknown key"):
        load_experiment(path, ["training.batchsize=3"])


def test_switches_can_be_turned_off_and_lists_stay_whole(write):
    """A published parser takes any text for true, and a word in place of a list for its letters."""
    path = write("training: {gradient_checkpointing: true}\nadapter: {targets: [q_proj]}")

    assert not load_experiment(path, ["training.gradient_checkpointing=false"]).training.gradient_checkpointing
    assert load_experiment(path, ["adapter.targets=[q_proj, v_proj]"]).adapter.targets == ("q_proj", "v_proj")
    for override in ("training.gradient_checkpointing=nope", "adapter.targets=q_proj"):
        with pytest.raises(ExperimentError, match=f"key {override.partition('=')[0]}"):
            load_experiment(path, [override])


def test_another_method_leaves_the_options_of_the_first_behind(write):
    path = write("method: {name: florist, tau: 0.5}")

    assert load_experiment(path, ["method.name=soft", "method.keep_ratio=0.5"]).method.options == {"keep_ratio": 0.5}
    assert load_experiment(path, ["method.name=florist"]).method.options == {"tau": 0.5}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rounds", "write it as key=value"),
        ("=3", "write it as key=value"),
        ("population.profiles.7.rank=2", "'7' cannot be looked up in a list of 1; count from 0"),
        ("seed.x=2", "seed is a int and has no keys|'x' cannot be looked up|seed"),
        ("rounds=[", "the value is not valid YAML"),
    ],
)
def test_wrong_overrides_are_refused(write, override, message):
    path = write("seed: 1\npopulation: {profiles: [{name: a, share: 1, rank: 4}]}")

    with pytest.raises(ExperimentError, match=message):
        load_experiment(path, [override])


def test_a_resolved_experiment_reads_back_as_itself(write):
    """Every default is written out, and hash and value survive."""
    experiment = load_experiment(write("method: {name: florist, tau: 0.8}\nrounds: 3"))

    again = load_experiment(write(experiment_yaml(experiment)))

    assert again == experiment
    assert again.hash == experiment.hash
    assert len({experiment.hash, Experiment().hash, with_method(experiment, "fedit", {}, place="").hash}) == 3


@pytest.mark.parametrize("name", list(preset_titles()))
def test_every_preset_is_valid_and_says_what_it_is(name):
    assert len(preset_titles()[name]) > 10
    assert load_experiment(experiment_path(name)).rounds >= 1


def test_an_unknown_preset_is_refused_with_the_nearest():
    with pytest.raises(ExperimentError, match=r"no such preset\. Did you mean 'demo'\?"):
        experiment_path("demoo")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from([*Experiment.model_fields, "x"]), JSON, max_size=4))
def test_no_document_gives_anything_but_an_experiment_or_an_error_of_ours(document):
    with contextlib.suppress(FedloomError):
        validated(document, place="fuzzed")


@given(st.text(max_size=60))
def test_no_text_gives_anything_but_an_experiment_or_an_error_of_ours(text):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "fuzzed.yaml"
        path.write_text(text, encoding="utf-8", errors="ignore")
        with contextlib.suppress(FedloomError):
            load_experiment(path)
