"""The model as transformers uses it: generation, caches, training."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import DynamicCache
from transformers.generation.streamers import BaseStreamer

from titans_mcore.config import TitansConfig
from titans_mcore.decoding import Decoder
from titans_mcore.hf.cache_titans import TitansCache
from titans_mcore.hf.configuration_titans import CACHE_NAMES, TitansHFConfig
from titans_mcore.hf.modeling_titans import CACHE_FIELD, TitansForCausalLM, TitansModel
from titans_mcore.mixers import MIXERS

from ..matrices import ONE_OF_A_KIND
from ..mixers.test_decoding import recorded
from .hf_runs import tiny
from .models import make

LENGTH = 21


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(3, 330, (2, LENGTH), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("variant", ONE_OF_A_KIND)
@pytest.mark.parametrize(
    "how",
    [{"do_sample": False}, {"do_sample": True, "temperature": 0.9}, {"do_sample": False, "num_beams": 3}],
    ids=["greedy", "sampling", "beams"],
)
@torch.no_grad()
def test_generate_with_cache_equals_without(variant: str, how: dict[str, Any], tokens: Tensor) -> None:
    model = make(variant)
    results = []
    for use_cache in (True, False):
        torch.manual_seed(5)
        results.append(model.generate(tokens, max_new_tokens=9, use_cache=use_cache, **how))
    assert results[0].shape == (2, LENGTH + 9)
    assert torch.equal(*results)


@pytest.mark.parametrize(("variant", "piece"), [*((variant, 5) for variant in MIXERS), ("mac", 1), ("mac", 8)])
@torch.no_grad()
def test_prefill_in_pieces_gives_the_same_tokens(variant: str, piece: int, tokens: Tensor) -> None:
    model = make(variant)
    whole = model.generate(tokens, max_new_tokens=6, do_sample=False)
    assert torch.equal(model.generate(tokens, max_new_tokens=6, do_sample=False, prefill_chunk_size=piece), whole)


@pytest.mark.parametrize("variant", MIXERS)
@torch.no_grad()
def test_several_tokens_continue_from_a_cache(variant: str, tokens: Tensor) -> None:
    model = make(variant)
    whole = model(tokens, use_cache=False)
    assert whole.cache is None
    cache = model(tokens[:, :10]).cache
    assert isinstance(cache, TitansCache)
    kept = copy.deepcopy(cache)
    output = model(tokens[:, 10:], cache=cache)
    assert output.cache is cache
    assert cache.get_seq_length() == LENGTH
    torch.testing.assert_close(output.logits, whole.logits[:, 10:], rtol=0, atol=1e-5)
    assert kept.get_seq_length() == 10
    again = model(tokens[:, 10:], cache=kept)
    assert torch.equal(again.logits, output.logits)


@torch.no_grad()
def test_generate_goes_on_from_a_given_cache(tokens: Tensor) -> None:
    model = make()
    cache = TitansCache(2)
    model(tokens[:, :13], cache=cache)
    continued = model.generate(tokens, cache=cache, max_new_tokens=5, do_sample=False)
    assert torch.equal(continued, model.generate(tokens, max_new_tokens=5, do_sample=False))
    with_cache = model.generate(tokens, max_new_tokens=5, do_sample=False, return_dict_in_generate=True)
    assert with_cache[CACHE_FIELD].get_seq_length() == LENGTH + 4  # an output of transformers' own


@pytest.mark.parametrize("name", CACHE_NAMES)
@pytest.mark.parametrize("base", [False, True], ids=["causal", "base"])
@torch.no_grad()
def test_a_cache_goes_in_and_comes_out_under_either_name(name: str, base: bool, tokens: Tensor) -> None:
    causal = make()
    model, cache = causal.model if base else causal, TitansCache(2)
    whole = model(tokens, use_cache=False)[0]
    first = model(tokens[:, :10], **{name: cache})
    assert all(getattr(first, other) is cache for other in CACHE_NAMES)
    torch.testing.assert_close(model(tokens[:, 10:], **{name: cache})[0], whole[:, 10:], rtol=0, atol=1e-5)
    assert cache.get_seq_length() == LENGTH
    assert all(getattr(model(tokens, use_cache=False), other) is None for other in CACHE_NAMES)
    assert not hasattr(first, "cash")


@pytest.mark.parametrize("name", CACHE_NAMES)
@pytest.mark.parametrize("how", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
@torch.no_grad()
def test_generate_takes_a_cache_under_either_name(name: str, how: dict[str, Any], tokens: Tensor) -> None:
    model, cache = make(), TitansCache(2)
    beams = how.get("num_beams", 1)
    model(tokens[:, :13].repeat_interleave(beams, 0), cache=cache)
    continued = model.generate(tokens, max_new_tokens=5, do_sample=False, **how, **{name: cache})
    assert cache.get_seq_length() == LENGTH + 4
    assert torch.equal(continued, model.generate(tokens, max_new_tokens=5, do_sample=False, **how))


@torch.no_grad()
def test_a_cache_is_selected_expanded_and_reset(tokens: Tensor) -> None:
    model = make()
    cache = model(tokens[:, :10]).cache
    whole = model(tokens).logits[:, 10:]
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.batch_repeat_interleave(2)
    logits = model(tokens[[1, 1, 0, 0], 10:], cache=cache).logits
    torch.testing.assert_close(logits, whole[[1, 1, 0, 0]], rtol=0, atol=1e-5)
    cache.batch_select_indices(torch.tensor([3]))
    cache.reset()
    assert cache.get_seq_length() == 0
    torch.testing.assert_close(model(tokens[:1], cache=cache).logits[:, 10:], whole[:1], rtol=0, atol=1e-5)
    with pytest.raises(NotImplementedError, match="shortened"):
        cache.crop(3)


@pytest.mark.parametrize("variant", ONE_OF_A_KIND)
@torch.no_grad()
def test_a_saved_cache_goes_on_as_if_it_had_not_been(variant: str, tokens: Tensor, tmp_path: Path) -> None:
    model = make(variant)
    mask = torch.tensor([[0] * 3 + [1] * 7, [1] * 10])
    cache = model(tokens[:, :10], attention_mask=mask).cache
    cache.save(tmp_path / "cache.safetensors")
    loaded = TitansCache.load(tmp_path / "cache.safetensors")
    assert loaded.get_seq_length() == 10
    expected = model(tokens[:, 10:], cache=cache).logits
    assert torch.equal(model(tokens[:, 10:], cache=loaded).logits, expected)


def test_a_file_that_holds_no_cache_gets_a_sentence(tmp_path: Path) -> None:
    TitansCache(2).save(tmp_path / "empty.safetensors")
    assert TitansCache.load(tmp_path / "empty.safetensors").get_seq_length() == 0
    (tmp_path / "text").write_text("no cache")
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    for name in ("text", "other.safetensors", "missing"):
        with pytest.raises(ValueError, match=f"{name} is no Titans cache that can be read"):
            TitansCache.load(tmp_path / name)


@torch.no_grad()
def test_a_streamer_gets_the_tokens_that_are_generated(tokens: Tensor) -> None:
    class Collected(BaseStreamer):
        def __init__(self) -> None:
            self.tokens: list[int] = []

        def put(self, value: Tensor) -> None:
            self.tokens += value.flatten().tolist()

        def end(self) -> None:
            self.tokens.append(-1)

    model, streamer = make(), Collected()
    generated = model.generate(tokens[:1], max_new_tokens=6, do_sample=False, streamer=streamer)
    assert streamer.tokens == [*generated[0].tolist(), -1]


@pytest.mark.parametrize("variant", ONE_OF_A_KIND)
@torch.no_grad()
def test_the_cache_stays_constant_however_much_is_generated(variant: str) -> None:
    model, cache, sizes = make(variant), TitansCache(2), []
    tokens = torch.randint(3, 330, (1, 32))
    for _ in range(4):
        mask = torch.ones_like(tokens)  # without one, tokens of the padding's id that it generates count as padding
        tokens = model.generate(tokens, attention_mask=mask, cache=cache, max_new_tokens=64, do_sample=False)
        sizes.append([layer.state.bytes() for layer in cache.blocks])
    assert cache.get_seq_length() == 32 + 4 * 64 - 1
    assert sizes[0] == sizes[3]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("variant", MIXERS)
@torch.no_grad()
def test_a_million_tokens_leave_a_state_as_large_as_before(variant: str) -> None:
    model = make(variant, num_layers=1, chunk_size=512, segment_length=1024, window=128)
    cache, piece, sizes = TitansCache(1), 8_192, []
    for index in range(-(-1_000_000 // piece)):
        output = model(torch.randint(330, (1, piece)), cache=cache, logits_to_keep=1)
        if index in (7, 121):
            sizes.append(cache.blocks[0].state.bytes())
    assert cache.get_seq_length() >= 1_000_000
    assert output.logits.isfinite().all()
    assert sizes[0] == sizes[1]
    generated = model.generate(torch.zeros(1, 1_007_617).long(), cache=cache, max_new_tokens=5)
    assert generated.shape[1] == 1_007_617 + 5


@torch.no_grad()
def test_logits_to_keep_gives_those_of_the_last_tokens(tokens: Tensor) -> None:
    model = make()
    whole = model(tokens).logits
    torch.testing.assert_close(model(tokens, logits_to_keep=3).logits, whole[:, -3:], rtol=0, atol=1e-6)
    torch.testing.assert_close(
        model(tokens, logits_to_keep=torch.tensor([0, 4])).logits, whole[:, [0, 4]], rtol=0, atol=1e-6
    )


def test_loss_is_the_cross_entropy_of_the_next_token(tokens: Tensor) -> None:
    model = make()
    output = model(tokens, labels=tokens)
    expected = torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    torch.testing.assert_close(output.loss, expected)
    summed = model(tokens, labels=tokens, num_items_in_batch=torch.tensor(10)).loss
    torch.testing.assert_close(summed, expected * (LENGTH - 1) * 2 / 10)


@pytest.mark.parametrize("variant", ONE_OF_A_KIND)
def test_gradient_checkpointing_changes_no_gradient(variant: str, tokens: Tensor) -> None:
    model, gradients = make(variant).train(), []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        gradients.append(torch.autograd.grad(model(tokens, labels=tokens).loss, list(model.parameters())))
    assert all(torch.equal(*both) for both in zip(*gradients, strict=True))


@pytest.mark.parametrize("variant", MIXERS)
def test_gradients_reach_every_parameter_through_the_memory(variant: str, tokens: Tensor) -> None:
    model = make(variant).train()
    output = model(tokens, labels=tokens)
    assert output.cache is None  # no cache while training, unless it is asked for
    output.loss.backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not without


def test_misuse_gets_a_sentence(tokens: Tensor) -> None:
    model = make()
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model()
    with pytest.raises(ValueError, match="attention weights"):
        model(tokens, output_attentions=True)
    for call in (model, model.model, model.generate):
        with pytest.raises(ValueError, match="cache and past_key_values are two names of one argument"):
            call(tokens, cache=TitansCache(2), past_key_values=TitansCache(2))
    with pytest.raises(ValueError, match="3 layers; this model has 2"):
        model(tokens, cache=TitansCache(3))
    foreign = DynamicCache()
    foreign.update(torch.zeros(2, 1, 4, 4), torch.zeros(2, 1, 4, 4), 0)
    with pytest.raises(ValueError, match="DynamicCache of another model"):
        model(tokens, cache=foreign)
    for call in (model, model.generate):
        with pytest.raises(ValueError, match="there are no tokens to read; give at least one"):
            call(tokens[:, :0])
        with pytest.raises(ValueError, match="input_ids hold 330; the vocabulary has 330 tokens, 0 to 329"):
            call(torch.cat([tokens, torch.full_like(tokens, 330)], 1))
    with pytest.raises(ValueError, match="cache_implementation is 'static'; a Titans cache has a constant size"):
        model.generate(tokens, cache_implementation="static")
    with pytest.raises(ValueError, match=r"\(B, T\)"):
        model(tokens, attention_mask=torch.ones(2, 1, LENGTH, LENGTH))
    with pytest.raises(ValueError, match="20 columns; give one for each of the 21 tokens"):
        model(tokens, attention_mask=torch.ones(2, LENGTH - 1))


def test_embeddings_hidden_states_and_tuples(tokens: Tensor) -> None:
    model = make()
    output = model(tokens, output_hidden_states=True)
    assert len(output.hidden_states) == 3
    embedded = model(inputs_embeds=model.get_input_embeddings()(tokens), return_dict=False)
    assert torch.equal(embedded[0], output.logits)
    base = TitansModel(model.config).eval()
    base.load_state_dict(model.model.state_dict())
    assert torch.equal(base(tokens).last_hidden_state, output.hidden_states[-1])


@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings_are_one_matrix(tied: bool) -> None:
    model = make(tie_embeddings=tied)
    assert (model.lm_head.weight is model.model.embedding.weight) == tied
    assert model.config.tie_word_embeddings == tied


def test_initial_weights_are_the_mixers_own_and_complete() -> None:
    torch.manual_seed(0)
    model = TitansForCausalLM(TitansHFConfig.from_titans(tiny(init_std=0.02)))
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, 7.0)
    model.apply(model._init_weights)
    assert not [name for name, parameter in model.named_parameters() if (parameter == 7.0).any()]
    mixer = model.model.layers[0].mixer
    assert abs(mixer.q_proj.weight.std() / 0.02 - 1) < 0.2
    assert abs(mixer.attention_output.weight.std() / (0.02 / 2) - 1) < 0.2  # / sqrt(2 * 2 blocks)
    assert abs(mixer.memory.initial_weights[0].std() - 1) < 0.2


def test_the_model_has_no_buffers_that_loading_would_lose() -> None:
    for variant in MIXERS:
        assert not list(make(variant).named_buffers())


def test_configuration_converts_both_ways_and_names_bad_settings() -> None:
    config = tiny(variant="mal", tie_embeddings=False, memory_depth=3)
    exported = TitansHFConfig.from_titans(config, bos_token_id=1)
    assert exported.to_titans() == config
    assert TitansHFConfig.from_dict(exported.to_dict()).to_titans() == config
    assert exported.hidden_size == config.dim
    assert exported.num_hidden_layers == config.num_layers
    assert TitansHFConfig().to_titans() == TitansConfig()
    assert TitansHFConfig(hidden_size=64, num_attention_heads=4).to_titans() == TitansConfig(dim=64, num_heads=4)
    with pytest.raises(ValueError, match="dim 30 is not divisible"):
        TitansHFConfig(dim=30, num_heads=4)


def test_a_new_model_begins_recalling_and_a_loaded_one_stays_as_it_was_trained(tmp_path: Path) -> None:
    model = make("mac", memory_init="next_token")
    mixer = model.model.layers[0].mixer
    maps = mixer.q_proj, mixer.kv_proj, mixer.attention_output, mixer.memory_output
    for module in maps:  # from whatever init_std they came
        assert module.weight.std().item() == pytest.approx(32**-0.5, rel=0.1)
    for query, key, heads, width in (
        (mixer.q_proj, mixer.kv_proj, 4, 8),
        (mixer.memory.qg_proj, mixer.memory.kv_gates_proj, 2, 16),
    ):
        queries, keys = (module.weight.unflatten(0, (heads, -1))[:, :width] for module in (query, key))
        assert torch.equal(queries, keys)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    loaded = TitansForCausalLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(loaded[name], weight) for name, weight in model.state_dict().items())


@pytest.mark.parametrize("how", [{"do_sample": False}, {"num_beams": 2, "do_sample": False}], ids=["greedy", "beams"])
@pytest.mark.parametrize("variant", ["lmm", "mag", "mac", pytest.param("mal", marks=pytest.mark.slow)])
@torch.no_grad()
def test_what_is_captured_generates_the_same(variant: str, how: dict[str, Any]) -> None:
    """Padded rows, chunks and windows that end on the way, beams that change places; and the cache goes on."""
    model, rows = make(variant, memory_backend="chunked").double(), torch.randint(2, 64, (2, LENGTH))
    mask = torch.ones_like(rows)
    mask[1, :7] = 0
    cache, eager = TitansCache(2), model.generate(rows, attention_mask=mask, max_new_tokens=50, **how)
    captured: list[Any] = []
    cache.decoder = Decoder(model.model._read, model.model, lambda run: captured.append(run) or recorded(run))
    assert torch.equal(model.generate(rows, attention_mask=mask, max_new_tokens=50, cache=cache, **how), eager)
    assert len(captured) == 1
    kept = copy.deepcopy(cache)
    assert kept.decoder is None
    more = torch.randint(2, 64, (len(kept.blocks[0].state.tensors()[0]), 9))
    assert torch.equal(model(more, cache=cache).logits, model(more, cache=kept).logits)
