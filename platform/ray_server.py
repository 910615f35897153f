"""The server's actor: where it is started, how it is asked, and how its loss is told."""

from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from fedloom.platform.errors import ServerLostError
from fedloom.platform.executor import SERVER_THREADS
from fedloom.platform.ray_crew import LOST
from fedloom.platform.server import Server


def start_server() -> Any:
    """On the driver's node: a node that is lost takes clients with it, and the server only with the driver.

    It asks for a byte of memory, since Ray lets any node find a place for an actor that asks for nothing, also one
    that has just joined and does not know of the others yet.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    server = ray.remote(Server).options(num_cpus=0, memory=1, scheduling_strategy=here)
    return server.remote(threads=SERVER_THREADS, share=ray.put)


def ask(server: Any, question: str, *arguments: Any) -> Any:
    """Call a method of the server. What it raises is raised here as it was, without Ray's wrapping.

    Raises:
        ServerLostError: the server is gone.
    """
    try:
        return ray.get(getattr(server, question).remote(*arguments))
    except LOST as error:
        raise _server_lost(error) from error
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error


def was_made(fold: Any) -> bool:
    """Whether the server has made a fold; ``False`` if what it was to read is gone.

    Raises:
        ServerLostError: the server is gone.
    """
    try:
        ray.get(fold)
    except (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError) as error:
        raise _server_lost(error) from error
    except LOST:
        return False
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, LOST):
            return False
        raise error.cause from error
    return True


def _server_lost(error: BaseException) -> ServerLostError:
    return ServerLostError(f"the server actor of this run was lost: {' '.join(str(error).split())[:300]}")
