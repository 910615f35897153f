"""Passwords go to whom they are meant for and nowhere else; what a whole run does: test_embedded_cluster.py."""

import pytest
from hostile import tries
from hypothesis import given
from hypothesis import strategies as st

from fedloom.platform import run_folder
from fedloom.platform.experiment import Experiment
from fedloom.platform.tracking import Tracking
from fedloom.platform.tracking_calls import TrackingError, shown_uri, without_secrets
from fedloom.platform.tracking_store import tracking_uri, ui_command

EXPERIMENT = Experiment.model_validate({"name": "secret", "method": {"name": "fedit"}})
NAME = st.text("abcXYZ019-_.~%!$", min_size=8, max_size=20).map(lambda word: f"me{word}")
WORD = st.text("abcXYZ019-_.~%:!$", min_size=8, max_size=20).map(lambda word: f"S3{word}")


@tries(20)
@given(user=NAME, password=WORD, options=st.sampled_from(["", "?password={}", "?sslpassword={}&x=1"]))
def test_what_is_shown_of_a_uri_holds_no_password(user, password, options):
    """Neither the URI as messages name it, nor what a library says in which it stands."""
    for scheme in ("http", "https", "postgresql", "mysql+pymysql"):
        uri = f"{scheme}://{user}:{password}@host:5000/path{options.format(password)}"
        said = without_secrets(f"cannot open {uri}, i.e. {password!r} of {user}:{password}", uri)

        assert password not in shown_uri(uri)
        assert password not in said
        assert "host:5000/path" in shown_uri(uri)
    with pytest.raises(TrackingError) as refused:
        tracking_uri(f"{user}:{password}@host")
    assert password not in str(refused.value)


def test_a_uri_without_secrets_is_shown_as_it_is():
    for uri in ("http://host:5000", "databricks", "sqlite:////tmp/a@b/mlflow.db", "sqlite:////tmp/x.db?timeout=3"):
        assert uri == shown_uri(uri)


def test_a_run_folder_holds_no_password(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for uri in ("http://me:S3cret@host", "postgresql://host/db?password=S3cret"):
        run_folder.folder_of("1").mkdir(parents=True, exist_ok=True)
        run_folder.describe("1", EXPERIMENT, fingerprint="f", tracking_uri=uri)
        text = (run_folder.folder_of("1") / run_folder.DESCRIPTION).read_text()

        assert "S3cret" not in text
        assert run_folder.find("1").tracking_uri is None


def test_a_command_line_holds_no_password():
    command, variables = ui_command("postgresql://me:S3cret@host/db")

    assert "S3cret" not in " ".join(command)
    assert "S3cret" in variables["MLFLOW_BACKEND_STORE_URI"]


@pytest.mark.parametrize("uri", ["http://admin:password1234@127.0.0.1:1", "http://127.0.0.1:1"])
def test_the_password_that_mlflow_once_came_with_is_refused(uri, monkeypatch):
    """It is refused before anything is sent: nobody listens at this address."""
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "password1234")
    with pytest.raises(TrackingError, match="which everybody knows") as refused:
        Tracking(uri)
    assert "password1234" not in str(refused.value)
