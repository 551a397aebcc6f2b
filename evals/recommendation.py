"""An example: what a user takes next, by the memory: `python -m evals.recommendation --data LOG.tsv --output DIR`.

Leave-one-out as in generative-recommenders: of a user's items in the order of time the last one is tested, and the one
before it chooses among states of the training. All items are ranked but those the user had before, the target excepted.
"""

import csv
import gzip
import math
import random
import statistics
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from evals.command_line import EvaluationError, check_at_least, parse_settings, run_command

PLACES = (10, 50, 200)
# Powers of two of a second between items; newest items that are read; the model's width; users of an update.
_GAPS, _LENGTH, _WIDTH, _BATCH = 32, 50, 64, 64


@dataclass(frozen=True)
class RecommendationSettings:
    """Trains next-item recommenders under one budget: hit rate and NDCG at 10, 50 and 200, of the whole catalogue."""

    data: Path
    """Tab-separated log (.gz too) with columns user_id, item_id, timestamp (recbole's user_id:token too)."""
    output: Path
    """Folder for recommendation.json."""
    systems: tuple[str, ...] = ("popularity", "transformer", "lmm", "mag")
    """Variants of ours (transformer is a SASRec), and popularity: the most frequent items for everyone."""
    seeds: tuple[int, ...] = (0,)
    """Each decides initial weights and the order of the data."""
    shuffled: bool = False
    """The control: every history in random order, for training and test; what is lost then was order."""
    steps: int = 500
    """Updates."""

    def __post_init__(self) -> None:
        check_at_least(1, self, "steps")


def read_log(path: Path) -> tuple[list[list[tuple[int, int]]], int]:
    """Every user's (item, gap) in the order of time, of users with three or more, and how many items there are."""
    opened, users, items = gzip.open if path.suffix == ".gz" else open, dict[str, list[Any]](), dict[str, int]()
    try:
        with opened(path, "rt", encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file, delimiter="\t")
            reader.fieldnames = [name.partition(":")[0] for name in reader.fieldnames or ()]
            for row in reader:
                item = items.setdefault(row["item_id"], len(items) + 1)  # 0 is padding
                users.setdefault(row["user_id"], []).append((float(row["timestamp"]), item))
    except (KeyError, ValueError, TypeError, OSError, EOFError, csv.Error) as fault:
        raise EvaluationError(f"--data {path}: no log of user_id, item_id and timestamp in columns ({fault})") from None
    histories = []
    for events in users.values():
        events.sort(key=lambda event: event[0])
        times = [events[0][0], *(time for time, _ in events)]
        gaps = [min(_GAPS - 1, int(math.log2(1 + now - then))) for then, now in pairwise(times)]
        histories.append([(item, gap) for (_, item), gap in zip(events, gaps, strict=True)])
    if not (kept := [history for history in histories if len(history) >= 3]):
        raise EvaluationError(f"--data {path}: the log has no user with three items; give a longer one")
    return kept, len(items)


def compare(settings: RecommendationSettings) -> str:
    """Trains and tests, writes the report, and returns its table."""
    import torch
    from torch import Tensor, nn

    from evals.report import markdown_table, write_json
    from evals.trainer import seed_all, train
    from titans_mcore.hf.configuration_titans import TitansHFConfig
    from titans_mcore.hf.modeling_titans import TitansBackbone

    class Recommender(nn.Module):
        """Item and time-gap embeddings, the blocks, and the items' embedding again as output matrix."""

        def __init__(self, variant: str, items: int) -> None:
            super().__init__()
            sizes = {"dim": _WIDTH, "num_heads": 2, "ffn_dim": 2 * _WIDTH, "num_layers": 2, "memory_expansion": 2}
            self.backbone = TitansBackbone(TitansHFConfig(variant=variant, persistent_tokens=4, window=0, **sizes))
            self.items, self.gaps = nn.Embedding(items + 1, _WIDTH), nn.Embedding(_GAPS, _WIDTH)
            nn.init.normal_(self.items.weight, std=_WIDTH**-0.5)

        def forward(self, read: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
            """read (B, T, 2), items and gaps padded behind; labels (B, T), -100 where none."""
            vectors = self.items(read[..., 0]) + self.gaps(read[..., 1])
            hidden = self.backbone(vectors, attention_mask=(read[..., 0] > 0).long()).last_hidden_state
            if labels is None:
                return {"scores": hidden[torch.arange(len(read)), (read[..., 0] > 0).sum(1) - 1] @ self.items.weight.T}
            return {"loss": nn.functional.cross_entropy((hidden @ self.items.weight.T).flatten(0, 1), labels.flatten())}

    def sample(history: list[tuple[int, int]], last_only: bool) -> dict[str, Tensor]:
        read, labels = torch.zeros(length, 2, dtype=torch.long), torch.full((length,), -100)
        count = min(length, len(history) - 1)
        read[:count] = torch.tensor(history[-length - 1 : -1])
        labels[:count] = torch.tensor([item for item, _ in history[-count:]])
        labels[: count - 1 if last_only else 0] = -100
        return {"read": read, "labels": labels}

    def ranks(score: Any) -> list[int]:
        found = []
        for begin in range(0, len(histories), 256):
            part = histories[begin : begin + 256]
            for (*past, (target, _)), scores in zip(part, score(part), strict=True):
                scores[[0, *({item for item, _ in past} - {target})]] = -math.inf
                found.append(1 + int((scores > scores[target]).sum()))
        return found

    histories, items = read_log(settings.data)
    length = min(_LENGTH, max(map(len, histories)) - 1)
    if settings.shuffled:
        draw = random.Random(0)
        histories = [[*draw.sample(past, len(past)), last] for *past, last in histories]
    learned = [sample(history[:-2], False) for history in histories if len(history) > 3]
    chosen = [sample(history[:-1], True) for history in histories[:512]]
    counts = Counter(item for history in histories for item, _ in history[:-2])
    popular = torch.tensor([float(counts[item]) for item in range(items + 1)])
    report: dict[str, dict[str, list[float]]] = {}
    for system in settings.systems:
        for seed in (0,) if system == "popularity" else settings.seeds:
            seed_all(seed)
            if system == "popularity":
                found = ranks(lambda part: popular.repeat(len(part), 1))
            else:
                try:
                    model = Recommender(system, items)
                except ValueError as fault:
                    raise EvaluationError(f"--systems {system}: {fault}") from None
                train(model, learned, chosen, "labels", settings.steps, _BATCH, 3e-3, seed)
                with torch.inference_mode():
                    found = ranks(
                        lambda part, m=model: m(torch.stack([sample(h, True)["read"] for h in part]))["scores"]
                    )
            row = report.setdefault(system + (", order shuffled" if settings.shuffled else ""), {})
            for place in PLACES:
                gains = [1 / math.log2(1 + rank) for rank in found if rank <= place]
                row.setdefault(f"HR@{place}", []).append(len(gains) / len(found))
                row.setdefault(f"NDCG@{place}", []).append(sum(gains) / len(found))
    rows = [[name, *(f"{statistics.fmean(cell):.4f}" for cell in row.values())] for name, row in report.items()]
    write_json(settings.output / "recommendation.json", report)
    return markdown_table([f"{len(histories):,} users, {items:,} items", *row], rows)


if __name__ == "__main__":
    run_command(lambda: print(compare(parse_settings(RecommendationSettings, "python -m evals.recommendation"))))
