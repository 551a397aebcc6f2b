"""Titans beyond text: classifying sequences, and forecasting time series under PatchTST's contract.

Both are the language model's blocks (modeling_titans.py) with other ends. Letters as in config.py; C here are channels
of a series, P steps of a patch, F steps that are forecast.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.cache_utils import Cache
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.utils import ModelOutput

from .configuration_titans import TitansHFConfig, TitansTimeSeriesConfig
from .modeling_titans import TitansBackbone, TitansModel, TitansPreTrainedModel

_POOLING = ("mean", "last")


class TitansForSequenceClassification(TitansPreTrainedModel):
    """TitansModel, its last hidden states pooled, and a linear map to classes.

    Args:
        config: The settings, with transformers' num_labels, and classifier_pooling: mean of the tokens (the default) or
            the last one.

    Raises:
        ValueError: There is no such pooling.
    """

    accepts_loss_kwargs = False  # the loss is a mean over the batch: Trainer divides it where batches accumulate

    def __init__(self, config: TitansHFConfig) -> None:
        super().__init__(config)
        self.pooling = getattr(config, "classifier_pooling", _POOLING[0])
        if self.pooling not in _POOLING:
            raise ValueError(f"classifier_pooling is {self.pooling!r}; it must be one of {', '.join(_POOLING)}")
        self.model = TitansModel(config)
        self.classes = int(config.num_labels or 0)
        self.score = nn.Linear(config.dim, self.classes, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput | tuple[Any, ...]:
        """Logits (B, num_labels) of whole sequences; padding, on any side, changes nothing.

        Args:
            input_ids: (B, T).
            attention_mask: (B, T), 1 for tokens and 0 for padding.
            inputs_embeds: (B, T, E) instead of input_ids.
            labels: (B,) classes; with them the mean cross-entropy is returned too.
            output_hidden_states: Return the hidden states between blocks too.
            return_dict: False for a tuple.
            **kwargs: As TitansBackbone.forward's.

        Raises:
            ValueError: As TitansModel.forward's, or a label is no class of this model.
        """
        outputs = self.model(
            input_ids,
            attention_mask,
            None,
            inputs_embeds,
            use_cache=False,
            output_hidden_states=output_hidden_states,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        real = torch.ones_like(hidden[..., 0]) if attention_mask is None else attention_mask.to(hidden)
        if self.pooling == "last":
            places = torch.arange(hidden.shape[1], device=hidden.device)
            real = F.one_hot((real * places).argmax(1), hidden.shape[1]).to(hidden)
        # What stands at padding means nothing, and may be anything: 0 x NaN is NaN.
        hidden = hidden.masked_fill(~real.bool()[..., None], 0)
        logits = self.score(hidden.sum(1) / real.sum(1, keepdim=True).clamp_min(1))
        loss = None
        if labels is not None:
            low, high = int(labels.min()), int(labels.max())
            if low < 0 or high >= self.classes:
                raise ValueError(
                    f"labels hold {low if low < 0 else high}; this model has {self.classes} classes, from 0"
                )
            loss = F.cross_entropy(logits, labels)
        output = SequenceClassifierOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states)
        return output.to_tuple() if return_dict is False else output


class EinFFT(nn.Module):
    """SiMBA's channel mixer: complex maps of blocks of channels, between a Fourier transform and its inverse.

    The transform runs over positions too, so that every position sees all: it is not causal, and cannot stream.
    (Patro and Agneeswaran, arXiv:2403.15360, section 3.)

    Args:
        dim: E, a multiple of 4.
    """

    BLOCKS, SHRINK = 4, 0.01

    def __init__(self, dim: int) -> None:
        super().__init__()
        width = dim // self.BLOCKS
        self.weight = nn.Parameter(torch.empty(2, 2, self.BLOCKS, width, width))  # layer; real and imaginary part
        self.bias = nn.Parameter(torch.empty(2, 2, self.BLOCKS, width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As the frame begins: small maps."""
        nn.init.normal_(self.weight, std=0.02)
        nn.init.normal_(self.bias, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, E) to (B, T, E)."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        axes = (1, 2)
        z = torch.fft.fft2(wide.unflatten(-1, (self.BLOCKS, -1)), dim=axes, norm="ortho")
        for layer in range(2):
            weight, bias = (torch.complex(*part[layer].to(wide.dtype)) for part in (self.weight, self.bias))
            z = torch.einsum("btkd,kde->btke", z, weight) + bias
            if layer == 0:
                z = torch.complex(F.relu(z.real), F.relu(z.imag))
        z = torch.complex(F.softshrink(z.real, self.SHRINK), F.softshrink(z.imag, self.SHRINK))
        return torch.fft.ifft2(z, dim=axes, norm="ortho").real.flatten(2).to(x.dtype)


@dataclass
class TitansForecast(ModelOutput):
    """What TitansForTimeSeriesPrediction returns, with the names of PatchTST's output.

    Attributes:
        loss: Mean squared error in the units of the values; None without future_values.
        prediction_outputs: (B, F, C), in the units of the values.
        hidden_states: Between blocks, where asked for; (B C, tokens, E), or (B, tokens, E) of channels together.
        loc: (B, 1, C) what was taken off each window.
        scale: (B, 1, C) what each window was divided by.
    """

    loss: Tensor | None = None
    prediction_outputs: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    loc: Tensor | None = None
    scale: Tensor | None = None


@dataclass
class TitansSamples(ModelOutput):
    """What TitansForTimeSeriesPrediction.generate returns.

    Attributes:
        sequences: (B, 1, F, C); the model gives one forecast, no distribution.
    """

    sequences: Tensor | None = None


class TitansForTimeSeriesPrediction(TitansPreTrainedModel):
    """The memory between a linear map of patches and one of all tokens to the forecast.

    Args:
        config: The settings.
    """

    config_class = TitansTimeSeriesConfig
    main_input_name = "past_values"
    accepts_loss_kwargs = False

    def __init__(self, config: TitansTimeSeriesConfig) -> None:
        super().__init__(config)
        together = config.num_input_channels if config.channels == "together" else 1
        self.embedding = nn.Linear(config.patch_length * together, config.dim)
        self.model = TitansBackbone(config)
        if config.frame == "einfft":
            for block in self.model.layers:
                block.mlp = EinFFT(config.dim)
        self.head = nn.Linear(config.num_tokens * config.dim, config.prediction_length * together)
        if config.scaling == "revin":
            self.gain = nn.Parameter(torch.ones(config.num_input_channels))
            self.shift = nn.Parameter(torch.zeros(config.num_input_channels))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        # A norm follows the embedding: of a single number times a vector it would keep the sign alone, so the bias is
        # as large as the weight from the start, as in torch.
        if module is self.embedding or module is self.head or isinstance(module, EinFFT):
            module.reset_parameters()
        elif module is self and self.config.scaling == "revin":
            nn.init.ones_(self.gain)
            nn.init.zeros_(self.shift)
        else:
            super()._init_weights(module)

    def forward(
        self,
        past_values: Tensor,
        past_observed_mask: Tensor | None = None,
        future_values: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> TitansForecast | tuple[Any, ...]:
        """Forecasts the steps behind a window.

        Args:
            past_values: (B, context_length, C).
            past_observed_mask: The same shape, 0 where a value is missing; whatever stands there is not read.
            future_values: (B, F, C), for the loss.
            output_hidden_states: Return the hidden states between blocks too.
            output_attentions: Refused where true; there are none.
            return_dict: False for a tuple.
            cache: A TitansCache of the blocks, where the window follows those that it has read: the memory goes on
                learning from window to window. It is brought forward in place.
            **kwargs: As TitansBackbone.forward's.

        Raises:
            ValueError: A shape does not fit the configuration, attention weights are asked for, or a cache where the
                frame is not causal.
        """
        if cache is not None and self.config.frame == "einfft":
            raise ValueError("cache: frame einfft is not causal and cannot go on from window to window; leave it out")
        length, channels = self.config.context_length, self.config.num_input_channels
        _check_shape("past_values", past_values, (length, channels))
        _check_shape("future_values", future_values, (self.config.prediction_length, channels))
        _check_shape("past_observed_mask", past_observed_mask, (length, channels))
        x, loc, scale = self._normalised(past_values, past_observed_mask)
        patches = x[:, length - self.config.covered :].unfold(1, self.config.patch_length, self.config.patch_stride)
        apart = self.config.channels == "apart"
        tokens = (
            patches.transpose(1, 2).flatten(0, 1) if apart else patches.flatten(2)
        )  # (B C, tokens, P) or (B, ., C P)
        outputs = self.model(
            self.embedding(tokens),
            cache=cache,
            use_cache=False,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            **kwargs,
        )
        forecast = self.head(outputs.last_hidden_state.flatten(1)).view(len(x), channels, -1).transpose(1, 2)
        if self.config.scaling == "revin":
            forecast = (forecast - self.shift) / (self.gain + 1e-10)
        forecast = forecast * scale + loc
        loss = None if future_values is None else F.mse_loss(forecast, future_values)
        output = TitansForecast(loss, forecast, outputs.hidden_states, loc, scale)
        return output.to_tuple() if return_dict is False else output

    def _normalised(self, values: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Windows (B, T, C) as the blocks read them, missing values as 0, with loc and scale (B, 1, C)."""
        seen = torch.ones_like(values, dtype=torch.bool) if mask is None else mask.to(torch.bool)
        values = values.masked_fill(~seen, 0)
        loc, scale = torch.zeros_like(values[:, :1]), torch.ones_like(values[:, :1])
        if self.config.scaling != "none":
            count = seen.sum(1, keepdim=True).clamp_min(1)
            loc = values.sum(1, keepdim=True) / count
            scale = ((values - loc).masked_fill(~seen, 0).square().sum(1, keepdim=True) / count + 1e-5).sqrt()
        x = (values - loc) / scale
        if self.config.scaling == "revin":
            x = x * self.gain + self.shift
        return x.masked_fill(~seen, 0), loc, scale

    @torch.no_grad()
    def generate(self, past_values: Tensor, past_observed_mask: Tensor | None = None) -> TitansSamples:
        """The forecast of forward() as PatchTST's generate gives it.

        Args:
            past_values: (B, context_length, C).
            past_observed_mask: As in forward.
        """
        forecast = self(past_values, past_observed_mask).prediction_outputs
        return TitansSamples(forecast.unsqueeze(1))


def _check_shape(name: str, value: Tensor | None, shape: tuple[int, int]) -> None:
    if value is not None and tuple(value.shape[1:]) != shape:
        raise ValueError(f"{name} is {tuple(value.shape)}; this model takes (B, {shape[0]}, {shape[1]})")
