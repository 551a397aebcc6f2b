"""Large products of float32 on a CPU are oneDNN's, as exact as torch's own, in training and in the exported model."""

import functools
from typing import Any

import pytest
import torch
from megatron.core.tensor_parallel import layers
from torch import Tensor
from torch.nn import functional as F

from titans_mcore.hf.configuration_titans import TitansHFConfig
from titans_mcore.hf.mapping import to_exported
from titans_mcore.hf.modeling_titans import TitansForCausalLM
from titans_mcore.mixers import parts
from titans_mcore.mixers.parts import fits_onednn, product
from titans_mcore.model import TitansModel
from titans_mcore.parallel import start, stop, transformer_config
from titans_mcore.weights import model_tensors

from ..hf.hf_runs import tiny


def with_gradients(multiply, x: Tensor, weight: Tensor, gradient: Tensor) -> list[Tensor]:
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    out = multiply(x, weight)
    return [out, *torch.autograd.grad(out, (x, weight), gradient)]


@pytest.mark.parametrize(
    ("shape", "d_out", "by_onednn"),
    [
        ((2, 256, 256), 256, True),
        ((527, 160), 128, True),  # 17 times 31 rows
        ((3, 400, 72), 101, True),
        ((4_099, 64), 64, False),  # a prime number of rows
        ((64, 128), 128, False),  # small
        ((512, 0), 128, False),
    ],
)
@pytest.mark.parametrize("turned", [False, True])
def test_a_product_is_as_exact_as_torchs_forth_and_back(
    shape: tuple[int, ...], d_out: int, by_onednn: bool, turned: bool
) -> None:
    torch.manual_seed(0)
    x, weight, gradient = torch.randn(shape), torch.randn(d_out, shape[-1]), torch.randn(*shape[:-1], d_out)
    if turned and x.numel():
        x = x.transpose(0, -1).contiguous().transpose(0, -1)
    assert fits_onednn(x, weight) == by_onednn
    exact = with_gradients(F.linear, x.double(), weight.double(), gradient.double())
    found, usual = (with_gradients(multiply, x, weight, gradient) for multiply in (product, F.linear))
    for ours, torchs, true in zip(found, usual, exact, strict=True):
        assert ours.shape == true.shape
        assert (ours - true).norm() <= 2 * (torchs - true).norm() + 1e-7 * true.norm()


def test_what_is_not_float32_on_a_cpu_goes_where_it_went() -> None:
    x, weight = torch.randn(512, 256), torch.randn(256, 256)
    assert fits_onednn(x, weight)
    assert not fits_onednn(x.double(), weight.double())
    assert not fits_onednn(x.bfloat16(), weight.bfloat16())
    assert not fits_onednn(x.to("meta"), weight.to("meta"))
    with torch.autocast("cpu", torch.bfloat16):
        assert not fits_onednn(x, weight)
        assert product(x, weight).dtype == torch.bfloat16


def test_training_and_the_exported_model_multiply_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny(variant="mag", dim=256, num_heads=2, ffn_dim=256, vocab_size=512, segment_length=32)
    start(1, seed=0)
    try:
        native = TitansModel(config, transformer_config(config))
        exported = TitansForCausalLM(TitansHFConfig.from_titans(config))
        exported.load_state_dict(to_exported(config, model_tensors(native)), strict=False)
        ids = torch.randint(512, (2, 256))

        def small_alone(usual):
            @functools.wraps(usual)
            def multiply(x: Tensor, weight: Tensor, *others: Any, **settings: Any) -> Tensor:
                assert x.numel() * len(weight) < 1 << 23, f"{tuple(x.shape)} times {tuple(weight.shape)} went to MKL"
                return usual(x, weight, *others, **settings)

            return multiply

        for module, name in ((layers, "linear_with_grad_accumulation_and_async_allreduce"), (parts.F, "linear")):
            monkeypatch.setattr(module, name, small_alone(getattr(module, name)))
        labels = torch.randint(512, (2, 256))
        trained = native(ids, labels)
        logits = exported(ids).logits
    finally:
        stop()
        torch.set_num_threads(1)
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    assert torch.isclose(trained.mean(), loss, rtol=1e-6)
    trained.mean().backward()
