"""What every test finds: a quiet environment, the shared data, one Ray cluster, and no GPU tests without a GPU."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Libraries read these when they are imported, which no line above does. Child processes inherit them.
os.environ.update(
    {
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",  # by default 15: the tests in the process beside it would leave a worker no time
        "RAY_AUTH_MODE": "disabled",  # a cluster of one test run: no token is written to the home folder, none is asked
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
)
for name in ("MLFLOW_TRACKING_URI", "RAY_ADDRESS"):
    os.environ.pop(name, None)  # no test may write to somebody's server or join somebody's cluster

# The same examples in every run, and no verdict on the speed of a machine that others use too.
settings.register_profile("fedloom", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("fedloom")

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.hookimpl(tryfirst=True)  # pytest-xdist reads the groups in the same hook
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what needs CUDA where there is none, and share the tests out among the workers of pytest-xdist.

    A file is run by one worker, whose module-scoped fixtures are then made once. What needs a Ray cluster is run by one
    worker too, whatever its file: two clusters at once would want four CPUs. Long groups come first, or a worker would
    begin one when the other has nothing left to do.
    """
    skip_without_cuda([item for item in items if item.get_closest_marker("gpu")])
    if not hasattr(config, "workerinput"):
        return  # one process, and its order is that of the files
    long = {item.path for item in items if item.get_closest_marker("slow")}
    for item in items:
        item.add_marker(pytest.mark.xdist_group("ray" if item.get_closest_marker("ray") else item.path.stem))
    items.sort(key=lambda item: 0 if item.get_closest_marker("ray") else 1 if item.path in long else 2)


def skip_without_cuda(marked: list[pytest.Item]) -> None:
    """Torch is imported only if such a test was collected."""
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Return the folder of sample data that may lie beside the checkout."""
    folder = REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no ../shared/data beside the checkout")
    return folder


@pytest.fixture(scope="session")
def ray_local() -> Iterator[None]:
    """Start one embedded Ray cluster of two CPUs for the whole run; a test must not shut it down."""
    import ray

    if not ray.is_initialized():
        ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    yield
    ray.shutdown()
