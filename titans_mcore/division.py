"""Which divisions of a model over processes are possible: numbers alone, known before anything is started."""

from titans_mcore.config import TitansConfig

_VOCABULARY_MULTIPLE = 128


def padded_vocab_size(vocab_size: int) -> int:
    """Rows of the embedding matrix: the vocabulary rounded up to 128, the same at every tensor-parallel size."""
    return -(-vocab_size // _VOCABULARY_MULTIPLE) * _VOCABULARY_MULTIPLE


def check_world(world_size: int, tensor_parallel: int, context_parallel: int = 1) -> int:
    """Data-parallel ranks of so many processes.

    Raises:
        ValueError: The processes cannot be divided.
    """
    for name, size in (("tensor", tensor_parallel), ("context", context_parallel)):
        if size < 1:
            raise ValueError(f"{name} parallel size is {size}; it must be at least 1")
    product = tensor_parallel * context_parallel
    if world_size % product:
        groups, sizes = f"tensor-parallel groups of {tensor_parallel}", "the tensor-parallel size"
        if context_parallel > 1:
            groups = f"groups of tensor {tensor_parallel} x context {context_parallel}"
            sizes = "the tensor- and context-parallel sizes"
        raise ValueError(
            f"{world_size} process{'es' if world_size > 1 else ''} cannot be divided into {groups}; "
            f"start a multiple of {product} processes or change {sizes}"
        )
    return world_size // product


def memory_split(config: TitansConfig, memory_parallel: str, tensor_parallel: int) -> str:
    """What tensor-parallel ranks share of the memory, "heads" or "hidden"; "auto" takes heads where they divide."""
    if memory_parallel != "auto":
        return memory_parallel
    if tensor_parallel < 1 or not any(mixer.memory for mixer in config.mixers):
        return "heads"
    return "hidden" if config.memory_shape.heads % tensor_parallel else "heads"


def check_divisible(config: TitansConfig, tensor_parallel: int, memory_parallel: str = "auto") -> None:
    """Whether tensor-parallel ranks can share a model.

    Raises:
        ValueError: Heads, memory, feed-forward width or vocabulary cannot be divided; the message says what and how.
    """
    memory = memory_split(config, memory_parallel, tensor_parallel)
    if tensor_parallel < 1:
        raise ValueError(f"tensor parallel size is {tensor_parallel}; it must be at least 1")
    padded = padded_vocab_size(config.vocab_size)
    heads = {part: shape for mixer in config.mixers for part, shape in mixer.heads(config).items()}
    shared = "memory" in heads and memory == "hidden"
    divided = [(shape.setting, shape.number) for part, shape in heads.items() if part != "memory" or not shared]
    divided += [("ffn_dim", config.ffn_dim), (f"vocab_size {config.vocab_size}, padded", padded)]
    if shared and tensor_parallel > 1:
        if config.memory_backend in ("native", "fused", "oracle"):
            raise ValueError(
                f"model.memory_backend '{config.memory_backend}' computes whole memories; "
                "use 'auto' or 'chunked' with parallel.memory_parallel 'hidden'"
            )
        divided += [("memory_head_dim", config.memory_shape.width), ("memory width", max(config.memory_widths))]
    for name, number in divided:
        if number % tensor_parallel:
            raise ValueError(
                f"{name} {number} cannot be divided by tensor parallel size {tensor_parallel}; "
                f"choose a tensor parallel size that divides {number}, or change the model"
            )
