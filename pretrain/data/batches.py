"""From shards to batches: which samples a step learns from, and who reads which.

The samples of a run are numbered 0, 1, 2, ... Sample i is a function of the data, the seed, the sequence length and i
alone: every epoch is Megatron's GPTDataset over one pass of the documents, shuffled by (seed, epoch), so that neither
the length of the run nor the number of ranks moves a sample. A step learns from consecutive samples, and how many is a
function of the step (pretrain.schedule); its micro-batches go round the data ranks, and all tensor-parallel ranks of
one data rank read the same. Several folders are one such row of samples, too: folders.py.

Where rows go on from step to step (data.carry_state), an epoch is cut into as many strands as a step has samples, each
a run of the text as the shuffled documents follow one upon the other, and sample i is the next one of strand i mod S.
"""

import hashlib
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from torch import Tensor

from pretrain.config.run_config import RunConfig
from pretrain.schedule import Portion, portion_of

if TYPE_CHECKING:
    from pretrain.data.folders import NumberedSamples

STALL_SECONDS = 30.0
"""A batch that takes longer is spoken about."""


class MicroBatch(NamedTuple):
    """Rows that one rank computes at a time.

    Attributes:
        tokens: (B, T) int64.
        labels: The token after each position, (B, T) int64.
        starts: Tokens that begin a document inside a row, (B, T) bool; None where there is none, or it does not count.
            A row that goes on may have one at its first token, too.
        begins: Whether rows begin anew; else they go on where the same rows of the step before ended.
    """

    tokens: Tensor
    labels: Tensor
    starts: Tensor | None
    begins: bool = True

    def part(self, rank: int, ranks: int) -> "MicroBatch":
        """The tokens of one of so many ranks that share the rows, in order."""
        tokens, labels, starts = (None if x is None else x.chunk(ranks, 1)[rank] for x in self[:3])
        assert tokens is not None
        assert labels is not None
        return MicroBatch(tokens, labels, starts if starts is not None and bool(starts.any()) else None, self.begins)

    def arguments(self, device: torch.device) -> dict[str, Tensor | None]:
        """What the model takes of it, there."""
        return {name: None if x is None else x.to(device) for name, x in zip(self._fields[:3], self[:3], strict=True)}

    def first_rows(self, count: int) -> "MicroBatch":
        """The first rows alone."""
        tokens, labels, starts = (None if x is None else x[:count] for x in self[:3])
        assert tokens is not None
        assert labels is not None
        return MicroBatch(tokens, labels, starts, self.begins)

    def cut(self, length: int) -> "MicroBatch":
        """The same tokens and labels in rows of `length`, (B * T / length, length)."""
        if length == self.tokens.shape[1]:
            return self
        starts = None if self.starts is None else _inside(self.starts.reshape(-1, length))
        return MicroBatch(self.tokens.reshape(-1, length), self.labels.reshape(-1, length), starts)


class DocumentPart(NamedTuple):
    """A part of a document in a sample.

    Attributes:
        prefix: The shard.
        document: Place of the document in it, from 0.
        start: First token, counted from the document's start token.
        stop: Token behind the last.
    """

    prefix: Path
    document: int
    start: int
    stop: int


class Samples:
    """The numbered samples of a split's shards, epoch after epoch.

    Indices are built once, on rank 0, and memory-mapped by all; an index folder appears whole or not at all.
    """

    def __init__(
        self,
        prefixes: Sequence[str | Path],
        index_dir: Path,
        *,
        vocab_size: int,
        sequence_length: int,
        seed: int,
        documents_apart: bool = False,
        strands: int = 0,
    ) -> None:
        """Opens epoch 0.

        Args:
            prefixes: Paths of the shards without `.bin` and `.idx`; an epoch goes once through all of them.
            index_dir: Folder of the index cache.
            vocab_size: Pieces of the tokenizer.
            sequence_length: Tokens T of a sample.
            seed: Seed of the order.
            documents_apart: Say where documents begin. The index knows, whatever tokens stand at their ends.
            strands: Strands S of an epoch, which are read side by side and in order; what is left over when the samples
                are divided is not read. 0: samples are shuffled.

        Raises:
            ValueError: The shards cannot be read, or have too few tokens.
        """
        self.prefixes = [Path(prefix).resolve() for prefix in prefixes]
        self._index_dir = index_dir
        self._tokenizer = _TokenizerFacts(vocab_size)
        self._sequence_length = sequence_length
        self._seed = seed
        self._documents_apart = documents_apart
        self._epochs: dict[int, GPTDataset | BlendedDataset] = {}
        self._strands = strands
        self._epochs[0] = self._build(0)
        self.per_epoch = len(self._epochs[0])
        if strands:
            self.per_epoch -= self.per_epoch % strands
            if not self.per_epoch:
                raise ValueError(
                    f"{self._named()} has {len(self._epochs[0])} sequences of train.sequence_length {sequence_length}, "
                    f"and data.carry_state divides them into {strands} strands; lower train.global_batch or encode more"
                )

    def prepare(self, first: int, last: int) -> None:
        """Opens the epochs of the samples `first` to `last`, and closes those before.

        Collective: every rank calls it with the same numbers, in the main thread.
        """
        wanted = range(first // self.per_epoch, last // self.per_epoch + 1)
        self._epochs = {e: self._epochs[e] if e in self._epochs else self._build(e) for e in wanted}

    def micro_batch(self, indices: Iterable[int]) -> MicroBatch:
        """The samples of these numbers, which `prepare` has opened; strands are at the same place in each of them."""
        indices = list(indices)
        items = [dataset[inside] for _, dataset, inside in map(self._locate, indices)]
        tokens, labels = (torch.stack([item[name] for item in items]) for name in ("tokens", "labels"))
        begins = not self._strands or indices[0] % self.per_epoch < self._strands
        starts = self._starts(indices, begins) if self._documents_apart else None
        return MicroBatch(tokens, labels, starts, begins)

    def documents(self, index: int) -> list[DocumentPart]:
        """The parts of documents that a sample is made of, in order; `prepare` has opened it."""
        prefix, dataset, inside = self._locate(index)
        row = dataset.shuffle_index[inside]
        (first, skipped), (last, end) = dataset.sample_index[row], dataset.sample_index[row + 1]
        found = []
        for place in range(first, last + 1):
            document = int(dataset.document_index[place])
            stop = int(end) if place == last else int(dataset.dataset.sequence_lengths[document])
            found.append(DocumentPart(prefix, document, int(skipped) if place == first else 0, stop))
        return [part for part in found if part.start < part.stop]

    def _locate(self, index: int) -> tuple[Path, GPTDataset, int]:
        """The shard of a sample, as a path and as it is opened, and the sample's number there."""
        epoch, inside = divmod(index, self.per_epoch)
        dataset, shard = self._epochs[epoch], 0
        if self._strands:
            place, strand = divmod(inside, self._strands)
            inside = strand * (self.per_epoch // self._strands) + place
        if isinstance(dataset, BlendedDataset):
            if self._strands:
                shard, inside = _one_behind_the_other(dataset.datasets, inside)
            else:
                shard, inside = int(dataset.dataset_index[inside]), int(dataset.dataset_sample_index[inside])
            dataset = dataset.datasets[shard]
        return self.prefixes[shard], dataset, inside

    def _starts(self, indices: Sequence[int], begins: bool) -> Tensor | None:
        """Tokens of samples that begin a document, (B, T) bool; see MicroBatch."""
        starts_BT = torch.zeros(len(indices), self._sequence_length, dtype=torch.bool)
        for row_T, index in zip(starts_BT, indices, strict=True):
            _, dataset, inside = self._locate(index)
            sample = dataset.shuffle_index[inside]
            (first, skipped), (last, _) = dataset.sample_index[sample], dataset.sample_index[sample + 1]
            lengths = dataset.dataset.sequence_lengths[dataset.document_index[first:last]]
            places = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]) - int(skipped)
            row_T[places[(places >= 0) & (places < self._sequence_length)]] = True
        if begins:
            return _inside(starts_BT)
        return starts_BT if bool(starts_BT.any()) else None

    def _build(self, epoch: int) -> GPTDataset | BlendedDataset:
        # Folders of a blend have shards of the same names.
        digest = hashlib.sha256("\n".join(map(str, self.prefixes)).encode()).hexdigest()[:8]
        shards = f"{self.prefixes[0].name}-of-{len(self.prefixes)}-{digest}"
        name = f"{shards}-length-{self._sequence_length}-seed-{self._seed}-epoch-{epoch:05d}"
        final, partial = self._index_dir / name, self._index_dir / f".{name}.partial"
        there = [final.is_dir()]
        dist.broadcast_object_list(there, src=0)  # rank 0 says so for all
        if not there[0]:
            if dist.get_rank() == 0:
                # What an earlier process left unfinished may hold half an index.
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
            dist.barrier()
            self._one_epoch(epoch, partial)
            dist.barrier()
            if dist.get_rank() == 0:
                partial.rename(final)
            dist.barrier()
        # Read back even by the rank that built it: the files are mapped, what was built is whole in its memory.
        return self._one_epoch(epoch, final)

    def _one_epoch(self, epoch: int, cache: Path) -> GPTDataset | BlendedDataset:
        config = GPTDatasetConfig(
            random_seed=int(np.random.SeedSequence([self._seed, epoch]).generate_state(1)[0]),
            sequence_length=self._sequence_length,
            blend=([str(prefix) for prefix in self.prefixes], None),
            split="1,0,0",
            path_to_cache=str(cache),
            tokenizer=self._tokenizer,
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
        )
        try:
            dataset = BlendedMegatronDatasetBuilder(GPTDataset, [None, None, None], lambda: True, config).build()[0]
        except AssertionError as error:
            raise ValueError(f"cannot read the shards {self._named()}: {error}") from error
        if not len(dataset):
            raise ValueError(
                f"{self._named()} has fewer tokens than one sequence of train.sequence_length {self._sequence_length}; "
                "encode more text or shorten the sequence"
            )
        if self._strands:
            for one in dataset.datasets if isinstance(dataset, BlendedDataset) else [dataset]:
                one.shuffle_index = range(len(one))  # documents stay shuffled, samples follow one upon the other
        return dataset

    def _named(self) -> str:
        more = f" and {len(self.prefixes) - 1} more" if len(self.prefixes) > 1 else ""
        return f"{self.prefixes[0]}{more}"


class Batches:
    """This rank's micro-batches, one step ahead in a thread."""

    def __init__(
        self,
        samples: "NumberedSamples",
        config: RunConfig,
        data_rank: int,
        data_parallel: int,
        stalled: Callable[[int, float], None] = lambda step, seconds: None,
    ) -> None:
        """Nothing is read before the first `fetch`.

        Args:
            samples: Numbered samples.
            config: Says what a step learns from.
            data_rank: This rank's place among the data ranks.
            data_parallel: Data ranks.
            stalled: Called with a step, counted from 1, and seconds when its batch lets itself be waited for.
        """
        self._samples, self._stalled = samples, stalled
        self._train = config.train
        self._data_rank, self._data_parallel = data_rank, data_parallel
        self._thread = ThreadPoolExecutor(1, "batches")
        self._ahead: dict[int, Future[list[MicroBatch]]] = {}
        self.waited_seconds = 0.0
        """Time that the last `fetch` waited."""

    def fetch(self, step: int, ahead: int | None = None) -> list[MicroBatch]:
        """This rank's micro-batches of a step counted from 0; every rank fetches the same steps in the same order.

        Args:
            step: Which one.
            ahead: The step that will be fetched next, and is read meanwhile; by default the one behind it, and none
                where it is not a later one of the run.
        """
        started = time.perf_counter()
        future = self._ahead.pop(step, None)
        if future is None:
            # What is being read is not needed, and would miss the epochs that are opened for this step.
            wait(self._ahead.values())
            self._ahead.clear()
            future = self._submit(step)
        patience, waited = STALL_SECONDS, 0.0
        while not wait([future], timeout=patience).done:
            waited += patience
            self._stalled(step + 1, waited)
            patience = waited  # 30 s, 60 s, 120 s, ... since the start
        micro_batches = future.result()
        self.waited_seconds = time.perf_counter() - started
        ahead = step + 1 if ahead is None else ahead
        if step < ahead < self._train.steps:
            self._ahead[ahead] = self._submit(ahead)
        return micro_batches

    def close(self) -> None:
        """Ends the thread."""
        self._thread.shutdown(cancel_futures=True)

    def _submit(self, step: int) -> "Future[list[MicroBatch]]":
        portion = portion_of(step + 1, self._train)
        # Here and not in the thread: building an index is collective.
        self._samples.prepare(portion.first, portion.first + portion.samples - 1)
        return self._thread.submit(self._read, portion)

    def _read(self, portion: Portion) -> list[MicroBatch]:
        size, stride = self._train.micro_batch, self._train.micro_batch * self._data_parallel
        starts = range(portion.first + self._data_rank * size, portion.first + portion.samples, stride)
        batches = (self._samples.micro_batch(range(start, start + size)) for start in starts)
        return [batch.cut(portion.row_length) for batch in batches]


class _TokenizerFacts:
    """What GPTDataset asks a tokenizer for; shards hold tokens already, with their start and end tokens."""

    eod = -2
    pad = -1

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.unique_identifiers = {"vocab_size": vocab_size}


def _one_behind_the_other(datasets: Sequence[GPTDataset], inside: int) -> tuple[int, int]:
    """The dataset in which a sample of all of them lies, and its number there."""
    for place, dataset in enumerate(datasets):
        if inside < len(dataset):
            return place, inside
        inside -= len(dataset)
    raise AssertionError("an epoch has no more samples than its shards")


def _inside(starts: Tensor) -> Tensor | None:
    """Starts of documents without those of rows, which begin anew by themselves."""
    starts = starts.clone()
    starts[:, 0] = False
    return starts if bool(starts.any()) else None
