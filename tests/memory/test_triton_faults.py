"""Which versions of Triton are known to make wrong code, where, and what is done about it."""

import os
import warnings

import pytest
import torch

from titans_mcore.kernels import fused
from titans_mcore.linear import fla
from titans_mcore.memory import triton_faults
from titans_mcore.memory.triton_faults import FAULTS, TritonFault, avoid, fault_of, parsed_version

HOPPER, AMPERE, BLACKWELL = 9, 8, 10
INCURABLE = TritonFault(HOPPER, "3.6", "3.6.1", "", "a test")


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("3.6.0", (3, 6, 0, 0)),
        ("3.6.0+git9844da95", (3, 6, 0, 0)),
        ("3.4", (3, 4, 0, 0)),
        ("3.7.1.post1", (3, 7, 1, 0)),
        ("3.7.1rc2", (3, 7, 1, -1)),
        ("3.7.1.dev20260801", (3, 7, 1, -1)),
        ("unknown", ()),
    ],
)
def test_versions_are_read_as_they_are_published(text: str, version: tuple[int, ...]) -> None:
    assert parsed_version(text) == version


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("3.3.1", False),
        ("3.4.0", True),
        ("3.6.0", True),
        ("3.6.0+git9844da95", True),
        ("3.7.0", True),
        ("3.7.1rc2", True),
        ("3.7.1", False),
        ("3.10.0", False),
    ],
)
def test_what_is_wrong_on_hopper_is_wrong_there_alone(text: str, wrong: bool) -> None:
    version = parsed_version(text)
    assert (fault_of(version, HOPPER) is not None) == wrong
    assert fault_of(version, AMPERE) is fault_of(version, BLACKWELL) is fault_of((), HOPPER) is None


@pytest.mark.parametrize(("given", "value", "said"), [(None, "1", "avoids that"), ("0", "0", "if it were 1")])
def test_what_helps_is_set_once_and_leaves_what_the_user_has_set(
    given: str | None, value: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DISABLE_MMA_V3", raising=False)
    if given is not None:
        monkeypatch.setenv("DISABLE_MMA_V3", given)
    avoid.cache_clear()
    with pytest.warns(UserWarning, match=said):
        avoid(FAULTS[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        avoid(FAULTS[0])
    assert os.environ.pop("DISABLE_MMA_V3") == value
    avoid.cache_clear()


@pytest.fixture
def on_a_wrong_gpu(monkeypatch: pytest.MonkeyPatch) -> TritonFault:
    """Wherever this runs, the installed Triton has a fault that nothing helps against."""
    for module in (triton_faults, fused, fla):
        monkeypatch.setattr(module, "fault_here", lambda device: INCURABLE)
    return INCURABLE


def test_the_fused_kernels_refuse_what_nothing_helps_against(on_a_wrong_gpu: TritonFault) -> None:
    queries, weights = torch.zeros(1, 16, 2, 16), [torch.zeros(2, 16, 16)]
    reason = fused.fused_fits(queries.bfloat16(), weights, 16)
    assert "wrong code of the fused memory kernels on this GPU (a test); install Triton 3.6.1 or later" in reason
    assert fused.fused_fits(queries, weights, 16) == ""  # products of float32 take no tensor cores


def test_flash_linear_attention_refuses_what_the_table_names(
    on_a_wrong_gpu: TritonFault, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fla.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(fla, "installed_version", lambda package: (0, 6, 0, 0))
    reason = fla.why_not_fla(torch.bfloat16, torch.device("cuda", 0))
    assert "makes wrong gradients on this GPU (a test); install Triton 3.6.1 or later" in reason


def test_a_cpu_has_no_fault_and_nothing_is_said() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert triton_faults.fault_here(torch.device("cpu")) is None
