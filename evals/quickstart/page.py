"""What the quickstart found: one page, RUN/report.html, the same numbers in RUN/summary.json, and a table."""

import base64
import html
import io
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evals.niah.samples import MAIN
from evals.niah.templates import TASK
from evals.report import bytes_text, draw_heat_map, draw_losses, read_json, table, write_bytes, write_json

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Results:
    """What the stages wrote about one model; a file that is missing is an error, never an empty cell."""

    name: str
    """What the model is called."""
    run: Path
    """Its run folder."""

    @cached_property
    def niah(self) -> dict[str, Any]:
        """Of S-NIAH."""
        return read_json(self.run / "eval" / "niah.json")

    @cached_property
    def positions(self) -> dict[str, Any]:
        """Loss by position on held-out text."""
        return read_json(self.run / "eval" / "position_perplexity.json")

    @cached_property
    def without(self) -> dict[str, Any] | None:
        """The same with the memory never written; None for a model without one."""
        folder = self.run / "eval" / "memory_off"
        return read_json(folder / "position_perplexity.json") if folder.is_dir() else None

    @cached_property
    def records(self) -> list[dict[str, Any]]:
        """Of its training."""
        from pretrain.report.records import read_records

        return read_records(self.run)

    def rows(self, control: str = MAIN) -> dict[int, dict[str, Any]]:
        """Rows of S-NIAH by length."""
        return {row["length"]: row for row in self.niah["by_length"] if row["control"] == control}

    def found(self, length: int, control: str = MAIN) -> str:
        """Needles found, in words."""
        row = self.rows(control).get(length)
        return "" if row is None else f"{round(row['accuracy'] * row['n'])} of {row['n']}"


@dataclass(frozen=True)
class Page:
    """All that is shown."""

    run: Path
    """The quickstart's folder."""
    models: list[Results]
    """Titans first, then what stands beside it."""
    unigrams: float
    """Nats a token that counting words reaches on the text."""
    unigrams_blend: float
    """The same on what was trained on."""
    samples: list[tuple[str, str]]
    """Headings, and what the models said."""

    def write(self) -> None:
        """Writes RUN/report.html and RUN/summary.json."""
        write_json(self.run / "summary.json", self.summary())
        image = io.BytesIO()
        self.figure().savefig(image, format="png", dpi=110)
        said = "".join(f"<h2>{html.escape(head)}</h2><pre>{html.escape(text)}</pre>" for head, text in self.samples)
        title = html.escape(f"{self.models[0].name}, trained on this machine")
        picture = base64.b64encode(image.getvalue()).decode()
        style = "body{font:15px sans-serif;max-width:70em;margin:2em auto;padding:0 1em}img{width:100%}" + (
            "pre{background:#f4f4f4;padding:1em;white-space:pre-wrap}"
        )
        page = (
            f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{style}</style>'
            f'<h1>{title}</h1><pre>{html.escape(self.table())}</pre><img alt="" src="data:image/png;base64,{picture}">'
            f"{said}</html>\n"
        )
        write_bytes(self.run / "report.html", page.encode())

    def summary(self) -> dict[str, Any]:
        """The numbers."""
        titans = self.models[0]
        steps = [record for record in titans.records if record["kind"] == "step"]
        return {
            "variant": titans.niah["model"]["variant"],
            "steps": steps[-1]["step"],
            "tokens": steps[-1]["tokens"],
            "unigram_entropy": self.unigrams,
            "first_loss": steps[0]["loss"],
            "last_loss": steps[-1]["loss"],
            "heldout_loss": {model.name: model.positions["loss"] for model in self.models},
            "heldout_loss_memory_off": titans.without and titans.without["loss"],
            "niah": {model.name: model.niah["accuracy_by_length"][TASK] for model in self.models},
            "niah_memory_reset": {str(n): row["accuracy"] for n, row in titans.rows("memory_reset").items()},
            "niah_chance": "a 7-digit number; guessing is 0",
            "export_max_abs_error": read_json(self.run / "hf" / "proof.json")["max_abs_error"],
            "seconds": seconds_of(self.run),
        }

    def table(self) -> str:
        """The numbers side by side."""
        titans, *beside = self.models
        lengths = sorted(titans.rows())
        heads, losses = [titans.name], [titans.positions["loss"]]
        if titans.without:
            heads.append("without its memory")
            losses.append(titans.without["loss"])
        heads += [model.name for model in beside]
        losses += [model.positions["loss"] for model in beside]
        rows = [[f"held-out text, nats a token (counting words {self.unigrams:.2f})", *(f"{x:.3f}" for x in losses)]]
        for length in lengths:
            found = [titans.found(length), *([titans.found(length, "memory_reset")] if titans.without else [])]
            rows.append([f"needles found in {length:,} tokens", *found, *(model.found(length) for model in beside)])
        for length in (lengths[0], lengths[-1]):
            for words, name, form in (
                ("tokens read a second", "prefill_tokens_per_second", "{:,.0f}".format),
                ("kept of the text", "state_bytes_per_sample", bytes_text),
            ):
                cells = [form(model.rows()[length][name]) for model in self.models]
                rows.append([f"{words}, {length:,} tokens", cells[0], *([""] if titans.without else []), *cells[1:]])
        return table(["", *heads], [[row[0], *row[1:]] for row in rows])

    def figure(self) -> "Figure":
        """Heat maps, losses and costs."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(13, 11), layout="constrained")
        rows = figure.subplots(3, 2)
        for axes in rows[0]:
            axes.set_visible(False)
        for axes, model in zip(rows[0], self.models, strict=False):
            axes.set_visible(True)
            _draw_needles(axes, model)
        self._draw_training(rows[1][0])
        lines = {model.name: model.positions["buckets"] for model in self.models}
        if without := self.models[0].without:
            lines[f"{self.models[0].name}, memory never written"] = without["buckets"]
        draw_losses(rows[1][1], "Held-out text, by the tokens read", lines, self.models[0].positions["trained_length"])
        for axes, name, title in (
            (rows[2][0], "prefill_tokens_per_second", "tokens read a second"),
            (rows[2][1], "peak_bytes", "peak memory, bytes"),
        ):
            for model in self.models:
                axes.plot(
                    *zip(*((n, row[name]) for n, row in model.rows().items()), strict=True), "o-", label=model.name
                )
            axes.set_xscale("log", base=2)
            axes.set_ylim(bottom=0)
            axes.set(xlabel="length (tokens)", title=title)
            axes.grid(alpha=0.3)
            axes.legend(fontsize=8)
        return figure

    def _draw_training(self, axes: "Axes") -> None:
        from pretrain.report.history import History, thinned

        for model in self.models:
            loss = thinned(History(model.records).series("loss"), 100)
            axes.plot(loss.steps, loss.values, label=model.name)
        axes.axhline(self.unigrams_blend, color="black", linestyle="--", label="counting words")
        axes.set(xlabel="step", ylabel="loss (nats/token)", title="Training, text and documents of recall")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)


def _draw_needles(axes: "Axes", model: Results) -> None:
    cells = [cell for cell in model.niah["cells"] if cell["control"] == MAIN]
    lengths, depths = (sorted({cell[axis] for cell in cells}) for axis in ("length", "depth"))
    accuracy = {(cell["length"], cell["depth"]): (cell["accuracy"], cell["n"]) for cell in cells}
    draw_heat_map(axes, f"Needles found, {model.name}", lengths, depths, accuracy, model.niah["trained_length"])


def seconds_of(run: Path) -> Mapping[str, int]:
    """Seconds by stage: one that ran in parts, or again, counts in sum."""
    from evals.quickstart.stages import SECONDS_FILE

    seconds: dict[str, int] = {}
    for line in (run / SECONDS_FILE).read_text(encoding="utf-8").splitlines():
        name, value = line.split()
        seconds[name] = seconds.get(name, 0) + int(value)
    return seconds
