"""Joining a Ray cluster that asks for a token."""

from collections.abc import Iterator

import pytest
from heads import TOKEN, started_head
from servers import free_port
from strangers import joining, refused


@pytest.fixture(scope="module")
def head() -> Iterator[str]:
    """Start a head with a token and return its address."""
    with started_head() as head:
        yield head.address


@pytest.mark.ray
def test_who_has_the_token_joins_and_others_are_told_why_not(head, tmp_path):
    """With the token from a file, with none, and with a driver that was told to do without tokens."""
    (tmp_path / "token").write_text(TOKEN)
    let_in = joining(head, RAY_AUTH_TOKEN_PATH=str(tmp_path / "token"))
    missing = joining(head, HOME=str(tmp_path))
    disabled = joining(head, RAY_AUTH_MODE="disabled")

    output, errors = let_in.communicate(timeout=120)

    assert "'num_cpus': 2.0" in output, errors
    assert "there is no token for this cluster" in refused(missing)
    assert "asks for another token" in refused(disabled)


def test_an_address_where_nobody_answers_is_one_line():
    address = f"127.0.0.1:{free_port()}"

    assert f"--address {address}: no Ray cluster answers there" in refused(joining(address))
