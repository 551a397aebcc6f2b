"""Titans for transformers: one process, whole parameters, the same mixers and memory as in training.

In the package this file imports the mathematics from its neighbours; an exported folder carries the same lines in the
files beside it.
"""

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from ..config import TitansConfig
from ..decoding import Decoder
from ..memory import PackedRows
from ..mixers.parts import FromParts, Linear, Parts, ResidualLinear, rms_norm
from .cache_titans import TitansCache
from .configuration_titans import CACHE_NAMES, CacheByBothNames, TitansHFConfig, cache_field, given_cache
from .files_titans import check_weight_files
from .padding_titans import check_arguments, padding_of, predicted, rows_on


class RMSNorm(nn.Module):
    """RMSNorm over the last axis of width dim."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """x normalised, same shape and dtype."""
        return rms_norm(x, self.weight, self.eps)


class TitansMLP(nn.Module):
    """SwiGLU: W_down (silu(W_gate x) * W_up x)."""

    def __init__(self, config: TitansConfig) -> None:
        super().__init__()
        self.gate_up_proj = Linear(config.dim, 2 * config.ffn_dim)
        self.down_proj = ResidualLinear(config.ffn_dim, config.dim)

    def forward(self, x: Tensor) -> Tensor:
        """(..., E) to (..., E)."""
        gate, up = self.gate_up_proj(x).chunk(2, -1)
        return self.down_proj(F.silu(gate) * up)


def _traced(mixer: nn.Module, x: Tensor, state: Any, rows: PackedRows | None) -> tuple[Tensor, Any]:
    return mixer(x, state, rows)


_untraced = torch.compiler.disable(_traced)
"""torch.compile leaves out what loops over chunks, whose number and shapes depend on the rows: traced, it breaks into
dozens of graphs and takes minutes. Norms, feed-forward layers and output are compiled."""


class TitansBlock(nn.Module):
    """x += Mixer(RMSNorm(x)); x += SwiGLU(RMSNorm(x)); some mixers add something before."""

    def __init__(self, config: TitansConfig, block: int) -> None:
        super().__init__()
        self.input_norm = RMSNorm(config.dim, config.norm_eps)
        self.mixer, self.fronted = _make_mixer(config, block), config.blocks[block].front
        self.pre_mlp_norm = RMSNorm(config.dim, config.norm_eps)
        self.mlp = TitansMLP(config)
        self.looping = not config.blocks[block].attention or config.blocks[block].memory

    def forward(self, hidden: Tensor, state: Any = None, rows: PackedRows | None = None) -> tuple[Tensor, Any]:
        """Hidden states (B, T, E) and the mixer's state after them; a state of None begins a sequence."""
        rows = rows_on(hidden.device, rows)
        run = _untraced if self.looping or rows is not None else _traced
        if self.fronted:
            hidden, state = run(self.mixer.get_submodule("front"), hidden, state, rows)
        mixed, state = run(self.mixer, self.input_norm(hidden), state, rows)
        hidden = hidden + mixed
        return hidden + self.mlp(self.pre_mlp_norm(hidden)), state


def _make_mixer(config: TitansConfig, block: int) -> nn.Module:
    made, parts = config.blocks[block].module, Parts(config)
    if torch.get_default_device().type != "meta":
        return made(config, parts)
    # While transformers 5 builds on the meta device, it makes some constants on the CPU; a mixer may not mix the two.
    with torch.device("cpu"):
        return made(config, parts).to("meta")


@dataclass
class TitansModelOutput(CacheByBothNames, BaseModelOutputWithPast):
    """What TitansModel returns."""


@dataclass
class TitansCausalLMOutput(CacheByBothNames, CausalLMOutputWithPast):
    """What TitansForCausalLM returns."""


CACHE_FIELD = cache_field(TitansCausalLMOutput)


def _named(cache: Cache | None) -> dict[str, Any]:
    """The cache under the name that transformers has for it; nothing where there is none."""
    return {} if cache is None else {CACHE_FIELD: cache}


_NO_TOKENS = "there are no tokens to read; give at least one, such as the start token"
_ATTENTION = {"eager": "dense", "sdpa": "sdpa", "flash_attention_2": "flash"}


def _attention_backend(given: Mapping[str, Any]) -> dict[str, Any]:
    """What of from_pretrained()'s arguments is another one where attn_implementation, transformers' name, is given."""
    config = given.get("config")
    asked = given.get("attn_implementation")
    if asked is None and config is not None and not isinstance(config, str | PathLike):
        asked = config._attn_implementation  # where one of the Auto classes has read it first
    if asked is None:
        return {}
    if asked not in _ATTENTION:
        raise ValueError(
            f"attn_implementation is {asked!r}; Titans models have {', '.join(_ATTENTION)}, or leave it out for the "
            "fastest that there is"
        )
    if config is None or isinstance(config, str | PathLike):
        return {"attention_backend": _ATTENTION[asked]}
    config = copy.deepcopy(config)
    config.attention_backend = _ATTENTION[asked]
    return {"config": config}


class TitansPreTrainedModel(PreTrainedModel):
    """Initial weights, and what transformers asks of every model."""

    config_class = TitansHFConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flash_attn = True
    _no_split_modules = ["TitansBlock"]  # noqa: RUF012 - the base class declares it so
    _skip_keys_device_placement = list(CACHE_NAMES)  # noqa: RUF012

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | PathLike[str] | None, *model_args: Any, **kwargs: Any
    ) -> "TitansPreTrainedModel":
        """As every model of transformers; a folder that is not whole is refused with a sentence.

        Raises:
            OSError: A file of weights is missing or damaged.
            ValueError: The device map leaves parts of the model where they cannot compute, pickle is asked for, or an
                attention that there is not.
        """
        kwargs |= _attention_backend(kwargs)
        if pretrained_model_name_or_path is not None and not kwargs.get("variant"):
            check_weight_files(Path(pretrained_model_name_or_path, kwargs.get("subfolder") or ""))
        # A pickle runs what is in it.
        if kwargs.setdefault("use_safetensors", True) is False:
            raise ValueError("use_safetensors is False; Titans models are read from safetensors alone, leave it out")
        loaded = super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        check_device_map(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded

    def _init_weights(self, module: nn.Module) -> None:
        config = self.config.to_titans()
        if isinstance(module, nn.Linear | nn.Embedding):
            shrink = math.sqrt(2.0 * config.num_layers) if isinstance(module, ResidualLinear) else 1.0
            nn.init.normal_(module.weight, std=config.init_std / shrink)
        elif isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, FromParts):
            self._init_own_parameters(module, config)

    @staticmethod
    @torch.no_grad()
    def _init_own_parameters(module: FromParts, config: TitansConfig) -> None:
        """A mixer states its initial values in its constructor: they are taken from a new one."""
        fresh = dict(type(module)(config, Parts(config)).named_parameters())
        lists = {name for name, child in module.named_children() if isinstance(child, nn.ParameterList)}
        for name, parameter in module.named_parameters():
            own = "." not in name or name.partition(".")[0] in lists
            if own and not getattr(parameter, "_is_hf_initialized", False):
                parameter.copy_(fresh[name])
        if not any(getattr(parameter, "_is_hf_initialized", False) for parameter in module.parameters()):
            module.begin_recalling()


class TitansBackbone(TitansPreTrainedModel):
    """Blocks and the last norm, without a vocabulary: the memory as a layer on vectors of any kind.

    `backbone(inputs_embeds=x).last_hidden_state` of x (B, T, E) is (B, T, E), causal like the language model's.

    Args:
        config: The settings; of them vocab_size and tie_embeddings mean nothing here.
    """

    main_input_name = "inputs_embeds"
    reads_tokens = False

    def __init__(self, config: TitansHFConfig) -> None:
        super().__init__(config)
        titans = config.to_titans()
        if self.reads_tokens:
            self.embedding = nn.Embedding(titans.vocab_size, titans.dim)
        self.layers = nn.ModuleList([TitansBlock(titans, block) for block in range(titans.num_layers)])
        self.final_norm = RMSNorm(titans.dim, titans.norm_eps)
        self.gradient_checkpointing = False  # transformers sets it, and the function beside it
        self.post_init()

    def forward(
        self,
        inputs_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> TitansModelOutput | tuple[Any, ...]:
        """Reads whole sequences, or the next piece of those that the cache has read before.

        Args:
            inputs_embeds: (B, T, E).
            attention_mask: 1 for tokens and 0 for padding, on any side, (B, T) or (B, all tokens so far). A padded row
                computes what it computes alone; what comes out for padding means nothing.
            cache: A TitansCache, which is brought forward in place, or an empty DynamicCache.
            use_cache: Return a cache; by default the configuration's use_cache, and not while training.
            output_hidden_states: Return the hidden states between blocks too.
            return_dict: False for a tuple.
            past_key_values: The other name of cache.
            **kwargs: Where the documents of a row begin, as collators without padding say it: position_ids, seq_idx or
                cu_seq_lens_q. The rest is ignored, as transformers hands every model settings of others; a tensor that
                nothing here would look at is refused.

        Raises:
            ValueError: The vectors have another shape, the mask too, documents cannot begin as they are said to, the
                cache is another model's or comes under both its names, there are no tokens, or attention weights are
                asked for.
        """
        check_arguments(kwargs)
        if kwargs.get("output_attentions"):
            raise ValueError("output_attentions: Titans models do not give attention weights; leave it out")
        width = self.config.dim
        if inputs_embeds is None or inputs_embeds.dim() != 3 or inputs_embeds.shape[-1] != width:
            came = "missing" if inputs_embeds is None else str(tuple(inputs_embeds.shape))
            raise ValueError(f"inputs_embeds is {came}; give (B, T, {width}), vectors of the model's width")
        if not inputs_embeds.shape[1]:
            raise ValueError(_NO_TOKENS)
        cache = self._open_cache(given_cache(cache, past_key_values), use_cache)
        hidden = inputs_embeds
        padding = padding_of(attention_mask, hidden, 0 if cache is None else cache.get_seq_length(), kwargs)
        rows = None if padding is None else padding.rows
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        between: list[Tensor] = []
        hidden = hidden if padding is None else padding.to_front(hidden)
        states: list[Any] = [None] * len(self.layers) if cache is None else [layer.state for layer in cache.blocks]
        if cache is None or padding is not None or wanted or torch.compiler.is_compiling():
            hidden, states = self._read(hidden, states, rows, between)
        else:
            if cache.decoder is None or cache.decoder.step != self._read:
                cache.decoder = Decoder(self._read, self)
            hidden, states = cache.decoder(hidden, states)
        for layer, state in zip([] if cache is None else cache.blocks, states, strict=cache is not None):
            layer.advance(state, hidden.shape[1])
        if padding is not None:
            hidden, between = padding.to_places(hidden), [padding.to_places(x) for x in between]
        output = TitansModelOutput(
            last_hidden_state=hidden,
            hidden_states=(*between, hidden) if wanted else None,
            **_named(cache),
        )
        return output.to_tuple() if return_dict is False else output

    def _read(
        self, hidden: Tensor, states: list[Any], rows: PackedRows | None = None, between: list[Tensor] | None = None
    ) -> tuple[Tensor, list[Any]]:
        """Through all blocks and the last norm; what comes to each block is added to `between`."""
        after = []
        for block, state in zip(self.layers, states, strict=True):
            if between is not None:
                between.append(hidden)
            hidden, state = self._run(block, hidden, state, rows)
            after.append(state)
        return self.final_norm(hidden), after

    def _run(self, block: nn.Module, hidden: Tensor, state: Any, rows: PackedRows | None) -> tuple[Tensor, Any]:
        if self.gradient_checkpointing and self.training:
            return self._gradient_checkpointing_func(block, hidden, state, rows)
        return block(hidden, state, rows)

    def _open_cache(self, given: Cache | None, use_cache: bool | None) -> TitansCache | None:
        if isinstance(given, TitansCache):
            if len(given.layers) != len(self.layers):
                raise ValueError(f"cache has {len(given.layers)} layers; this model has {len(self.layers)}")
            return given
        # generate() brings an empty DynamicCache, which holds keys and values only.
        if given is not None and (type(given) is not DynamicCache or given.get_seq_length()):
            raise ValueError(f"cache is a {type(given).__name__} of another model; give a TitansCache")
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        return TitansCache(len(self.layers)) if use_cache else None


class TitansModel(TitansBackbone):
    """Embedding, blocks and the last norm.

    Args:
        config: The settings.
    """

    main_input_name = "input_ids"
    reads_tokens = True
    _input_embed_layer = "embedding"

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> TitansModelOutput | tuple[Any, ...]:
        """As TitansBackbone.forward, of tokens.

        Args:
            input_ids: (B, T).
            attention_mask: As there.
            cache: As there.
            inputs_embeds: (B, T, E) instead of input_ids.
            **kwargs: As there.

        Raises:
            ValueError: As there, or a token is beyond the vocabulary.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds, and not both")
        hidden = self._embedded(input_ids) if inputs_embeds is None else inputs_embeds
        return super().forward(hidden, attention_mask, cache, **kwargs)

    def _embedded(self, input_ids: Tensor | None) -> Tensor:
        try:
            return self.embedding(input_ids)
        except IndexError as error:  # a GPU has its own way of saying so
            assert input_ids is not None
            rows = self.embedding.num_embeddings
            beyond = input_ids[(input_ids < 0) | (input_ids >= rows)]
            raise ValueError(
                f"input_ids hold {int(beyond[0])}; the vocabulary has {rows} tokens, 0 to {rows - 1}: is it the "
                "tokenizer of this model?"
            ) from error


def check_device_map(model: nn.Module) -> None:
    """Refuses parts that accelerate would bring in from elsewhere, module by module: a memory is no such module.

    Raises:
        ValueError: There are such parts.
    """
    places = {str(place) for place in getattr(model, "hf_device_map", {}).values()}
    if "disk" in places or ("cpu" in places and len(places) > 1):
        raise ValueError(
            f"device_map puts the model on {', '.join(sorted(places))}: Titans models cannot be offloaded; "
            "give devices that hold all of it"
        )


class TitansForCausalLM(TitansPreTrainedModel, GenerationMixin):
    """TitansModel with the output matrix on top.

    Args:
        config: The settings.
    """

    # A mapping for transformers 5; transformers 4 takes its keys.
    _tied_weights_keys = {"lm_head.weight": "model.embedding.weight"}  # noqa: RUF012 - the base class declares it so

    def __init__(self, config: TitansHFConfig) -> None:
        super().__init__(config)
        self.model = TitansModel(config)
        self.lm_head = Linear(config.dim, config.vocab_size)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> TitansCausalLMOutput | tuple[Any, ...]:
        """As TitansModel.forward, with logits (B, T, V) and the loss.

        Args:
            labels: (B, T) ids, input_ids themselves for language modelling (the shift happens here); -100 is left out,
                and so is padding.
            logits_to_keep: Give logits for the last so many tokens, or for these positions; 0 means all.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            cache=cache,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            count = {"num_items_in_batch": kwargs["num_items_in_batch"]} if "num_items_in_batch" in kwargs else {}
            labels = predicted(labels, attention_mask, kwargs)
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **count)
        output = TitansCausalLMOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            **_named(outputs.cache),
        )
        return output.to_tuple() if return_dict is False else output

    def generate(
        self, *args: Any, cache: Cache | None = None, past_key_values: Cache | None = None, **kwargs: Any
    ) -> Any:
        """As every model of transformers, with a cache under either of its names.

        Args:
            *args: As they are.
            cache: What was read before, a TitansCache.
            past_key_values: The other name of cache.
            **kwargs: As they are.

        Raises:
            ValueError: A cache comes under both, or of a kind that holds keys and values; there are no tokens.
        """
        prompt = args[0] if args else kwargs.get("input_ids", kwargs.get("inputs"))
        if isinstance(prompt, Tensor) and prompt.dim() == 2 and not prompt.shape[1] and "inputs_embeds" not in kwargs:
            raise ValueError(_NO_TOKENS)
        kind = kwargs.get("cache_implementation") or getattr(
            kwargs.get("generation_config"), "cache_implementation", None
        )
        if kind not in (None, "dynamic"):
            raise ValueError(
                f"cache_implementation is {kind!r}; a Titans cache has a constant size by itself, leave it out"
            )
        return super().generate(*args, **kwargs, **_named(given_cache(cache, past_key_values)))
