"""An exported folder uses the fused kernels where this package is, and says what is missing where it is not."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from titans_mcore.hf.convert import export

from .hf_runs import save_run, tiny

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> Path:
    config = tiny(variant="lmm", num_layers=1, chunk_size=16, memory_expansion=1)
    run = save_run(tmp_path_factory.mktemp("run") / "lmm", config, tokenizer)
    return export(run, tmp_path_factory.mktemp("fused") / "hf", skip_proof=True).output


def logits(folder: Path, backend: str) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, memory_backend=backend)
    tokens = torch.arange(3, 43)[None]
    padded = torch.cat([tokens, tokens.flip(1)])
    mask = torch.ones_like(padded)
    mask[1, :7] = 0
    with torch.no_grad():
        return model(padded, attention_mask=mask).logits[mask.bool()]


def test_the_kernels_give_the_logits_of_the_chunked_form(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import titans_mcore.kernels

    calls = []
    real = titans_mcore.kernels.fused_scan
    monkeypatch.setattr(titans_mcore.kernels, "fused_scan", lambda *a, **k: calls.append(1) or real(*a, **k))
    fused = logits(folder, "fused")
    assert calls
    torch.testing.assert_close(fused, logits(folder, "chunked"), rtol=0, atol=1e-4)


def test_where_the_package_is_missing_a_sentence_says_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "titans_mcore" else real(name))
    with pytest.raises(ValueError, match="come with the titans-mcore package; install it or use memory backend"):
        logits(folder, "fused")
    assert logits(folder, "auto").isfinite().all()
