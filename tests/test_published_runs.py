"""Defects of published code that only a model, data or a whole run can show; see ``test_published_defects.py``."""

import json
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from rounds import CLIENTS, RANK
from small import PAD, VOCABULARY, finished, make_data, make_experiment, save_llama
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from fedloom.methods.fslora import FSLoRA
from fedloom.platform.adapter import Adapter, Template
from fedloom.platform.adapter_host import AdapterHost
from fedloom.platform.base_model import load_tokenizer
from fedloom.platform.client import Budget
from fedloom.platform.data.federated import collate
from fedloom.platform.data.prepare import prepare_data
from fedloom.platform.driver import run
from fedloom.platform.executor import LocalExecutor
from fedloom.platform.experiment import Experiment, TrainingSection
from fedloom.platform.population import pools_of
from fedloom.platform.preparation import assemble, data_key, global_rank
from fedloom.platform.received import received_adapter
from fedloom.platform.registry import method_class, method_names
from fedloom.platform.seeds import generator_for
from fedloom.platform.tasks.questions import prepare_tasks
from fedloom.platform.trainer import train_client

LM = {"data": {"task": "causal_lm"}}
RATE = 0.01


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("models") / "llama")


@pytest.mark.parametrize("client", CLIENTS, ids=lambda client: f"rank{client.rank}")
def test_adamw_moves_a_sketch_as_far_as_a_whole_adapter_and_nothing_else(llama, client):
    """A published client trains B S and divides by S, which under AdamW leaves steps of k / r times the rate.

    Another selects by names that PEFT does not give, and so trains every rank. Here k / r of the numbers are trained,
    each moves by the rate in a first step, and the decay, too, stays inside of the sketch.
    """
    data = make_data()
    host = AdapterHost(assemble(make_experiment(llama), data).spec)
    method = FSLoRA()
    state = method.init(Template(shapes=host.shapes, head=host.initial_head(0), rank=RANK, scale=2.0), generator_for())
    generator = generator_for("factors")
    tensors = {
        n: t if t.any() else torch.randn(t.shape, generator=generator) for n, t in state.adapter.tensors().items()
    }
    state = replace(state, adapter=Adapter.from_tensors(tensors, 2.0))
    dispatch = method.dispatch(state, client, Budget(rank=client.rank), generator_for(client.id))
    settings = TrainingSection(learning_rate=RATE, weight_decay=0.01, batch_size=8, steps=1, max_grad_norm=None)
    trained = train_client(
        host,
        data,
        settings,
        dispatch=dispatch,
        received=received_adapter(dispatch, host.shapes),
        patch=None,
        patch_scale=1.0,
        client="c0",
        seed=0,
    )
    numbers = sum(parameter.numel() for parameter in host.factor_parameters())
    whole = sum(pair.B.numel() + pair.A.numel() for pair in state.adapter.factors.values())
    after = method.finish(state, method.lift(dispatch, method.upload(dispatch, trained.adapter), 1.0))

    assert numbers * RANK == whole * client.rank
    for module, old in state.adapter.factors.items():
        change_B, change_A = after.adapter.factors[module].B - old.B, after.adapter.factors[module].A - old.A
        sketch = change_B.any(dim=0)
        assert sketch.sum() == client.rank
        assert torch.equal(sketch, change_A.any(dim=1))
        assert float(change_B[:, sketch].abs().median()) == pytest.approx(RATE, rel=0.02)
        assert float(change_A[sketch].abs().median()) == pytest.approx(RATE, rel=0.02)


@pytest.mark.parametrize("name", ["ffa", "flexlora", "florist", "zero_padding"])
def test_what_is_measured_is_the_trained_global_model(llama, name):
    """Published baselines are evaluated on the bare base model, or on one that the weights were never loaded into.

    Against a model without PEFT, to whose weights the exported change is added by hand.
    """
    data = make_data(task="causal_lm", num_clients=2)
    shape = {"rounds": 2, "cohort": {"size": 2}, "training": {"learning_rate": 0.1, "steps": 12}}
    rounds, adapter = finished(make_experiment(llama, method={"name": name}, **shape, **LM), data)
    model = LlamaForCausalLM.from_pretrained(llama).eval()

    def loss():
        with torch.no_grad():
            return float(model(**collate(data, data.test)).loss)

    bare = loss()
    for module, pair in adapter.factors.items():
        model.get_submodule(module).weight.data += adapter.scale * pair.product()

    assert rounds[0].metrics["eval/loss"] == pytest.approx(bare, abs=1e-5)
    assert rounds[-1].metrics["eval/loss"] == pytest.approx(loss(), abs=1e-5)
    assert abs(loss() - bare) > 1e-3


class NoNewWeight(TorchDispatchMode):
    """Fails where a tensor of a weight's size is made that is no view of one that was there."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = {leaf.untyped_storage().data_ptr() for leaf in _tensors((args, kwargs or {}))}
        for leaf in _tensors(result):
            is_view = leaf.untyped_storage().data_ptr() in given
            assert is_view or sum(size >= 40 for size in leaf.shape) < 2, f"{function} made {tuple(leaf.shape)}"
        return result


def _tensors(value):
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [leaf for item in value for leaf in _tensors(item)] if isinstance(value, (list, tuple)) else []


@pytest.mark.parametrize("name", ["fslora", "florist"])
def test_no_client_gets_a_copy_of_the_base_model(tmp_path, name):
    """Published clients copy the whole model, and a mask and a sketch for every frozen parameter of it."""
    sizes = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=32, pad_token_id=PAD, **sizes)
    with torch.random.fork_rng():
        LlamaForCausalLM(config).save_pretrained(tmp_path)
    data = make_data(num_clients=2)  # a batch has 4 rows of at most 8 tokens, fewer than a weight has rows
    experiment = make_experiment(
        tmp_path, rounds=2, method={"name": name}, cohort={"size": 2}, evaluation={"batch_size": 4}
    )
    prepared = assemble(experiment, data)
    rounds = run(experiment, prepared, LocalExecutor(prepared.spec, data, pools_of(experiment)))
    next(rounds)  # measures the untrained model
    with NoNewWeight():
        next(rounds)


def test_the_guard_against_copies_sees_one():
    weight = torch.zeros(48, 80)
    with NoNewWeight():
        assert weight.T[8:].shape == (72, 48)
        with pytest.raises(AssertionError, match=r"clone.* made"):
            weight.clone()


def test_rounds_neither_read_nor_move_the_global_generators(llama):
    """Published samplers seed NumPy's generator anew in every round, on which every other draw then depends."""
    data = make_data()
    experiment = make_experiment(llama, rounds=2, training={"steps": 1}, method={"name": "fslora"})

    def played(seed):
        prepared = assemble(experiment, data)
        executor = LocalExecutor(prepared.spec, data, pools_of(experiment))
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
        rounds = list(run(prepared.experiment, prepared, executor))
        assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
        return [record.client for done in rounds for record in done.records], executor.export().tensors()

    with torch.random.fork_rng():
        (clients, tensors), (again, others) = played(1), played(2)

    assert clients == again
    assert all(torch.equal(tensor, others[name]) for name, tensor in tensors.items())


def test_methods_are_compared_on_one_split_and_at_one_rank(llama):
    """Published scripts give their own method other clients' data than its baselines, and a larger global rank."""
    data = make_data()
    experiments = {name: make_experiment(llama, method={"name": name}) for name in method_names()}
    ranks = {
        name: global_rank(experiment, assemble(experiment, data))
        for name, experiment in experiments.items()
        if method_class(name).traits.heterogeneous and name != "head_only"
    }

    assert len({data_key(experiment) for experiment in experiments.values()}) == 1
    assert set(ranks.values()) == {4}


def test_held_out_questions_are_worded_as_in_training(tmp_path):
    """Published prompts of training and evaluation differ in their indentation; here they are the same tokens."""
    rows = [
        {"instruction": f"Say {i}.", "context": f"It is {i}." if i % 2 else "", "output": f" {i}", "split": split}
        for i in range(12)
        for split in ("train", "test")
    ]
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = {"prompt": "instruction", "input": "context", "completion": "output"}
    document = {
        "model": {"name": "builtin:tiny"},
        "data": {
            "source": str(source),
            "task": "causal_lm",
            "template": "alpaca",
            "columns": columns,
            "max_length": 400,
        },
        "partition": {"kind": "iid", "num_clients": 2},
        "evaluation": {"tasks": [{"name": "reply", "kind": "generation", "answer": "output", "max_new_tokens": 4}]},
    }
    experiment = Experiment.model_validate(document)
    tokenizer = load_tokenizer(experiment)
    data = prepare_data(experiment, tokenizer)
    (task,) = prepare_tasks(experiment, tokenizer, 512)

    learnt = [data.input_ids[data.offsets[i] : data.offsets[i] + data.labels[i]].tolist() for i in data.test]
    assert sorted(question.sequences[0].tolist() for question in task.questions) == sorted(learnt)
    assert all("### Response:" in tokenizer.decode(tokens) for tokens in learnt)
