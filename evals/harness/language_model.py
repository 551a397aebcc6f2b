"""A native model as lm-eval sees one: texts to log-likelihoods, streamed in pieces."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from evals.command_line import EvaluationError
from evals.models import EvalModel

Request = tuple[Any, list[int], list[int]]
"""Something that names the request, tokens of its context, tokens whose likelihood is asked for."""


class NativeLM(TemplateLM):
    """Every text begins with one start token, as in training.

    Args:
        model: The model.
        max_length: Most tokens read for a request; longer contexts lose their beginning.
        batch: Requests read side by side.
        piece: Tokens of each read at a time; logits of one piece exist at a time.
    """

    def __init__(self, model: EvalModel, max_length: int, batch: int, piece: int) -> None:
        super().__init__()
        self._model, self._processor = model, model.tokenizer.processor
        self._max_length, self._batch, self._piece = max_length, batch, piece

    @property
    def eot_token_id(self) -> int:
        """End of a document."""
        return self._processor.eos_id()

    @property
    def prefix_token_id(self) -> int:
        """In front of every text."""
        return self._processor.bos_id()

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids of a text, with the start token unless `add_special_tokens` is False."""
        start = [] if add_special_tokens is False else [self.prefix_token_id]
        return start + self._processor.encode(string)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Tokens of a context, and those behind it: where both share a token, in which lm-eval finds none of the
        answer, that one is it."""
        before, behind = super()._encode_pair(context, continuation)
        if behind or not continuation:
            return before, behind
        whole = self.tok_encode(context + continuation)
        return whole[:-1], whole[-1:]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in windows of max_length tokens."""
        windows: list[Request] = []
        for index, request in enumerate(requests):
            pairs = utils.get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0], add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self._max_length,
                context_len=1,
            )
            windows += [(index, *utils.make_disjoint_window(pair)) for pair in pairs]
        totals = [0.0] * len(requests)
        for (index, _, _), (value, _) in zip(windows, self._loglikelihood_tokens(windows), strict=True):
            totals[index] += value
        return totals

    def _loglikelihood_tokens(self, requests: Sequence[Request], **kwargs: Any) -> list[tuple[float, bool]]:
        """For each request the log-likelihood of its last tokens, and whether each of them was the most likely one."""
        for _, context, answer in requests:
            if not context or not 0 < len(answer) <= self._max_length:
                raise EvaluationError(
                    f"a request asks for the likelihood of {len(answer)} tokens behind {len(context)}; it must be 1 to "
                    f"{self._max_length} (--max-length) behind at least one"
                )
        order = sorted(range(len(requests)), key=lambda index: -len(requests[index][1] + requests[index][2]))
        results = [(0.0, True)] * len(requests)
        bar = tqdm(total=len(requests), desc="requests", disable=kwargs.get("disable_tqdm", False))
        for first in range(0, len(order), self._batch):
            chosen = order[first : first + self._batch]
            rows = [
                torch.tensor((requests[index][1] + requests[index][2])[-self._max_length - 1 :]) for index in chosen
            ]
            values, greedy = self._score(rows)
            for index, row, value_T, greedy_T in zip(chosen, rows, values, greedy, strict=True):
                asked = slice(max(len(row) - 1 - len(requests[index][2]), 0), len(row) - 1)
                results[index] = (value_T[asked].sum().item(), bool(greedy_T[asked].all()))
            bar.update(len(chosen))
        bar.close()
        return results

    @torch.inference_mode()
    def _score(self, rows: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Log-likelihood (B, T) of every token but a row's first, and whether it was the most likely; float64 and bool.

        Rows are padded behind their end, where nothing of a causal model looks.
        """
        tokens = pad_sequence(rows, batch_first=True)
        parts = list(self._pieces(tokens))
        values, greedy = (torch.cat(part, 1) for part in zip(*parts, strict=True))
        if not bool(torch.isfinite(values).all()):
            raise EvaluationError(
                f"the model of {self._model.checkpoint} gives a likelihood that is not finite; take another checkpoint"
            )
        return values, greedy

    def _pieces(self, tokens: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        states: Any = None
        for start in range(0, tokens.shape[1] - 1, self._piece):
            stop = min(start + self._piece, tokens.shape[1] - 1)
            logits, states = self._model.stream(tokens[:, start:stop], states)
            targets = tokens[:, start + 1 : stop + 1].to(logits.device)
            likely = logits.float().log_softmax(-1)
            value = likely.gather(-1, targets[..., None])[..., 0]
            yield value.double().cpu(), (likely.argmax(-1) == targets).cpu()

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """None of the paper's tasks asks for it."""
        raise EvaluationError("a generating task; tasks that ask for likelihoods can be run")
