"""The memory beyond text: the backbone without a vocabulary, forecasts under PatchTST's contract, classes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import PatchTSTConfig, PatchTSTForPrediction

from titans_mcore.hf.cache_titans import TitansCache
from titans_mcore.hf.configuration_titans import TitansHFConfig, TitansTimeSeriesConfig
from titans_mcore.hf.exported import read_config
from titans_mcore.hf.folder import ExportError, ProofFailed
from titans_mcore.hf.modeling_titans import TitansBackbone, TitansModel
from titans_mcore.hf.save import save_alone
from titans_mcore.hf.tasks_titans import EinFFT, TitansForSequenceClassification, TitansForTimeSeriesPrediction
from titans_mcore.hf.verify import verify
from titans_mcore.mixers import MIXERS

from .hf_runs import tiny

SMALL = {
    "dim": 16,
    "num_layers": 2,
    "num_heads": 2,
    "ffn_dim": 24,
    "chunk_size": 4,
    "segment_length": 8,
    "window": 0,
    "persistent_tokens": 2,
}


def series_model(**settings: Any) -> TitansForTimeSeriesPrediction:
    given = {
        "context_length": 24,
        "prediction_length": 5,
        "num_input_channels": 3,
        "patch_length": 6,
        "patch_stride": 3,
    }
    torch.manual_seed(0)
    return TitansForTimeSeriesPrediction(
        TitansTimeSeriesConfig(**SMALL | given | {"variant": "lmm"} | settings)
    ).double()


def windows(batch: int = 4, seed: int = 1) -> torch.Tensor:
    return torch.randn(batch, 24, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 3 + 7


@pytest.mark.parametrize("variant", [*MIXERS, "lmm+transformer"])
def test_the_backbone_is_the_language_model_behind_its_embedding(variant: str) -> None:
    torch.manual_seed(0)
    config = TitansHFConfig.from_titans(tiny(variant=variant))
    model, backbone = TitansModel(config).double(), TitansBackbone(config).double()
    assert not [name for name, _ in backbone.named_parameters() if "embedding" in name]
    backbone.load_state_dict({name: x for name, x in model.state_dict().items() if "embedding" not in name})
    tokens = torch.randint(config.vocab_size, (2, 21))
    vectors = model.embedding(tokens)
    assert torch.equal(backbone(inputs_embeds=vectors).last_hidden_state, model(tokens).last_hidden_state)


def test_a_batch_of_vectors_with_padding_gives_each_row_what_it_gives_alone() -> None:
    torch.manual_seed(0)
    backbone = TitansBackbone(TitansHFConfig(**SMALL, variant="mag")).double()
    x, mask = torch.randn(2, 11, 16, dtype=torch.float64), torch.ones(2, 11, dtype=torch.long)
    mask[0, :4] = 0
    together = backbone(inputs_embeds=x, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(together[0, 4:], backbone(inputs_embeds=x[:1, 4:]).last_hidden_state[0])


def test_vectors_of_another_width_get_a_sentence() -> None:
    backbone = TitansBackbone(TitansHFConfig(**SMALL, variant="lmm"))
    with pytest.raises(ValueError, match=r"inputs_embeds is \(2, 9, 7\); give \(B, T, 16\)"):
        backbone(inputs_embeds=torch.zeros(2, 9, 7))
    with pytest.raises(ValueError, match="inputs_embeds is missing"):
        backbone()


def test_outputs_and_arguments_are_patchtsts() -> None:
    theirs = PatchTSTForPrediction(
        PatchTSTConfig(
            num_input_channels=3,
            context_length=24,
            prediction_length=5,
            patch_length=6,
            patch_stride=3,
            d_model=16,
            num_attention_heads=2,
            num_hidden_layers=1,
            ffn_dim=16,
            scaling="std",
            loss="mse",
        )
    ).double()
    ours, past, future = series_model(), windows(), torch.randn(4, 5, 3, dtype=torch.float64)
    mask = torch.ones_like(past, dtype=torch.bool)
    found, expected = (
        model.eval()(past_values=past, past_observed_mask=mask, future_values=future) for model in (ours, theirs)
    )
    assert set(found) == set(expected)
    assert {name: value.shape for name, value in found.items()} == {name: x.shape for name, x in expected.items()}
    torch.testing.assert_close(found.loc, expected.loc)
    torch.testing.assert_close(found.scale, expected.scale)
    torch.testing.assert_close(found.loss, F.mse_loss(found.prediction_outputs, future))
    assert ours.generate(past).sequences.shape == theirs.generate(past).sequences.shape == (4, 1, 5, 3)
    assert torch.equal(ours.generate(past).sequences[:, 0], found.prediction_outputs)


@pytest.mark.parametrize("frame", ["swiglu", "einfft"])
@pytest.mark.parametrize("channels", ["apart", "together"])
@pytest.mark.parametrize("scaling", ["std", "revin"])
def test_a_window_moved_and_stretched_moves_and_stretches_its_forecast(frame: str, channels: str, scaling: str) -> None:
    model = series_model(frame=frame, channels=channels, scaling=scaling).eval()
    past = windows()
    moved = model(past * 1e4 + 5).prediction_outputs  # large, so that the 1e-5 in the deviation is nothing
    torch.testing.assert_close(moved, model(past * 1e3).prediction_outputs * 10 + 5, rtol=1e-6, atol=1e-2)


def test_without_scaling_it_does_not() -> None:
    model, past = series_model(scaling="none").eval(), windows()
    assert not torch.allclose(model(past + 5).prediction_outputs, model(past).prediction_outputs + 5, atol=1e-2)


def test_channels_apart_do_not_see_each_other_and_together_they_do() -> None:
    past = windows()
    other = past.clone()
    other[..., 2] = torch.randn(4, 24, dtype=torch.float64)
    apart, together = series_model(), series_model(channels="together")
    same = apart(past).prediction_outputs[..., :2]
    assert torch.equal(apart(other).prediction_outputs[..., :2], same)
    assert not torch.allclose(together(other).prediction_outputs[..., :2], together(past).prediction_outputs[..., :2])
    swapped = apart(past.flip(-1)).prediction_outputs.flip(-1)
    torch.testing.assert_close(swapped, apart(past).prediction_outputs)  # one set of weights for all


def test_steps_that_fill_no_patch_are_the_windows_first() -> None:
    model, past = series_model(patch_length=5, patch_stride=4, scaling="none"), windows()
    assert (model.config.num_tokens, model.config.covered) == (5, 21)
    other = past.clone()
    other[:, :3] += 1
    assert torch.equal(model(other).prediction_outputs, model(past).prediction_outputs)
    other[:, 3] += 1
    assert not torch.equal(model(other).prediction_outputs, model(past).prediction_outputs)


def test_what_stands_at_a_missing_value_is_not_read() -> None:
    model, past = series_model().eval(), windows()
    mask = torch.rand(past.shape, generator=torch.Generator().manual_seed(2)) > 0.3
    found = model(past, past_observed_mask=mask)
    poisoned = model(past.masked_fill(~mask, torch.nan), past_observed_mask=mask)
    assert torch.equal(found.prediction_outputs, poisoned.prediction_outputs)
    torch.testing.assert_close(found.loc[0, 0, 0], past[0, :, 0][mask[0, :, 0]].mean())


def test_revin_undoes_its_gain_and_shift() -> None:
    std, revin, past = series_model().eval(), series_model(scaling="revin").eval(), windows()
    revin.load_state_dict(std.state_dict(), strict=False)
    torch.testing.assert_close(revin(past).prediction_outputs, std(past).prediction_outputs)
    with torch.no_grad():
        revin.head.weight.zero_()
        revin.head.bias.zero_()
        revin.gain.copy_(torch.tensor([2.0, 3.0, 0.5]))
        revin.shift.copy_(torch.tensor([1.0, -2.0, 0.0]))
    found = revin(past)  # a head that says 0 means -shift / gain deviations from the window's mean
    expected = found.loc + found.scale * torch.tensor([-0.5, 2 / 3, 0.0], dtype=torch.float64)
    torch.testing.assert_close(found.prediction_outputs, expected.expand(4, 5, 3))


def test_einfft_is_its_formula_in_sums() -> None:
    torch.manual_seed(0)
    layer, x = EinFFT(8).double(), torch.randn(2, 5, 8, dtype=torch.float64) * 3
    torch.nn.init.normal_(layer.weight)
    tokens, blocks = torch.arange(5, dtype=torch.float64), torch.arange(4, dtype=torch.float64)
    turn = torch.exp(
        -2j * torch.pi * (torch.outer(tokens, tokens)[:, None, :, None] / 5 + torch.outer(blocks, blocks)[:, None] / 4)
    )
    turn = turn / 20**0.5  # (frequency of time, of blocks, time, block)
    z = torch.einsum("fgtk,btkd->bfgd", turn, x.unflatten(-1, (4, 2)).to(torch.complex128))
    for index in range(2):
        weight, bias = layer.weight[index], layer.bias[index]
        real = torch.einsum("btkd,kde->btke", z.real, weight[0]) - torch.einsum("btkd,kde->btke", z.imag, weight[1])
        imag = torch.einsum("btkd,kde->btke", z.real, weight[1]) + torch.einsum("btkd,kde->btke", z.imag, weight[0])
        real, imag = real + bias[0], imag + bias[1]
        z = torch.complex(*(part if index else part.clamp_min(0) for part in (real, imag)))
    shrunk = torch.complex(*(part.sign() * (part.abs() - 0.01).clamp_min(0) for part in (z.real, z.imag)))
    expected = torch.einsum("fgtk,bfgd->btkd", turn.conj(), shrunk).real.flatten(2)
    torch.testing.assert_close(layer(x), expected, rtol=1e-10, atol=1e-10)


def test_einfft_frame_sees_later_tokens_and_swiglu_does_not() -> None:
    for frame, causal in (("swiglu", True), ("einfft", False)):
        model, past = series_model(frame=frame, scaling="none", patch_length=1, patch_stride=1).eval(), windows()
        other = past.clone()
        other[:, -1] += 1
        first, second = (model(x, output_hidden_states=True).hidden_states[-1][:, :-1] for x in (past, other))
        assert torch.allclose(first, second, rtol=0, atol=1e-12) == causal


@pytest.mark.parametrize("variant", ["lmm", "mac", "mag"])
def test_windows_that_follow_each_other_with_a_cache_are_one_long_sequence(variant: str) -> None:
    model, first, second = series_model(variant=variant, scaling="none", patch_stride=6), windows(), windows(seed=5)
    cache = TitansCache(2)
    model(first, cache=cache)
    found = model(second, cache=cache).prediction_outputs
    patches = torch.cat([first, second], 1).unfold(1, 6, 6).transpose(1, 2).flatten(0, 1)
    hidden = model.model(inputs_embeds=model.embedding(patches)).last_hidden_state[:, 4:]
    torch.testing.assert_close(found, model.head(hidden.flatten(1)).view(4, 3, 5).transpose(1, 2))
    assert not torch.allclose(found, model(second).prediction_outputs)
    with pytest.raises(ValueError, match="frame einfft is not causal"):
        series_model(frame="einfft")(first, cache=TitansCache(2))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"prediction_length": 0}, "prediction_length is 0; it must be at least 1"),
        ({"patch_length": 25}, "patch_length 25 is longer than context_length 24"),
        ({"scaling": "max"}, "scaling is 'max'; it must be one of std, revin, none"),
        ({"frame": "mlp"}, "frame is 'mlp'; it must be one of swiglu, einfft"),
        ({"channels": "both"}, "channels is 'both'; it must be one of apart, together"),
        ({"dim": 18, "frame": "einfft"}, "dim 18 is not divisible by the 4 blocks of frame einfft"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        series_model(**settings)


def test_shapes_that_do_not_fit_are_refused() -> None:
    model = series_model()
    with pytest.raises(ValueError, match=r"past_values is \(4, 23, 3\); this model takes \(B, 24, 3\)"):
        model(windows()[:, 1:])
    with pytest.raises(ValueError, match=r"future_values is \(4, 6, 3\); this model takes \(B, 5, 3\)"):
        model(windows(), future_values=torch.zeros(4, 6, 3))


def classifier(pooling: str = "mean") -> TitansForSequenceClassification:
    torch.manual_seed(0)
    config = TitansHFConfig(**SMALL, variant="mag", vocab_size=7, num_labels=3, classifier_pooling=pooling)
    return TitansForSequenceClassification(config).double().eval()


@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_changes_no_class(pooling: str, side: str) -> None:
    model, tokens = classifier(pooling), torch.randint(7, (1, 9))
    alone = model(tokens).logits
    empty = torch.zeros(1, 5, dtype=torch.long)
    parts = [(empty, torch.zeros_like(empty)), (tokens, torch.ones_like(tokens))]
    ids, mask = (torch.cat(x, 1) for x in zip(*(parts if side == "left" else parts[::-1]), strict=True))
    torch.testing.assert_close(model(ids, mask).logits, alone)
    hidden = model.model(tokens).last_hidden_state
    pooled = hidden.mean(1) if pooling == "mean" else hidden[:, -1]
    torch.testing.assert_close(alone, model.score(pooled))


def test_the_loss_is_cross_entropy_and_labels_beyond_the_classes_are_named() -> None:
    model, tokens = classifier(), torch.randint(7, (4, 9))
    labels = torch.tensor([0, 2, 1, 1])
    found = model(tokens, labels=labels)
    torch.testing.assert_close(found.loss, F.cross_entropy(found.logits, labels))
    with pytest.raises(ValueError, match="labels hold 3; this model has 3 classes"):
        model(tokens, labels=labels + 1)
    with pytest.raises(ValueError, match="classifier_pooling is 'max'; it must be one of mean, last"):
        classifier("max")


# Of classes: tests/evals/test_genomics.py.
@pytest.mark.parametrize("kind", ["series", pytest.param("backbone", marks=pytest.mark.slow)])
def test_a_saved_folder_loads_with_transformers_alone_and_computes_the_same(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model: Any = TitansBackbone(TitansHFConfig(**SMALL, variant="mac"))
    example = {"inputs_embeds": torch.randn(1, 11, 16)}
    if kind == "series":
        model, example = series_model(frame="einfft", scaling="revin").float(), {"past_values": windows(1).float()}
    folder = tmp_path / "model"
    assert save_alone(model, folder, example) <= 1e-5
    code = {file.name for file in folder.glob("*.py")}
    assert ("tasks_titans.py" in code) == (kind != "backbone")
    assert len(list(folder.iterdir())) <= 16
    assert "AutoModel" in (folder / "README.md").read_text()
    again = type(model).from_pretrained(folder).eval()
    for name, value in model(**example).items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(again(**example)[name], value)
    assert verify(folder).compared == sum(
        torch.tensor(value).numel() for value in json.loads((folder / "proof.json").read_text())["outputs"].values()
    )
    if kind == "series":
        proof = json.loads((folder / "proof.json").read_text())
        proof["outputs"]["loc"][0] += 1
        (folder / "proof.json").write_text(json.dumps(proof))
        with pytest.raises(ProofFailed, match="differs from the trained one by 1 in loc"):
            verify(folder)


def test_a_classifier_is_not_read_as_a_language_model(tmp_path: Path) -> None:
    classifier().save_pretrained(tmp_path)
    with pytest.raises(ExportError, match="holds a TitansForSequenceClassification, no language model"):
        read_config(tmp_path)


def test_a_language_model_and_a_foreign_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("")
    with pytest.raises(ExportError, match="is not an earlier export"):
        save_alone(series_model(), tmp_path, {"past_values": windows(1)})
    with pytest.raises(ExportError, match=r"TitansModel is none of .*; export a trained run with"):
        save_alone(TitansModel(TitansHFConfig(**SMALL, variant="lmm", vocab_size=9)), tmp_path / "new", {})
