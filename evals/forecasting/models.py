"""The forecasters that are compared, each under PatchTST's contract: past_values, future_values; loss, forecast."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evals.command_line import EvaluationError
from evals.forecasting import OTHERS, ForecastingSettings
from evals.forecasting.data import Windows
from evals.trainer import titans_sizes

_HEAD_WIDTH = 16


class _Forecaster(nn.Module):
    """What the two below share: the loss and the names of what comes out."""

    def forward(self, past_values: Tensor, future_values: Tensor | None = None) -> dict[str, Tensor]:
        """(B, T, C) to {"prediction_outputs": (B, F, C)}, and "loss" in front where the future is given."""
        forecast = self.forecast(past_values.transpose(1, 2)).transpose(1, 2)
        loss = {} if future_values is None else {"loss": F.mse_loss(forecast, future_values)}
        return loss | {"prediction_outputs": forecast}

    def forecast(self, x: Tensor) -> Tensor:
        """(B, C, T) to (B, C, F)."""
        raise NotImplementedError


class RepeatLast(_Forecaster):
    """The last value of the window, again and again."""

    def __init__(self, horizon: int) -> None:
        super().__init__()
        self.horizon = horizon

    def forecast(self, x: Tensor) -> Tensor:
        """(B, C, T) to (B, C, F)."""
        return x[..., -1:].expand(-1, -1, self.horizon)


class DLinear(_Forecaster):
    """A moving average of 25 steps and what it leaves, a linear map of each (Zeng et al., arXiv:2205.13504)."""

    def __init__(self, context: int, horizon: int) -> None:
        super().__init__()
        self.trend, self.rest = nn.Linear(context, horizon), nn.Linear(context, horizon)
        for linear in (self.trend, self.rest):
            nn.init.constant_(linear.weight, 1 / context)  # as published

    def forecast(self, x: Tensor) -> Tensor:
        """(B, C, T) to (B, C, F)."""
        trend = F.avg_pool1d(F.pad(x, (12, 12), mode="replicate"), 25, 1)
        return self.trend(trend) + self.rest(x - trend)


def build(system: str, settings: ForecastingSettings, channels: int, horizon: int) -> nn.Module:
    """A new model.

    Args:
        system: Its name, as in settings.systems.
        settings: Sizes.
        channels: C.
        horizon: F.

    Raises:
        EvaluationError: The sizes do not fit it, or there is no such system.
    """
    if system == "repeat":
        return RepeatLast(horizon)
    if system == "dlinear":
        return DLinear(settings.context, horizon)
    shared: dict[str, Any] = {
        "num_input_channels": channels,
        "context_length": settings.context,
        "prediction_length": horizon,
        "patch_length": settings.patch_length,
        "patch_stride": settings.patch_stride,
    }
    heads = max(1, settings.dim // _HEAD_WIDTH)
    try:
        return (
            _ours(system, settings, shared, heads) if system not in OTHERS else _theirs(system, settings, shared, heads)
        )
    except ValueError as fault:
        raise EvaluationError(f"--systems {system}: {fault}") from None


def _ours(system: str, settings: ForecastingSettings, shared: dict[str, Any], heads: int) -> nn.Module:
    from titans_mcore.hf.configuration_titans import TitansTimeSeriesConfig
    from titans_mcore.hf.tasks_titans import TitansForTimeSeriesPrediction

    config = TitansTimeSeriesConfig(
        **shared,
        variant=system,
        channels=settings.channels,
        scaling=settings.scaling,
        frame=settings.frame,
        **titans_sizes(settings.layers, settings.dim, heads, settings.chunk_size),
    )
    return TitansForTimeSeriesPrediction(config)


def _theirs(system: str, settings: ForecastingSettings, shared: dict[str, Any], heads: int) -> nn.Module:
    from transformers import PatchTSMixerConfig, PatchTSMixerForPrediction, PatchTSTConfig, PatchTSTForPrediction

    shared = {**shared, "d_model": settings.dim, "scaling": "std", "loss": "mse"}
    if system == "patchtsmixer":
        return PatchTSMixerForPrediction(PatchTSMixerConfig(**shared, num_layers=settings.layers))
    # As published, all tokens go to the forecast; transformers' default is their mean.
    shared |= {"num_hidden_layers": settings.layers, "num_attention_heads": heads, "pooling_type": None}
    return PatchTSTForPrediction(PatchTSTConfig(**shared, ffn_dim=2 * settings.dim))


@torch.inference_mode()
def errors(model: nn.Module, windows: Windows, batch: int = 64) -> tuple[float, float]:
    """Mean squared and mean absolute error over all windows, steps and channels; no window is left out."""
    squared = absolute = torch.zeros((), dtype=torch.float64)
    numbers = 0
    for begin in range(0, len(windows), batch):
        samples = [windows[index] for index in range(begin, min(begin + batch, len(windows)))]
        past, future = (torch.stack([sample[name] for sample in samples]) for name in samples[0])
        off = (model(past_values=past)["prediction_outputs"] - future).double()
        squared, absolute, numbers = squared + off.square().sum(), absolute + off.abs().sum(), numbers + off.numel()
    return float(squared) / numbers, float(absolute) / numbers


@torch.inference_mode()
def carried_errors(model: Any, windows: Windows) -> tuple[tuple[float, float], tuple[float, float], int]:
    """Errors over windows that follow each other without overlap, from an empty state, and from the last one's.

    Args:
        model: One of ours.
        windows: Of which each `context`-th is read.

    Returns:
        Mean squared and absolute error of both, and how many windows there were.
    """
    from titans_mcore.hf.cache_titans import TitansCache

    cache, places = TitansCache(model.config.num_layers), range(0, len(windows), windows.context)
    off: list[list[Tensor]] = [[], []]
    for place in places:
        past, future = (window[None] for window in windows[place].values())
        for kept, carried in zip(off, ({}, {"cache": cache}), strict=True):
            kept.append((model(past_values=past, **carried).prediction_outputs - future).double())
    empty, goes_on = (torch.cat(kept) for kept in off)
    alone, together = ((float(x.square().mean()), float(x.abs().mean())) for x in (empty, goes_on))
    return alone, together, len(places)
