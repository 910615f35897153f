"""Updates that one client spoils, runs in which it does so, and a server that is amid its first round."""

import dataclasses
import math

import torch
from small import finished, make_data, make_experiment

from fedloom.platform import worker as worker_module
from fedloom.platform.client import Budget, Client
from fedloom.platform.preparation import assemble
from fedloom.platform.registry import build_method
from fedloom.platform.server import Server
from fedloom.platform.wire import pack

DATA = make_data()


def first(payload):
    return next(iter(payload.tensors))


def spoilt(change):
    """Return a way to spoil a payload: ``change(name, tensor)`` of its first tensor."""

    def spoil(payload):
        name = first(payload)
        return dataclasses.replace(payload, tensors={**payload.tensors, name: change(payload.tensors[name])})

    return spoil


def everywhere(value):
    """Return a way to spoil a payload: the same value in all of its tensors."""

    def spoil(payload):
        tensors = {name: torch.full_like(tensor, value) for name, tensor in payload.tensors.items()}
        return dataclasses.replace(payload, tensors=tensors)

    return spoil


class Spoiling:
    """A method of which one client sends something else."""

    def __init__(self, method, victim, spoil):
        self._method, self._victim, self._spoil = method, victim, spoil
        self.client = None

    def __getattr__(self, name):
        return getattr(self._method, name)

    def upload(self, dispatch, trained):
        payload = self._method.upload(dispatch, trained)
        asked, self.client = self.client, None  # the second call of a client is the platform's own
        return self._spoil(payload) if asked == self._victim else payload


def play_with(monkeypatch, experiment, victim, spoil):
    """Run with one client that sends something else in every round."""
    held = {}
    method_of, train_client = worker_module.method_of, worker_module.train_client

    def spoiling(*arguments):
        held["method"] = Spoiling(method_of(*arguments), victim, spoil)
        return held["method"]

    def trained(*arguments, **settings):
        held["method"].client = settings["client"]
        return train_client(*arguments, **settings)

    with monkeypatch.context() as patched:
        patched.setattr(worker_module, "method_of", spoiling)
        patched.setattr(worker_module, "train_client", trained)
        return finished(experiment)


def play_without(monkeypatch, experiment, victim):
    """Run with one client whose training fails."""
    train_client = worker_module.train_client

    def failing(*arguments, **settings):
        trained = train_client(*arguments, **settings)
        return dataclasses.replace(trained, loss=math.nan) if settings["client"] == victim else trained

    with monkeypatch.context() as patched:
        patched.setattr(worker_module, "train_client", failing)
        return finished(experiment)


def server_in_round_one(llama):
    experiment = make_experiment(llama)
    prepared = assemble(experiment, DATA)
    server = Server()
    server.begin(experiment, prepared.shapes, 2, pack({"score.weight": torch.zeros(3, 16)}), "this-run")
    method = build_method("fedit", {})
    client = Client(id="c", profile="small", rank=2, num_examples=3)
    dispatch = method.dispatch(server._state, client, Budget(rank=2), torch.Generator())
    return server, method.lift(dispatch, dispatch.payload, 3.0)
