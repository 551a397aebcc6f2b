"""The example of recommendation: ranks, controls, and what is refused."""

import json
import random
from pathlib import Path

import pytest

from evals.command_line import EvaluationError, parse_settings
from evals.recommendation import RecommendationSettings, compare, read_log
from tests.commands import status_of


def log(path: Path, events: list[tuple[int, int, int]], header: str = "user_id\titem_id\ttimestamp") -> Path:
    path.write_text("\n".join([header, *("\t".join(map(str, event)) for event in events)]) + "\n")
    return path


def test_a_log_is_read_in_the_order_of_time_with_gaps_and_users_of_three_items(tmp_path: Path) -> None:
    events = [(1, 70, 30), (1, 80, 10), (1, 90, 13), (2, 70, 5), (2, 80, 6)]
    for header in ("user_id\titem_id\ttimestamp", "user_id:token\titem_id:token\ttimestamp:float"):
        histories, items = read_log(log(tmp_path / "log.tsv", events, header))
        assert (histories, items) == ([[(2, 0), (3, 2), (1, 4)]], 3)  # items by first appearance; 3 s, 17 s


def test_popularity_ranks_the_whole_catalogue_but_what_the_user_had(tmp_path: Path) -> None:
    # Without the last two of each: item 10 three times, 20 twice, 30 once. User 1 had 10 and 30; its last item is 20.
    events = [(1, 10, 1), (1, 30, 2), (1, 20, 3), (2, 10, 1), (2, 20, 2), (2, 30, 3), (2, 10, 4)]
    events += [(3, 10, 1), (3, 20, 2), (3, 30, 3), (3, 40, 4), (3, 50, 5)]
    compare(RecommendationSettings(log(tmp_path / "log.tsv", events), tmp_path, ("popularity",)))
    found = json.loads((tmp_path / "recommendation.json").read_text())["popularity"]
    # Ranks: 20 is the first of what user 1 had not; 10, had before, keeps its place; 50 ties with 40, which was had.
    assert found["HR@10"] == [1.0]
    assert found["NDCG@10"] == pytest.approx([1.0])


@pytest.mark.slow
def test_a_model_learns_an_order_that_shuffling_takes_away(tmp_path: Path) -> None:
    draw, events = random.Random(0), []
    for user in range(80):  # each goes around a ring of 40 items, from anywhere: all are equally popular
        first = draw.randrange(40)
        events += [(user, (first + step) % 40, step * 100) for step in range(9)]
    data = log(tmp_path / "log.tsv", events)
    table = compare(RecommendationSettings(data, tmp_path / "a", ("popularity", "lmm"), steps=40))
    assert table.splitlines()[0].startswith("| 80 users, 40 items | HR@10 | NDCG@10 |")
    ordered = json.loads((tmp_path / "a" / "recommendation.json").read_text())
    compare(RecommendationSettings(data, tmp_path / "b", ("lmm",), shuffled=True, steps=40))
    shuffled = json.loads((tmp_path / "b" / "recommendation.json").read_text())
    assert ordered["lmm"]["NDCG@10"][0] > 2 * shuffled["lmm, order shuffled"]["NDCG@10"][0]
    assert ordered["lmm"]["NDCG@10"][0] > 2 * ordered["popularity"]["NDCG@10"][0]


def test_each_fault_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def says(data: Path, *words: object) -> str:
        words = ("--data", data, "--output", tmp_path, *words)
        assert status_of(lambda: print(compare(parse_settings(RecommendationSettings, "recommendation"))), *words) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1
        return lines[0]

    good = log(tmp_path / "good.tsv", [(1, item, item) for item in range(5)])
    assert "nowhere.tsv: no log of user_id, item_id and timestamp" in says(tmp_path / "nowhere.tsv")
    assert "no log of user_id, item_id and timestamp" in says(log(tmp_path / "a.tsv", [(1, 2, 3)], "who\twhat\twhen"))
    assert "the log has no user with three items" in says(log(tmp_path / "b.tsv", []))
    assert "--steps is 0" in says(good, "--steps", 0)
    assert "--systems lstm: variant is 'lstm'" in says(good, "--systems", "lstm")
    with pytest.raises(EvaluationError, match="no log of"):
        read_log(log(tmp_path / "c.tsv", [(1, 2, "yesterday")]))  # type: ignore[list-item]
