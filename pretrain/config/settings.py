"""The sections of a run's settings, each a frozen value that is legal when it exists."""

from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Literal

from titans_mcore.config import check_choices

SMALLEST_SHARE = 1e-4
"""A folder that gives fewer of the samples is not worth opening, and its share would be met badly."""
TEXTS = tuple[str, ...]
"""Type of a setting that is a list of texts: [...] in TOML, words one behind the other on the command line."""


def _check(section: str, settings: object, **limits: float) -> None:
    """Refuses words that a setting does not have, and numbers below their limits."""
    check_choices(settings, f"{section}.")
    for name, limit in limits.items():
        if not (value := getattr(settings, name)) >= limit:
            raise ValueError(f"{section}.{name} is {value}; it must be at least {limit}")


@dataclass(frozen=True)
class DataConfig:
    """What is read."""

    path: str = ""
    """Folder of shards that `python -m tokenization.encode` wrote: manifest.json, train.bin, heldout.bin, ..."""
    blend: TEXTS = ()
    """Several folders in place of `path`, each with its share of the tokens: "web=0.7" "code=0.3"; shares are divided
    by their sum. The held-out set is blended alike, and ends before a folder's held-out text would come again."""
    verify: bool = True
    """Read the shards when a run begins and compare their checksums with their manifests'; a run that goes on reads
    those again whose size or time has changed. Off: sizes alone are compared."""
    reset_documents: bool = True
    """Begin memory, convolution and attention anew at every document inside a row; off: a row is one sequence."""
    carry_state: bool = False
    """Truncated backpropagation through time: each row goes on with the text, and in the state, of the same row of the
    step before, and gradients end at its first token. An epoch is read as global_batch runs side by side; held-out rows
    begin anew as ever. Such a run goes on at the same tensor and data parallelism and micro_batch only."""

    def __post_init__(self) -> None:
        if self.path and self.blend:
            raise ValueError("data.path and data.blend both name folders of shards; give one of them")
        smallest = min(self.folders, key=self.folders.__getitem__, default="")
        if smallest and self.folders[smallest] < SMALLEST_SHARE:
            raise ValueError(
                f"data.blend takes {self.folders[smallest]:.1e} of the samples from {smallest}; "
                f"give it at least {SMALLEST_SHARE:g} or leave it out"
            )

    @property
    def folders(self) -> dict[str, float]:
        """The folders, each with its share of the samples, in sum 1."""
        weights: dict[str, Fraction] = {self.path: Fraction(1)} if self.path else {}
        for entry in self.blend:
            folder, weight = _folder_and_weight(entry)
            if folder in weights:
                raise ValueError(f"data.blend names {folder} twice; add its shares up")
            weights[folder] = weight
        return {folder: float(weight / sum(weights.values())) for folder, weight in weights.items()}

    def absolute(self) -> "DataConfig":
        """The same with paths that hold from any working directory."""
        blend = []
        for entry in self.blend:
            folder, _, weight = entry.rpartition("=")
            blend.append(f"{Path(folder).resolve()}={weight}")
        return replace(self, path=str(Path(self.path).resolve()) if self.path else "", blend=tuple(blend))


def _folder_and_weight(entry: str) -> tuple[str, Fraction]:
    folder, _, weight = entry.rpartition("=")
    try:
        value = Fraction(weight)  # exact, so that 7 and 3 are the same shares as 0.7 and 0.3
    except (ValueError, ZeroDivisionError):
        value = Fraction(0)
    if not folder or value <= 0:
        raise ValueError(f"data.blend has {entry!r}; write FOLDER=SHARE with a share above 0, as in web=0.7")
    return folder, value


@dataclass(frozen=True)
class TrainConfig:
    """How long, and in what portions."""

    steps: int = 1_000
    """Optimizer steps of the whole run."""
    sequence_length: int = 4_096
    """Tokens T of one sample."""
    global_batch: int = 128
    """Samples of one step over all ranks and micro-batches."""
    micro_batch: int = 4
    """Samples that one rank computes at a time; the rest of the global batch is accumulated."""
    batch_warmup_from: int = 0
    """Samples of the first step; the batch grows by as many at a time. 0: global_batch from the start."""
    batch_warmup_tokens: int = 0
    """Tokens after which a step has global_batch samples."""
    sequence_warmup_from: int = 0
    """Tokens of a row at first; rows double until they are whole samples. Before, a sample is cut into rows that begin
    anew, so that samples, their order and the tokens of a step stay the same. 0: whole samples from the start."""
    sequence_warmup_tokens: int = 0
    """Tokens after which rows are whole samples."""
    seed: int = 1234
    """Seed of the initial weights and of the order of the samples."""
    weights_from: str = ""
    """Run folder or checkpoint of the same model whose weights a new run begins with: a second stage on other data.
    Optimizer, schedule and order of the samples begin anew. Empty: random weights."""
    continue_from: str = ""
    """Checkpoint of another run, or a run folder, whose newest healthy one is taken: a new run goes on from it as that
    run would, with optimizer, update count and place in the data, and may have another schedule and other steps."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Type of the weights in forward and backward; bf16 keeps fp32 masters. auto: bf16 on GPUs, fp32 on the CPU."""
    stop_after_minutes: float = 0.0
    """Wall-clock time after which the run finishes its step, saves and ends, as after a signal; 0: never."""
    recompute: Literal["none", "block", "except_memory"] = "none"
    """Activations that the backward pass computes again instead of keeping them. block: all of a block, which keeps its
    input alone; except_memory: the same without the memory's scan, which is the slowest part; none: nothing."""
    loss_chunk: int = 0
    """Tokens of a micro-batch on a rank whose logits stand at once; the backward pass computes them again, a third more
    of the output matrix' work. 0: all stand, and none is computed again."""
    compile: bool = False
    """Have torch.compile make few operations of the many around the memory's scan and in attention: convolution, gates,
    norms, rotary positions. Results differ by rounding, and the first steps take longer."""

    def __post_init__(self) -> None:
        _check("train", self, steps=1, sequence_length=1, global_batch=1, micro_batch=1, seed=0)
        _check("train", self, stop_after_minutes=0, loss_chunk=0)
        if self.weights_from and self.continue_from:
            raise ValueError("train.weights_from and train.continue_from both name what a run begins with; give one")
        if self.global_batch % self.micro_batch:
            raise ValueError(
                f"train.global_batch {self.global_batch} is not a multiple of train.micro_batch {self.micro_batch}; "
                "change one of them"
            )
        self._check_warmups()

    def _check_warmups(self) -> None:
        for kind, full in (("batch", "global_batch"), ("sequence", "sequence_length")):
            start, tokens = (f"{kind}_warmup_{end}" for end in ("from", "tokens"))
            _check("train", self, **{start: 0, tokens: 0})
            if bool(getattr(self, start)) != bool(getattr(self, tokens)):
                raise ValueError(
                    f"train.{start} is {getattr(self, start)} and train.{tokens} {getattr(self, tokens)}; "
                    "a warm-up needs both, none neither"
                )
            if getattr(self, start) >= getattr(self, full):
                raise ValueError(
                    f"train.{start} {getattr(self, start)} is no less than train.{full} {getattr(self, full)}; "
                    "lower it, or leave the warm-up out"
                )
        if self.batch_warmup_from and (
            self.global_batch % self.batch_warmup_from or self.batch_warmup_from % self.micro_batch
        ):
            raise ValueError(
                f"train.batch_warmup_from {self.batch_warmup_from} must be a multiple of train.micro_batch "
                f"{self.micro_batch} and go into train.global_batch {self.global_batch} without rest; change it"
            )
        rows, rest = divmod(self.sequence_length, self.sequence_warmup_from or self.sequence_length)
        if rest or rows & (rows - 1):
            raise ValueError(
                f"train.sequence_warmup_from {self.sequence_warmup_from} does not become train.sequence_length "
                f"{self.sequence_length} by doubling; take a half, a quarter, ... of it"
            )

    @property
    def shortest_row(self) -> int:
        """Tokens of the shortest rows that the model is given; every row length is a multiple of it."""
        return self.sequence_warmup_from or self.sequence_length

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one optimizer step learns from, after the warm-up."""
        return self.global_batch * self.sequence_length


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, or Muon for the blocks' matrices beside it. Norms, gates and other vectors are not decayed."""

    name: Literal["adamw", "muon"] = "adamw"
    """muon: matrices of the blocks move along orthogonalised momentum, each head's for themselves, at the same lr and
    weight_decay; the rest is AdamW's. It needs whole matrices: parallel.tensor 1 and parallel.zero_stage 0."""
    momentum: float = 0.95
    """Decay of Muon's mean of the gradients."""
    lr: float = 4e-4
    """Peak learning rate."""
    beta1: float = 0.9
    """Decay of the mean of the gradients."""
    beta2: float = 0.95
    """Decay of the mean of their squares."""
    eps: float = 1e-8
    """Added to the root of that mean."""
    weight_decay: float = 0.1
    """Decoupled weight decay of the matrices."""
    clip_norm: float = 1.0
    """Largest global gradient norm; 0 switches clipping off."""

    def __post_init__(self) -> None:
        _check("optimizer", self, lr=0, momentum=0, beta1=0, beta2=0, eps=0, weight_decay=0, clip_norm=0)
        for name in ("momentum", "beta1", "beta2"):
            if getattr(self, name) >= 1:
                raise ValueError(f"optimizer.{name} is {getattr(self, name)}; it must be below 1")


@dataclass(frozen=True)
class ScheduleConfig:
    """Linear warm-up, then down to a fraction of the peak at the last step."""

    shape: Literal["cosine", "linear", "wsd"] = "cosine"
    """How it falls: half a cosine, a line, or wsd (warm-up, stable, decay), at the peak until decay_steps before the
    end, then in a line. At the peak the end is not known: train.continue_from begins a decay at any checkpoint."""
    warmup_steps: int = 0
    """Steps until the peak is reached."""
    decay_steps: int = 0
    """Last steps, in which wsd falls; 0: it stays at the peak."""
    min_lr_fraction: float = 0.1
    """Learning rate of the last step, as a fraction of the peak."""

    def __post_init__(self) -> None:
        _check("schedule", self, warmup_steps=0, decay_steps=0, min_lr_fraction=0)
        if self.decay_steps and self.shape != "wsd":
            raise ValueError(
                f"schedule.decay_steps is {self.decay_steps}, and a {self.shape} falls from the warm-up on; "
                "set schedule.shape wsd, or leave it out"
            )
        if self.min_lr_fraction > 1:
            raise ValueError(f"schedule.min_lr_fraction is {self.min_lr_fraction}; it must be at most 1")


@dataclass(frozen=True)
class ParallelConfig:
    """How the model is laid out: tensor x context ranks share a sample; processes left over are data parallel."""

    tensor: int = 1
    """Ranks that share one copy of the model (Megatron's tensor parallelism)."""
    sequence: bool = False
    """Sequence parallelism: the tensor-parallel ranks share the tokens between the blocks' parallel parts too."""
    memory_parallel: Literal["auto", "heads", "hidden"] = "auto"
    """What tensor-parallel ranks share of the memory. heads: each owns some heads whole; hidden: each owns a part of
    every head's matrices, which costs a sum over the ranks in every chunk; auto: heads where their number divides."""
    context: int = 1
    """Ranks that share the tokens of a row (context parallelism): each reads its part and hands the state of every
    layer on to the next, when it has read it or, where states compose (linear recurrences), before."""
    in_flight: int = 1
    """With context ranks: micro-batches whose forward passes run before the first one's backward pass. They fill the
    time in which ranks wait for their neighbours, and each keeps its activations meanwhile."""
    pipeline: int = 1
    """Always 1: pipeline parallelism is not supported."""
    zero_stage: int = 1
    """DeepSpeed ZeRO: data x context ranks share the optimizer (1), the gradients too (2), the parameters too (3);
    0: nothing."""
    offload_optimizer: bool = False
    """Keep the optimizer's masters and moments in the host's memory, and update them there (ZeRO 1 and above)."""
    timeout_seconds: float = 1_800.0
    """A collective that waits longer, at the start and in the first step, ends the run."""
    step_timeout_seconds: float = 600.0
    """The same after the first step; longer than the slowest evaluation."""

    def __post_init__(self) -> None:
        _check("parallel", self, tensor=1, context=1, in_flight=1, pipeline=1, zero_stage=0)
        _check("parallel", self, timeout_seconds=1, step_timeout_seconds=1)
        if self.pipeline > 1:
            raise ValueError(
                f"parallel.pipeline is {self.pipeline}, but pipeline parallelism is not supported; divide the model "
                "with parallel.tensor, rows with parallel.context, optimizer and weights with parallel.zero_stage"
            )
        if self.in_flight > 1 and self.context == 1:
            raise ValueError(
                f"parallel.in_flight {self.in_flight} fills the time that context ranks wait for each other, and "
                "parallel.context is 1; leave it out"
            )
        if self.zero_stage > 3:
            raise ValueError(f"parallel.zero_stage is {self.zero_stage}; it must be 0, 1, 2 or 3")
        if self.sequence and self.tensor == 1:
            raise ValueError("parallel.sequence shares tokens over tensor-parallel ranks; parallel.tensor is 1")
        if self.context > 1 and self.zero_stage == 3:
            raise ValueError(
                "parallel.zero_stage 3 gathers a block's weights on all context ranks at once, but a rank comes to a "
                "block only when the one before has left it: they would wait for each other forever; "
                f"with parallel.context {self.context} use zero_stage 1 or 2"
            )
        if self.offload_optimizer and self.zero_stage == 0:
            raise ValueError("parallel.offload_optimizer needs parallel.zero_stage 1, 2 or 3; it is 0")


@dataclass(frozen=True)
class CheckpointConfig:
    """When the run is saved, and what is kept. A run started again goes on from its newest whole checkpoint."""

    every_steps: int = 500
    """Steps between checkpoints; there is always one at the end. 0: only that one."""
    keep: int = 3
    """Newest checkpoints that are kept. The newest healthy one is kept beside them (health.healthy_after_steps)."""
    keep_every_tokens: int = 0
    """Keep for good the first checkpoint after each so many tokens; 0: none."""
    keep_best: int = 1
    """Checkpoints with the lowest held-out losses that are kept, of those saved at a step that was evaluated."""
    asynchronous: bool = True
    """Copy what is saved to the host's memory and write it while training goes on; off: training waits."""

    def __post_init__(self) -> None:
        _check("checkpoint", self, every_steps=0, keep=1, keep_every_tokens=0, keep_best=0)


@dataclass(frozen=True)
class HealthConfig:
    """What is done about a step whose loss or gradient is not a number, or whose loss is a spike.

    skip: its update is left out, and the learning rate's schedule waits; rewind: the run goes back to its newest
    healthy checkpoint and passes over the batches that did it; stop: the run ends. Skipping and rewinding end in a
    stop, too, when they do not help. A run that stops leaves RUN/autopsy/.
    """

    nonfinite: Literal["skip", "rewind", "stop"] = "skip"
    """A loss or gradient that is infinite or not a number; its update is left out in any case."""
    spike: Literal["note", "skip", "rewind", "stop"] = "note"
    """A loss above the usual ones; note: it is reported, and no checkpoint before it counts as healthy."""
    spike_window: int = 100
    """Losses of the latest good steps that make the usual ones; until there are so many, nothing is a spike."""
    spike_deviations: float = 8.0
    """A spike is that many standard deviations above their median; they are estimated from absolute deviations."""
    spike_nats: float = 0.5
    """A spike is at least so many nats above their median."""
    in_a_row: int = 10
    """Skipped steps in a row that stop the run."""
    rewinds: int = 3
    """Rewinds to one and the same checkpoint, after which the run stops."""
    healthy_after_steps: int = 50
    """A checkpoint is healthy when so many steps after it were good ones."""

    def __post_init__(self) -> None:
        _check("health", self, spike_window=2, spike_deviations=0, spike_nats=0)
        _check("health", self, in_a_row=1, rewinds=1, healthy_after_steps=1)


@dataclass(frozen=True)
class EvaluateConfig:
    """What is evaluated between steps, on all ranks. The training is, bit for bit, the one without it. There is always
    an evaluation after the last step."""

    every_tokens: int = 0
    """Training tokens between evaluations: each comes after the step that completes so many more. 0: every_steps."""
    every_steps: int = 0
    """Steps between evaluations, in place of every_tokens. Both 0: only the one after the last step."""
    heldout_sequences: int = 64
    """Held-out sequences whose loss is taken, read as in training; fewer when the shard has fewer. 0: none."""
    long_every: int = 1
    """Every so manieth evaluation, and the one after the last step, reads the haystacks below too."""
    probe_length: int = 0
    """Tokens of the longest haystack in which a needle is looked for (S-NIAH in noise, RULER's niah_single_1), streamed
    in constant memory. 0: no probe."""
    probe_shortest: int = 4_096
    """Tokens of the shortest; lengths double from here to probe_length."""
    probe_samples: int = 5
    """Haystacks of each length, the same at every evaluation; needles lie evenly between the start and the end."""

    def __post_init__(self) -> None:
        _check("evaluate", self, every_tokens=0, every_steps=0, heldout_sequences=0, long_every=1)
        _check("evaluate", self, probe_length=0, probe_shortest=1, probe_samples=1)
        if self.every_tokens and self.every_steps:
            raise ValueError(
                f"evaluate.every_tokens is {self.every_tokens} and evaluate.every_steps {self.every_steps}; "
                "give one of them"
            )
        doublings, rest = divmod(self.probe_length, self.probe_shortest)
        if rest or doublings & (doublings - 1):
            raise ValueError(
                f"evaluate.probe_length {self.probe_length} does not come from evaluate.probe_shortest "
                f"{self.probe_shortest} by doubling; take {self.probe_shortest << max(doublings.bit_length() - 1, 0)}, "
                "or another shortest length"
            )

    @property
    def probe_lengths(self) -> tuple[int, ...]:
        """Tokens of the probe's haystacks, short ones first."""
        doublings = self.probe_length // self.probe_shortest
        return tuple(self.probe_shortest << power for power in range(doublings.bit_length()))


@dataclass(frozen=True)
class LoggingConfig:
    """What is reported; RUN/metrics.jsonl has every step whatever is set here."""

    every_steps: int = 1
    """Steps between the lines in the terminal."""
    memory_every_steps: int = 0
    """Steps between looks into the memories of every block, which cost about a forward pass of them over one row:
    surprise, gates, held steps, evenness of writing, drift (records of kind memory in RUN/metrics.jsonl).
    0: never."""
    stragglers_every_steps: int = 10
    """Steps between comparisons of the ranks: whose own work takes longer than the others' is named. 0: never."""
    tensorboard: bool = False
    """Write RUN/tensorboard as well; needs the extra `tensorboard`."""
    wandb: Literal["off", "online", "offline"] = "off"
    """Weights & Biases; offline writes to RUN/wandb and needs no network. A run that is started again goes on there
    under the id in RUN/run_id. Its key comes from WANDB_API_KEY or `wandb login`, never from settings."""
    wandb_project: str = "titans-mcore"
    """Project there."""
    wandb_name: str = ""
    """Name of the run there; empty: the name of the run folder."""

    def __post_init__(self) -> None:
        _check("logging", self, every_steps=1, memory_every_steps=0, stragglers_every_steps=0)
