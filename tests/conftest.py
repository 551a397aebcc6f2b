"""Shared by every test: one thread each (small tensors gain nothing from more), no denormals, no network."""

import os
import sys
from collections.abc import Iterator

import hypothesis
import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "disabled")
# Megatron-core decorates functions with torch.compile, which loads all of Inductor: more than a second in each of the
# processes that the tests start, for functions that nothing calls on a CPU.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    # Workers side by side keep to a core each, and so does all that they start: threads of two that have to wait for
    # one another in every operation are many times slower than one.
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # counts when Triton is imported, and Megatron-core does that


hypothesis.settings.register_profile("untimed", deadline=None)  # how long an example takes is the machine's business
hypothesis.settings.load_profile("untimed")

# Half a minute and more each on one core: begun last, one of them would be waited for alone.
LONG = (
    "tests/test_readme.py",
    "tests/pretrain/test_recovery.py",
    "tests/pretrain/test_resume.py",
    "tests/kernels/test_fused_scan.py",
    "tests/parallel/test_composed.py",
    "tests/mixers/test_added_mixer.py",
    "tests/launch/test_signals.py",
    "tests/hf/test_export.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take long come first; the order is otherwise as it was."""
    items.sort(key=lambda item: item.nodeid.partition("::")[0] not in LONG)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)


@pytest.fixture(autouse=True, scope="module")
def _no_launcher_left() -> Iterator[None]:
    """Engines leave variables such as LOCAL_RANK behind, which the next module would take for a launcher's."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    before = {name: os.environ[name] for name in names if name in os.environ}
    yield
    for name in names:
        os.environ.pop(name, None)
    os.environ.update(before)


@pytest.fixture(autouse=True, scope="module")
def _no_groups_left() -> Iterator[None]:
    """A module that loaded a model leaves no process groups to the next one."""
    yield
    if "titans_mcore.parallel" in sys.modules:
        sys.modules["titans_mcore.parallel"].stop()
