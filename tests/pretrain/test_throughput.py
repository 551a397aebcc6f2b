"""Utilisation: the formula against torch's counter of operations, on every variant and on all of a step."""

import math
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from pretrain.config.run_config import RunConfig
from pretrain.config.settings import TrainConfig
from pretrain.plan.parameters import parameters_of
from pretrain.plan.step_time import GPUS, step_flops
from pretrain.report.throughput import MfuMeter, flops_of_portion, gpu_named, memory_bytes
from pretrain.schedule import Portion
from titans_mcore.attention import attend
from titans_mcore.attention.attend import visible
from titans_mcore.config import TitansConfig
from titans_mcore.linear import linear_scan, ttt_scan
from titans_mcore.linear import ttt as ttt_form
from titans_mcore.linear.scan import ScanLayout, in_chunks
from titans_mcore.memory import memory_read, memory_scan
from titans_mcore.memory.chunk import gates_of_chunk, work_out
from titans_mcore.memory.inputs import Matrices, Tokens
from titans_mcore.memory.rule import Memory, Network, Rule
from titans_mcore.mixers import MIXERS, attention, mac, neural_memory, parts
from titans_mcore.model import TitansModel
from titans_mcore.parallel import transformer_config

from ..resident import fresh_memory

ROWS, LENGTH = 2, 128
SETTINGS = {"num_layers": 2, "dim": 128, "num_heads": 4, "ffn_dim": 256, "vocab_size": 1000, "persistent_tokens": 4}
SETTINGS |= {"chunk_size": 8, "segment_length": 64, "window": 48, "theta_max": 1e-4, "linear_heads": 4}


def chunk_form(memory: Memory, tokens: list[Tensor], weights: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The parts that the chunk form is made of, for autograd: (N, T, ...) tokens, the state shell left out."""
    state, reads, chunk = Matrices(weights, [torch.zeros_like(w).requires_grad_() for w in weights]), [], memory.rule
    for c in range(0, tokens[0].shape[1], chunk.chunk_size):
        part = Tokens(*tokens).span(c, c + chunk.chunk_size)
        with FlopCounterMode(display=False):  # counted by nobody who looks at the one around: b x b decays
            gates = gates_of_chunk(memory, part)
        work = work_out(memory, part, state, gates)
        reads.append(work.read(part.queries, state))
        state = work.end(state)
    return torch.cat(reads, 1), state.tensors()


class Counted:
    """Counts, beside a model's own attention and memory, what their forms come to that do nothing in vain."""

    def __init__(self) -> None:
        self.operations = {"attention": 0.0, "memory": 0.0, "scan": 0.0}

    def attend(self, queries, keys, values, **named):
        """The softmax written out computes all scores; of these, those that the mask lets be seen are work."""
        prefix, copies = named.get("prefix"), [leaf(x) for x in (queries, keys, values)]
        with FlopCounterMode(display=False) as counter:
            named_copies = named | {
                "prefix": None if prefix is None else type(prefix)(*map(leaf, vars(prefix).values()))
            }
            attend(*copies, **named_copies | {"backend": "dense", "documents": None}).sum().backward()
        tokens, past = queries.shape[1], keys.shape[1] // named.get("keys_per_token", 1) - queries.shape[1]
        mask = visible(
            past, tokens, 0, keys.shape[1], named.get("window", 0), named.get("keys_per_token", 1), keys.device
        )
        always = 0 if prefix is None else prefix.keys.shape[1]
        share = (mask.sum() + always * tokens) / (mask.numel() + always * tokens)
        self.operations["attention"] += counter.get_total_flops() * float(share)
        return attend(queries, keys, values, **named)

    def memory_scan(self, *arguments, **named):
        *sequence, weights = arguments
        state, rows = named["state"] or named["start"], sequence[0].shape[0]
        start = [w.expand(rows, *w.shape[-3:]) for w in (weights if state is None else state.weights)]
        tokens = [leaf(x.transpose(1, 2).flatten(0, 1)) for x in sequence]
        own = [leaf(w.flatten(0, 1)) for w in start]
        norm = named["network"] == "residual_norm"
        rule = Rule.of(named["rule"], named["chunk_size"], residual_norm=norm, forgets=named["forgets"])
        memory = Memory(Network(norm, named["norm_weight"], named["norm_bias"]), rule, [leaf(w) for w in weights])
        with FlopCounterMode(display=False) as counter:
            reads, end = chunk_form(memory, tokens, own)
            (reads.sum() + sum(x.sum() for x in end)).backward()
        self.operations["memory"] += counter.get_total_flops()
        found = memory_scan(*arguments, **named)
        if state is None:  # else there is momentum; and behind the first chunk the state shell may act
            first = reads.unflatten(0, (rows, -1)).transpose(1, 2)[:, : named["chunk_size"]]
            torch.testing.assert_close(found[0][:, : named["chunk_size"]], first, rtol=1e-3, atol=1e-4)
        return found

    def memory_read(self, queries, weights, **named):
        copies = [leaf(w) for w in weights]
        with FlopCounterMode(display=False) as counter:
            memory_read(leaf(queries), copies, **named).sum().backward()
        self.operations["memory"] += counter.get_total_flops()
        return memory_read(queries, weights, **named)

    def linear_scan(self, queries, keys, values, log_decay=None, beta=None, **named):
        """Of a backward pass that works nothing out again; a triangular system is taken as the product it saves."""
        tokens = [None if x is None else leaf(x) for x in (queries, keys, values, log_decay, beta)]
        state = torch.zeros(ROWS, values.shape[2], keys.shape[-1], values.shape[-1], requires_grad=True)
        mapping = {torch.ops.aten.linalg_solve_triangular: product_of_system}
        with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
            read, end = in_chunks(ScanLayout(named.get("scale", 1.0), None, None, None), state, *tokens)
            (read.sum() + end.sum()).backward()
        self.operations["scan"] += counter.get_total_flops()
        found = linear_scan(queries, keys, values, log_decay, beta, **named)
        torch.testing.assert_close(found[0], read)
        return found

    def ttt_scan(self, *arguments, **named):
        """Of a backward pass that works nothing out again."""
        *tensors, weights = arguments
        with FlopCounterMode(display=False) as counter, pytest.MonkeyPatch.context() as patch:
            patch.setattr(ttt_form, "Recomputed", SimpleNamespace(apply=lambda function, *given: function(*given)))
            read, end = ttt_scan(*map(leaf, tensors), [leaf(w) for w in weights], **named)
            (read.sum() + sum(x.sum() for x in end.weights)).backward()
        self.operations["scan"] += counter.get_total_flops()
        found = ttt_scan(*arguments, **named)
        torch.testing.assert_close(found[0], read)
        return found


def product_of_system(matrix_shape, sides_shape, *_, **__) -> int:
    return 2 * math.prod(sides_shape) * matrix_shape[-1]


def leaf(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_()


PLAIN = {"memory_depth": 3, "memory_network": "plain"}


MEMORIES = ({}, {"memory_depth": 1}, PLAIN | {"memory_rule": "literal"}, PLAIN)
# A memory's operations are counted by the same formula in every mixer that has one: all kinds of it are tried in one.
CASES = [
    pytest.param(name, memory, marks=[pytest.mark.slow] if place and name != "lmm" else [])
    for name, mixer in MIXERS.items()
    for place, memory in enumerate(MEMORIES if mixer.memory else MEMORIES[:1])
]


@pytest.mark.parametrize(("variant", "memory"), CASES)
def test_the_operations_of_a_step_are_those_that_torch_counts(variant, memory, one_process, monkeypatch):
    config = TitansConfig(variant=variant, **SETTINGS | memory)
    counted = Counted()
    monkeypatch.setattr(parts, "_LEAST_WORK", math.inf)  # by products of matrices, not by oneDNN's convolutions
    monkeypatch.setattr(attention, "attend", counted.attend)
    monkeypatch.setattr(mac, "attend", counted.attend)
    monkeypatch.setattr(neural_memory, "memory_scan", counted.memory_scan)
    monkeypatch.setattr(neural_memory, "memory_read", counted.memory_read)
    for name, module in list(sys.modules.items()):
        for scan in ("linear_scan", "ttt_scan"):
            if name.startswith("titans_mcore.mixers.") and hasattr(module, scan):
                monkeypatch.setattr(module, scan, getattr(counted, scan))
    torch.manual_seed(0)
    model = TitansModel(config, transformer_config(config), one_process)
    tokens = torch.randint(0, config.vocab_size, (ROWS, LENGTH))
    with FlopCounterMode(display=False) as counter:
        model(tokens, tokens).mean().backward()
    # Matrices outside attention and memory are the only ones that are multiplied without a batch.
    dense = sum(flops for op, flops in counter.get_flop_counts()["Global"].items() if str(op) == "aten.mm")

    run = RunConfig(model=config, train=TrainConfig(global_batch=ROWS, micro_batch=ROWS, sequence_length=LENGTH))
    formula = step_flops(run, parameters_of(config))
    found = {"dense": dense, **counted.operations}
    assert {kind for kind, flops in found.items() if flops} == {kind for kind, flops in formula.items() if flops} - {
        "total"
    }
    for kind, flops in found.items():
        assert formula.get(kind, 0) == pytest.approx(flops, rel=0.02), kind
    assert formula["total"] == pytest.approx(sum(found.values()), rel=0.02)


def config_of(**train) -> RunConfig:
    sizes = {"steps": 100, "sequence_length": 64, "global_batch": 8, "micro_batch": 2}
    return RunConfig(model=TitansConfig(variant="mag", **SETTINGS), train=TrainConfig(**sizes | train))


def test_utilisation_is_operations_over_what_the_gpus_could_have_done():
    config = config_of()
    flops = step_flops(config, parameters_of(config.model))["total"]
    meter = MfuMeter(config, processes=4, gpu=GPUS["h100"])
    assert meter.mfu(1, 0.5) == pytest.approx(flops / (0.5 * 4 * 989.5e12))


def test_a_step_of_the_warm_up_has_the_operations_of_its_own_batch_and_rows():
    config = config_of(
        batch_warmup_from=2, batch_warmup_tokens=1024, sequence_warmup_from=16, sequence_warmup_tokens=512
    )
    parameters = parameters_of(config.model)
    short = config_of(global_batch=2 * 4, micro_batch=2 * 4, sequence_length=16)
    assert flops_of_portion(config, Portion(0, 2, 16), parameters) == step_flops(short, parameters)["total"]
    meter, full = MfuMeter(config, 1, GPUS["a100"]), MfuMeter(config_of(), 1, GPUS["a100"])
    assert meter.mfu(1, 1.0) == pytest.approx(step_flops(short, parameters)["total"] / 312e12)
    assert meter.mfu(100, 1.0) == full.mfu(1, 1.0)


@pytest.mark.parametrize(
    ("name", "gpu"),
    [
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A100-PCIE-40GB", "a100"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA GB200", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_a_peak_is_known_for_the_modules_of_the_table_alone(name, gpu):
    assert gpu_named(name) is (GPUS[gpu] if gpu else None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_without_a_gpu_there_is_no_utilisation_and_memory_is_what_is_resident():
    assert MfuMeter.here(config_of(), 1).mfu(1, 1.0) is None
    before = memory_bytes()
    held = fresh_memory(50_000_000)
    assert memory_bytes() - before == pytest.approx(held.numel(), rel=0.2)


def test_counting_draws_no_random_numbers(one_process):
    before = torch.get_rng_state()
    MfuMeter(config_of(), 1, GPUS["h100"]).mfu(1, 1.0)
    assert torch.equal(torch.get_rng_state(), before)
