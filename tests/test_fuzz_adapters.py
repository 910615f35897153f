"""Whatever an adapter's folder or a packet holds, the outcome is a value or an error of ours, in bounded memory."""

import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hostile import outcome, peak_bytes, peak_resident_bytes, refused, tries
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from fedloom.platform.adapter import Adapter
from fedloom.platform.errors import FedloomError
from fedloom.platform.foreign_adapters import look_at
from fedloom.platform.peft_format import BaseModel, load_adapter, verify_adapter
from fedloom.platform.peft_layout import CONFIG_NAME, WEIGHTS_NAME
from fedloom.platform.peft_read import MAX_CONFIG_BYTES, MAX_HEADER_BYTES, MAX_WEIGHTS_BYTES
from fedloom.platform.wire import DTYPES, Packet, unpack

A, B = (f"base_model.model.layer.lora_{factor}.weight" for factor in "AB")
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False}
WEIGHTS = save({A: torch.ones(2, 3), B: torch.ones(4, 2)})
HEADER = {
    A: {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    B: {"dtype": "F32", "shape": [4, 2], "data_offsets": [24, 56]},
}

NUMBERS = st.sampled_from([0, -1, 1, 2, 8, 2**31, 2**63, 2**64, 10**30, 10**400, 0.5, 1e308, 5e-324]) | st.floats()
JSON = st.recursive(
    st.none()
    | st.booleans()
    | NUMBERS
    | st.text(max_size=8)
    | st.sampled_from(["LORA", "(", "a{99999999999}", "\ud800"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
READ_TO_MERGE = ("bias", "init_lora_weights", "task_type", "revision", "modules_to_save", "fan_in_fan_out")
CONFIGS = st.dictionaries(st.sampled_from([*CONFIG, "use_dora", "target_parameters", *READ_TO_MERGE]), JSON, max_size=4)
PATTERNS = st.dictionaries(st.sampled_from(["layer", "(", ".*", "a{99999999999}", "(" * 9000 + ")" * 9000]), NUMBERS)
SIZES = st.sampled_from([0, 1, 2, 3, 4, 6, -1, 2**31, 2**32, 2**62, 2**63, 2**64 - 1, 2**64, 10**30, 1.5, None])
SHAPES = st.lists(SIZES, max_size=4)
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(
            ["F32", "F16", "F64", "BF16", "F8_E4M3", "F4", "I64", "U64", "C64", "BOOL", "X", None]
        ),
        "shape": SHAPES,
        "data_offsets": st.lists(SIZES | st.sampled_from([24, 32, 56]), max_size=3),
    }
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def with_header(header: Any, data: bytes = bytes(56)) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def read(folder: Path, *, config: Any = CONFIG, weights: bytes = WEIGHTS) -> Any:
    """Return the adapter, float32 and of a finite scale, or an error of ours; nothing is written.

    The reader for adapters that are merged is held to the same.
    """
    text = config if isinstance(config, bytes) else json.dumps(config).encode()
    (folder / CONFIG_NAME).write_bytes(text)
    (folder / WEIGHTS_NAME).write_bytes(weights)
    found = outcome(lambda: load_adapter(folder))
    foreign = outcome(lambda: look_at(folder).read(1.0))
    assert isinstance(foreign, Adapter | FedloomError)
    assert isinstance(foreign, FedloomError) or all(part.isfinite().all() for part in foreign.tensors().values())
    assert {path.name for path in folder.iterdir()} == {CONFIG_NAME, WEIGHTS_NAME}
    if isinstance(found, Adapter):
        assert np.isfinite(found.scale)
        assert {tensor.dtype for tensor in found.tensors().values()} == {torch.float32}
    else:
        assert isinstance(found, FedloomError)
    return found


def test_the_untouched_folder_is_read(folder):
    assert read(folder).scale == 2.0
    assert read(folder, weights=with_header(HEADER)).scale == 2.0


@tries(150)
@given(config=st.binary(max_size=80), weights=st.binary(max_size=80))
def test_any_bytes(folder, config, weights):
    read(folder, config=config)
    read(folder, weights=weights)


@tries(300)
@given(changes=CONFIGS, patterns=PATTERNS | JSON)
def test_any_value_in_the_configuration(folder, changes, patterns):
    read(folder, config={**CONFIG, **changes})
    read(folder, config={**CONFIG, "rank_pattern": patterns, "alpha_pattern": patterns})


@tries(300)
@given(
    entry=ENTRIES | JSON, name=st.sampled_from([A, B, "layer.lora_A.weight", "base_model.model.score.weight", "x", ""])
)
def test_any_entry_of_the_header(folder, entry, name):
    read(folder, weights=with_header(HEADER | {name: entry}))


@tries(150)
@given(notes=JSON | st.dictionaries(st.just("scale"), st.text(max_size=9) | st.sampled_from(["nan", "inf", "2.0"])))
def test_any_notes_in_the_header(folder, notes):
    read(folder, weights=with_header(HEADER | {"__metadata__": notes}))


@tries(300)
@given(start=st.integers(0, len(WEIGHTS)), size=st.integers(0, 40), junk=st.binary(max_size=12))
def test_weights_with_bytes_replaced(folder, start, size, junk):
    read(folder, weights=WEIGHTS[:start] + junk + WEIGHTS[start + size :])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (b"[" * 100_000, "recursion"),
        (b'{"r": ' + b"1" * 10**6 + b"}", "digits|at most"),
        (b'{"peft_type": "' + b"x" * 10**6 + b'"}', "only 'LORA'"),
        (b" " * (MAX_CONFIG_BYTES + 1), f"at most {MAX_CONFIG_BYTES} are read"),
        (CONFIG | {"lora_alpha": float("inf")}, "inf is not a finite number"),
        (CONFIG | {"lora_alpha": float("nan")}, "nan is not a finite number"),
        (CONFIG | {"lora_alpha": 10**400}, "no rank and alpha"),
        (CONFIG | {"lora_alpha": True}, "True is not a finite number"),
        (CONFIG | {"rank_pattern": [1]}, "rank_pattern is .1., not a mapping"),
        (CONFIG | {"rank_pattern": {"(layer": 2}}, "unterminated subpattern"),
        (CONFIG | {"r": 10**9}, "has rank 1000000000 in adapter_config.json but 2 in"),
    ],
)
def test_wrong_configurations_are_named(folder, config, message):
    with pytest.raises(FedloomError, match=message):
        raise read(folder, config=config)


@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["(a+)+$"], "has the pattern '(a+)+$'; allowed are names of modules"),
        (["(a|a)" * 30], "allowed are names"),
        (["a?" * 30 + "a" * 30], "allowed are names"),
        ([r"(\w+)\1"], "allowed are names"),
        (["(?=a)a"], "allowed are names"),
        (["a{1,30}{1,30}"], "allowed are names"),
        ([".*" * 5 + "b"], "at most 4 of"),
        ([".*" * 4 + "b"], "steps; at most"),
        ([f"b{number}" for number in range(5000)], "5000 patterns; at most 4096"),
    ],
)
def test_patterns_that_take_for_ever_are_refused_unmatched(folder, key, patterns, message):
    """Against a name on which they would; what is refused has cost no time, or this would not end."""
    long = {name.replace("layer", "a." * 200 + "a"): entry for name, entry in HEADER.items()}
    config = CONFIG | {key: dict.fromkeys(patterns, 2)}

    error = read(folder, config=config, weights=with_header(long))

    assert message in str(error)
    assert f"{key}" in str(error)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (struct.pack("<Q", 10 * 2**30) + b"{}", "its header claims 10737418240 bytes"),
        (struct.pack("<Q", 2**64 - 1), "its header claims 18446744073709551615 bytes"),
        (with_header(b" " * (MAX_HEADER_BYTES + 1)), f"and {MAX_HEADER_BYTES} are read"),
        (with_header(HEADER | {A: HEADER[A] | {"data_offsets": [0, 10 * 2**30]}}), "cannot be read"),
        (with_header(HEADER | {A: HEADER[A] | {"shape": [2**40, 2**40]}}), "overflow"),
        (
            with_header(HEADER | {A: {"dtype": "F32", "shape": [0, 2**64 - 1], "data_offsets": [0, 0]}}),
            "cannot be read",
        ),
        (with_header(b'{"a":' * 100_000), "recursion limit"),
        (save({A: torch.ones(2, 3, dtype=torch.int8), B: torch.ones(4, 2)}), "has the dtype I8; allowed are F64"),
        (save({A: torch.ones(2, 3), B: torch.ones(4, 2), "layer.lora_A.weight": torch.ones(2, 3)}), "with and without"),
    ],
)
def test_wrong_weights_are_named(folder, weights, message):
    with pytest.raises(FedloomError, match=message):
        raise read(folder, weights=weights)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs POSIX")
@pytest.mark.parametrize("name", [CONFIG_NAME, WEIGHTS_NAME])
def test_what_is_no_file_is_refused_unopened(tmp_path, name):
    """By load_adapter, and by verify_adapter before PEFT opens it."""
    base = BaseModel(
        name="x", path="x", revision=None, task="causal_lm", num_labels=None, label_names=(), head_modules=()
    )
    adapter = read(tmp_path)
    place = tmp_path / name
    kinds = {
        os.mkfifo: "not a file",
        os.mkdir: "not a file",
        lambda path: os.symlink("/dev/zero", path): "a symbolic link",
    }
    for make, message in kinds.items():
        place.rmdir() if place.is_dir() else place.unlink()
        make(place)
        assert message in refused(lambda: load_adapter(tmp_path))
        assert message in refused(lambda: verify_adapter(tmp_path, adapter, base))


def test_a_file_beyond_the_bound_is_not_read(tmp_path):
    """It has no content on the disk either: a hole of 8 GiB."""
    read(tmp_path)
    with (tmp_path / WEIGHTS_NAME).open("r+b") as file:
        file.truncate(MAX_WEIGHTS_BYTES + 1)

    assert f"at most {MAX_WEIGHTS_BYTES} are read" in refused(lambda: load_adapter(tmp_path))


@pytest.mark.parametrize("unit", [b'"a",', b"[],", b"{},", b'{"":0},', b"1e9,"])
def test_memory_of_a_configuration_is_bounded(folder, unit):
    """Well below the 256 MiB that the docstring states, for as much of anything as a configuration may hold."""
    text = b'{"x": [' + unit * ((MAX_CONFIG_BYTES - 64) // len(unit)) + b"0]}"
    (folder / CONFIG_NAME).write_bytes(text)

    assert peak_bytes(lambda: load_adapter(folder)) < 2**27


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_memory_of_the_whole_process_is_bounded(tmp_path):
    """A header as large as is read, of as many tensors as it holds: Rust's memory and torch's count too."""
    head = {f"base_model.model.h{i}": {"dtype": "F16", "shape": [1], "data_offsets": [0, 0]} for i in range(85_000)}
    for index, entry in enumerate(head.values()):
        entry["data_offsets"] = [56 + 2 * index, 58 + 2 * index]
    weights = with_header(HEADER | head, bytes(56 + 2 * len(head)))
    assert MAX_HEADER_BYTES * 0.9 < len(weights) < MAX_HEADER_BYTES
    assert isinstance(read(tmp_path, weights=weights), Adapter)
    warm = (
        "import torch, safetensors.torch\nfrom pathlib import Path\n"
        "from fedloom.platform.peft_format import load_adapter\n"
        "torch.ones(1).half().float()"
    )

    assert peak_resident_bytes(warm, f"load_adapter(Path({str(tmp_path)!r}))") < 2**28 + 3 * len(weights)


@tries(300)
@given(
    dtype=st.sampled_from([*DTYPES, "object"]),
    shape=st.lists(st.sampled_from([0, 1, 2, 3, -1, 2**31, 2**62, 2**63, 2**70]), max_size=4),
    start=st.sampled_from([0, 1, 4, 63, 64, 65, -1, -64, 2**63, 2**70]),
)
def test_any_layout_of_a_packet(dtype, shape, start):
    """A layout that says more than its buffer holds is refused before torch sees it."""
    packet = Packet(layout=(("t", dtype, tuple(shape), start),), meta={}, buffer=np.zeros(64, dtype=np.uint8))
    found = outcome(lambda: unpack(packet))

    if isinstance(found, dict):
        assert found["t"].nbytes <= 64
    else:
        assert isinstance(found, FedloomError)
