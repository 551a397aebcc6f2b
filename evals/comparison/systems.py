"""The systems, each as large as Transformer++: the width of its feed-forward network makes up for its mixer."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from evals.command_line import EvaluationError
from pretrain.config.files import systems
from pretrain.plan.parameters import count_by_part, parameters_of
from titans_mcore.config import TitansConfig

_REFERENCE = "transformer"
_TOLERANCE = 0.03
_WIDTH_STEP = 8  # the least that GPUs multiply well


@dataclass(frozen=True)
class System:
    """One line of the comparison."""

    name: str
    """As in the presets."""
    model: dict[str, Any]
    """Settings that it does not share with the others, ffn_dim among them."""
    parameters: int
    """Beside the embedding, which is everyone's."""


def choose(names: Sequence[str], shared: TitansConfig) -> list[System]:
    """Systems of one size.

    Args:
        names: Which; none means all.
        shared: What they have in common; its ffn_dim is Transformer++'s.

    Raises:
        EvaluationError: A name is unknown, or a system cannot have Transformer++'s parameters.
    """
    known = systems()
    if unknown := sorted(set(names) - set(known)):
        raise EvaluationError(f"--systems names {', '.join(unknown)}; choose among: {', '.join(known)}")
    target = sum(_count(replace(shared, **known[_REFERENCE])))
    return [_matched(name, known[name], shared, target) for name in names or known]


def _matched(name: str, model: dict[str, Any], shared: TitansConfig, target: int) -> System:
    try:
        feed_forward, rest = _count(replace(shared, **model))
    except ValueError as error:
        raise EvaluationError(f"--config does not suit {name}: {error}") from None
    each = feed_forward // shared.ffn_dim  # three matrices in every block, without biases
    width = max(round((target - rest) / each / _WIDTH_STEP), 1) * _WIDTH_STEP
    total = rest + each * width
    if abs(total / target - 1) > _TOLERANCE:
        raise EvaluationError(
            f"{name} has {total:,} parameters with a feed-forward network of {width}, Transformer++ {target:,}; "
            f"raise model.ffn_dim of --config, which is {shared.ffn_dim}"
        )
    return System(name, {**model, "ffn_dim": width}, total)


def _count(config: TitansConfig) -> tuple[int, int]:
    """Parameters of the feed-forward networks, and of all else beside the embedding."""
    counted = count_by_part(parameters_of(config))
    return counted["feed_forward"], counted["total"] - counted["feed_forward"] - counted["embedding"]
