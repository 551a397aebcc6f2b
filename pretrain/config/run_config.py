"""The settings of a training run: a tree of frozen values.

`RunConfig` is complete when it exists: every value is legal, and the vocabulary is the data's. files.py reads and
writes it.
"""

from dataclasses import dataclass, field

from pretrain.config.settings import (
    CheckpointConfig,
    DataConfig,
    EvaluateConfig,
    HealthConfig,
    LoggingConfig,
    OptimizerConfig,
    ParallelConfig,
    ScheduleConfig,
    TrainConfig,
)
from titans_mcore.config import TitansConfig


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides what a run computes.

    Raises:
        ValueError: At construction, when a value is illegal or two do not fit; the message says what to change.
    """

    model: TitansConfig = field(default_factory=TitansConfig)
    """The model. `model.vocab_size` left out is filled in from the data's manifest."""
    data: DataConfig = field(default_factory=DataConfig)
    """What is read."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """How long, and in what portions."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """AdamW or Muon."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """Learning rate over the run."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Layout over processes."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """When the run is saved."""
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    """What is evaluated between steps."""
    health: HealthConfig = field(default_factory=HealthConfig)
    """What is done about bad steps."""
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    """What is reported."""

    def __post_init__(self) -> None:
        self._check_shared_rows()
        self._check_whole_matrices()
        if self.data.carry_state:
            self._check_carried_state()
        self._check_constant_memory()

    def _check_whole_matrices(self) -> None:
        """What is orthogonalised may be no part of a matrix, nor a piece of many laid end to end."""
        if self.optimizer.name == "muon" and (self.parallel.tensor > 1 or self.parallel.zero_stage):
            raise ValueError(
                f"optimizer.name muon orthogonalises whole matrices, which parallel.tensor {self.parallel.tensor} and "
                f"parallel.zero_stage {self.parallel.zero_stage} divide over ranks; use parallel.tensor 1 and "
                "parallel.zero_stage 0 (in fp32), or adamw"
            )

    def _check_carried_state(self) -> None:
        """A row must be the same place of every step, as long as ever, and leave a state of constant size."""
        for warmup in ("batch_warmup_from", "sequence_warmup_from"):
            if value := getattr(self.train, warmup):
                raise ValueError(
                    f"data.carry_state needs the same rows in every step, and train.{warmup} {value} changes them; "
                    "leave one of them out"
                )
        if len(self.data.folders) > 1:
            raise ValueError(
                f"data.carry_state reads one folder in order, and data.blend has {len(self.data.folders)}; "
                "give one with data.path"
            )
        if self.parallel.context > 1:
            raise ValueError(
                f"data.carry_state does not go with parallel.context {self.parallel.context} yet; set one of them back"
            )
        if self._keeps_every_key:
            raise ValueError(
                "data.carry_state hands on the keys that later tokens see, and model.window 0 keeps all of them; "
                "set model.window"
            )

    def _check_constant_memory(self) -> None:
        """What is streamed must leave a state of constant size."""
        if self._keeps_every_key and (length := self.evaluate.probe_length):
            raise ValueError(
                f"evaluate.probe_length {length} is read in constant memory, and model.window 0 keeps the keys of all "
                "tokens; set model.window, or leave it out"
            )

    def _check_shared_rows(self) -> None:
        """A row must fall into equal parts for the ranks that share its tokens."""
        model, length, context = self.model, self.train.shortest_row, self.parallel.context
        if context > 1:
            for unit, name in (mixer.unit(model) for mixer in model.mixers):
                if length % (context * unit):
                    parts = f" of whole {name} {unit}" if name else ""
                    raise ValueError(
                        f"train.{self._row_setting} {length} cannot be divided into {context} equal parts{parts} for "
                        f"parallel.context {context}; make it a multiple of {context * unit}"
                    )
            if self._keeps_every_key:
                raise ValueError(
                    f"parallel.context {context} hands on the keys that later tokens see, and model.window 0 keeps all "
                    "of them; set model.window"
                )
        if self.parallel.sequence and (length // context) % self.parallel.tensor:
            raise ValueError(
                f"parallel.sequence divides {length // context} tokens over parallel.tensor {self.parallel.tensor} "
                f"ranks; make train.{self._row_setting} a multiple of {context * self.parallel.tensor}"
            )

    @property
    def _keeps_every_key(self) -> bool:
        return any(mixer.reach(self.model) is None for mixer in self.model.mixers)

    @property
    def _row_setting(self) -> str:
        return "sequence_warmup_from" if self.train.sequence_warmup_from else "sequence_length"

    def accumulation(self, data_parallel: int) -> int:
        """Micro-batches of each rank in one step, after the warm-up.

        Raises:
            ValueError: A batch cannot be shared out evenly over `data_parallel` ranks.
        """
        portion = self.train.micro_batch * data_parallel
        if self.train.batch_warmup_from % portion:
            raise ValueError(
                f"train.batch_warmup_from {self.train.batch_warmup_from} cannot be shared out over {data_parallel} "
                f"data ranks in micro-batches of {self.train.micro_batch}; make it a multiple of {portion}"
            )
        if self.train.global_batch % portion:
            raise ValueError(
                f"train.global_batch {self.train.global_batch} cannot be shared out over {data_parallel} data ranks in "
                f"micro-batches of {self.train.micro_batch}; make it a multiple of {portion}, or change the micro-batch"
            )
        return self.train.global_batch // portion
