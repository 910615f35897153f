"""Groups and their labels, spectra, and published numbers."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recorded import adapter_files

from fedloom.jobs.presets import experiment_path, reference_path
from fedloom.platform.experiment_file import load_experiment
from fedloom.platform.peft_read import load_adapter
from fedloom.platform.tracked_run import flatten
from fedloom.tuning.comparison.groups import Group, labels_of
from fedloom.tuning.comparison.reference import read_reference
from fedloom.tuning.comparison.runs import ComparisonError, spectra_of

GIVEN = {"method.name": "fedit", "rounds": "3", "training.learning_rate": "0.01"}
EXPERIMENTS = st.lists(
    st.dictionaries(
        st.sampled_from(["a.rank", "b.rank", "rank", "method.tau", "rounds"]),
        st.sampled_from(["1", "2", "x" * 50, "x" * 51]),
    ).flatmap(lambda rest: st.sampled_from(["fedit", "florist"]).map(lambda name: {"method.name": name, **rest})),
    min_size=1,
    max_size=6,
    unique_by=lambda experiment: tuple(sorted(experiment.items())),
)


def test_a_label_names_what_differs_and_nothing_else():
    assert labels_of([GIVEN]) == ["fedit"]
    assert labels_of([GIVEN, GIVEN | {"method.name": "soft"}]) == ["fedit", "soft"]
    assert labels_of([GIVEN, GIVEN | {"rounds": "4"}]) == ["rounds=3", "rounds=4"]
    assert labels_of([GIVEN, GIVEN | {"rounds": "4", "method.name": "soft"}]) == ["fedit rounds=3", "soft rounds=4"]


def test_an_option_is_named_where_its_method_varies_it():
    """A method's own options differ from another method's by nature; that is in its name."""
    florist = GIVEN | {"method.name": "florist", "method.tau": "0.9"}

    assert labels_of([GIVEN, florist]) == ["fedit", "florist"]
    assert labels_of([GIVEN, florist, florist | {"method.tau": "0.8"}]) == [
        "fedit",
        "florist tau=0.9",
        "florist tau=0.8",
    ]


def test_keys_are_shortened_as_far_as_they_stay_apart():
    one = {"method.name": "fedit", "profiles.phone.rank": "2", "profiles.server.rank": "8", "training.steps": "1"}
    other = {"method.name": "fedit", "profiles.phone.rank": "4", "profiles.server.rank": "9", "training.steps": "2"}

    assert labels_of([one, other])[0] == "phone.rank=2 server.rank=8 steps=1"


@settings(max_examples=40)
@given(EXPERIMENTS)
def test_different_experiments_have_different_labels(experiments):
    assert len(set(labels_of(experiments))) == len(experiments)


@pytest.mark.parametrize("rank", [1, 4, 12])
def test_spectra_are_those_of_the_dense_product(rank, tmp_path):
    """Scale * B A formed and decomposed, module by module; what is below rounding is left out."""
    for name, content in adapter_files(rank, seed=3).items():
        (tmp_path / name).write_bytes(content)
    adapter, spectra = load_adapter(tmp_path), spectra_of(tmp_path)

    assert spectra.keys() == adapter.factors.keys()
    for module, pair in adapter.factors.items():
        dense = torch.linalg.svdvals(adapter.scale * pair.B.double() @ pair.A.double())
        assert len(spectra[module]) <= rank
        torch.testing.assert_close(
            torch.tensor(spectra[module], dtype=torch.float64), dense[: len(spectra[module])], rtol=1e-4, atol=1e-5
        )


def group_of(label, **parameters):
    """A group, as far as published numbers look at it."""
    return Group(label=label, runs=(SimpleNamespace(parameters=parameters),))


def test_a_paper_s_tables_stand_beside_its_method_on_its_model_and_data_alone():
    path = experiment_path("papers/florist-dolly")
    given = {key: str(value) for key, value in flatten(load_experiment(path).model_dump(mode="json")).items()}
    entries = read_reference(reference_path("florist"))
    found = [entry for entry in entries if entry.fits(group_of("florist", **given))]

    assert {entry.number.data for entry in found} <= {"dolly", None}
    assert {entry.number.model for entry in found} == {given["model.name"]}
    assert {entry.number.method for entry in found} == {"FLoRIST-O", "FLoRIST-E"}
    assert "MMLU accuracy 30.42 % (FLoRIST-O, dolly, homogeneous)" in [entry.words for entry in found]
    assert found[0].source.startswith("FLoRIST, arXiv:2506.09199, v1 Table 2")
    for change in ({"model.name": "builtin:tiny"}, {"data.source": "builtin:stdlib"}, {"method.name": "soft"}):
        assert not any(entry.fits(group_of("other", **(given | change))) for entry in entries)


def test_published_numbers_are_read_with_their_source(tmp_path):
    path = tmp_path / "paper.yaml"
    path.write_text(
        "source: Table 3\npublished:\n"
        "  - {group: 'florist*', metric: accuracy, value: 0.79}\n"
        "  - {group: fedit, metric: bytes_total, value: 1.0e+9, source: Figure 2}\n"
    )
    first, second = read_reference(path)

    assert (first.source, second.source) == ("Table 3", "Figure 2")
    assert first.fits(group_of("florist tau=0.9"))
    assert not first.fits(group_of("fedit"))
    assert first.words == "accuracy 79.0%"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 1", "holds no mapping with the keys 'source' and 'published'"),
        ("published: []", "key published: a list with at least one entry is needed"),
        ("publshed: []", "unknown key 'publshed'. Did you mean 'published'?"),
        ("published: [3]", "entry 1: is 3, not a mapping with the keys group, metric, value, source"),
        ("published: [{group: a, metric: accuracy, value: 0.5}]", "entry 1, key source: a text is needed, got None"),
        ("source: s\npublished: [{metric: accuracy, value: 0.5}]", "entry 1, key group: a text is needed, got None"),
        ("source: s\npublished: [{group: a, metric: acuracy, value: 1}]", "Did you mean 'accuracy'?"),
        ("source: s\npublished: [{group: a, metric: accuracy, value: 79}]", "a share between 0 and 1"),
        ("source: s\npublished: [{group: a, metric: seconds, value: .nan}]", "a number from 0 to 1e18 is needed"),
        ("source: s\npublished: [{group: a, metric: seconds, value: true}]", "got True"),
        ("source: s\npublished: [{group: a, metric: seconds, valu: 1}]", "Did you mean 'value'?"),
        ("source: [", "cannot be read"),
    ],
)
def test_a_malformed_reference_is_refused_by_name(text, message, tmp_path):
    path = tmp_path / "paper.yaml"
    path.write_text(text)

    with pytest.raises(ComparisonError) as refused:
        read_reference(path)

    assert str(refused.value).startswith(f"--reference {path}")
    assert message in str(refused.value)
