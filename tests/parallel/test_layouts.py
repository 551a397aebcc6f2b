"""One model divided over processes in every way: the same logits and the same gradients, in float64."""

import json
import sys

import pytest

from titans_mcore.mixers import MIXERS

from ..pretrain.jobs import ROOT, Job

# One fixture trains for all tests: it may take its time where other tests share the cores.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]

CLOSE = 1e-9
LAYOUTS = {
    2: [
        "tensor=2",
        "tensor=2 memory=hidden",
        "tensor=2 sequence recompute=except_memory",
        "tensor=2 memory=hidden sequence recompute=block",
        "context=2",
        "context=2 recompute=except_memory",
    ],
    4: [
        "tensor=4 sequence",
        "tensor=4 memory=hidden",
        "tensor=2",
        "tensor=2 context=2 sequence",
        "tensor=2 context=2 memory=hidden",
        "context=2",
        "context=4",
    ],
}


@pytest.fixture(scope="module")
def errors(tmp_path_factory):
    """Largest relative error of every tensor, by model and layout."""
    folder, found = tmp_path_factory.mktemp("layouts"), {}
    for processes, layouts in {1: [], **LAYOUTS}.items():
        torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--rdzv-backend", "c10d"]
        worker = ["--rdzv-endpoint", "localhost:0", "-m", "tests.parallel.layouts_worker"]
        output = folder / f"{processes}.json"
        command = [sys.executable, *torchrun, *worker, str(folder / "reference.pt"), str(output), *layouts]
        status, out, err = Job(command, ROOT).wait(timeout_seconds=1200)
        assert status == 0, out + err
        if layouts:
            read = json.loads(output.read_text())
            found |= {(processes, *key.split(" | ")): value for key, value in read.items()}
    return found


@pytest.mark.parametrize(("processes", "layout"), [(n, layout) for n, layouts in LAYOUTS.items() for layout in layouts])
def test_a_divided_model_has_the_logits_and_gradients_of_a_whole_one(errors, processes, layout):
    checked = {key[1]: value for key, value in errors.items() if (key[0], key[2]) == (processes, layout)}
    # Every variant, whole rows and documents, and other memories; one or two heads cannot be dealt out to more ranks.
    ranks = int(layout[7]) if "tensor" in layout and "hidden" not in layout else 1
    assert len(checked) == 2 * len(MIXERS) + 11 - (ranks > 1) - 3 * (ranks > 2)
    for model, by_tensor in checked.items():
        name = max(by_tensor, key=by_tensor.get)
        assert by_tensor[name] < CLOSE, f"{model}: {name} differs by {by_tensor[name]:.1e}"
