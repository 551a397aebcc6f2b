"""What a long command says of how far it is."""

from types import SimpleNamespace

from tokenization.progress import Progress


def test_without_a_terminal_a_line_a_minute_says_share_pace_and_what_is_left(monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr("tokenization.progress.time", SimpleNamespace(monotonic=lambda: now[0]))
    with Progress("read", 1_000, 200) as progress, Progress("hidden", 1_000, shown=False) as hidden:
        assert progress.left == "time left unknown"
        for seconds, said in ((30, ""), (60, "40% read, 100 tokens, 2 tokens/s, about 3 min left\n"), (90, "")):
            now[0] = 100.0 + seconds
            progress.advance(100, 50)
            hidden.advance(100, 50)
            assert capsys.readouterr().err == said
        assert progress.left == "about 2 min left"  # 500 of 1,000 are, 300 of them in these 90 seconds: 150 more
