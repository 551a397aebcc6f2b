"""What else reads an exported folder: Trainer, accelerate's device maps, lm-eval's `hf` model, a hub."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from titans_mcore.attention.flash import flash_installed
from titans_mcore.hf.convert import export
from titans_mcore.hf.flatten import flatten_code
from titans_mcore.hf.modeling_titans import TitansForCausalLM

from .hf_runs import WORDS, save_run, tiny
from .local_hub import local_hub
from .models import make

TEXTS = ["the memory", "a model learns at test time", "surprise tells the memory of a model", "keep"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> Path:
    run = save_run(tmp_path_factory.mktemp("run") / "mag", tiny(variant="mag", init_std=0.1), tokenizer)
    return export(run, tmp_path_factory.mktemp("ecosystem") / "hf", skip_proof=True).output


def load(folder: Path, **settings: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32, **settings)


@pytest.fixture(scope="module")
def tokens(folder: Path) -> dict[str, Any]:
    return AutoTokenizer.from_pretrained(folder)(TEXTS, return_tensors="pt", padding=True)


def test_trainer_fine_tunes_every_parameter_and_goes_on_from_its_checkpoint(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="Trainer needs accelerate: pip install 'titans-mcore[evals]'")
    from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

    model, tokenizer = load(folder), AutoTokenizer.from_pretrained(folder)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    rows = [tokenizer(" ".join(WORDS[i : i + 3 + i % 5])) for i in range(8)]

    def trainer(model: Any, steps: int) -> Any:
        settings = TrainingArguments(
            output_dir=str(tmp_path / "tuned"),
            max_steps=steps,
            per_device_train_batch_size=4,
            learning_rate=5e-3,
            lr_scheduler_type="constant",
            logging_steps=1,
            save_steps=3,
            gradient_checkpointing=True,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
        )
        collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
        return Trainer(model=model, args=settings, train_dataset=rows, data_collator=collator)

    tuned = trainer(model, 6)
    tuned.train()
    losses = [entry["loss"] for entry in tuned.state.log_history if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0], losses
    assert not [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])]
    again = load(folder)
    trainer(again, 6).train(resume_from_checkpoint=str(tmp_path / "tuned" / "checkpoint-3"))
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(dict(again.named_parameters())[name], parameter, rtol=0, atol=1e-5)


@pytest.mark.parametrize("variant", ["mac", "lmm"])
def test_trainer_fine_tunes_under_autocast(variant: str, tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="Trainer needs accelerate: pip install 'titans-mcore[evals]'")
    from transformers import Trainer, TrainingArguments

    settings = TrainingArguments(
        output_dir=str(tmp_path), max_steps=1, bf16=True, use_cpu=True, report_to=[], disable_tqdm=True
    )
    model, rows = make(variant), [{"input_ids": torch.tensor([3, 4]), "labels": torch.tensor([3, 4])}]
    loss = model(input_ids=rows[0]["input_ids"][None], labels=rows[0]["labels"][None]).loss.item()
    assert Trainer(model=model, args=settings, train_dataset=rows).train().training_loss == pytest.approx(
        loss, rel=0.02
    )


def test_trainer_predicts_logits_and_no_cache(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="Trainer needs accelerate: pip install 'titans-mcore[evals]'")
    from transformers import Trainer, TrainingArguments

    model, ids = load(folder), torch.arange(3, 15).view(3, 4)
    settings = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[], disable_tqdm=True)
    rows = [{"input_ids": row, "labels": row} for row in ids]
    trainer = Trainer(model=model, args=settings)
    model.config.use_cache = True  # which some versions of Trainer turn off
    predicted = trainer.predict(rows).predictions
    with torch.no_grad():
        torch.testing.assert_close(torch.as_tensor(predicted), model(ids).logits)


def test_no_name_of_a_cache_makes_transformers_warn(folder: Path, tmp_path: Path) -> None:
    """In a process of its own: transformers gives such a warning once."""
    script = (
        "import sys, torch; from transformers import AutoModelForCausalLM as A;"
        "model = A.from_pretrained(sys.argv[1], trust_remote_code=True); ids = torch.arange(3, 9)[None];"
        "cache = model(ids).cache; model(ids, cache=cache); model(ids, past_key_values=cache);"
        "ids = ids.repeat(1, 4);"
        "ids = model.generate(ids, past_key_values=cache, max_new_tokens=2, pad_token_id=0);"
        "ids = model.generate(ids, cache=cache, max_new_tokens=2, pad_token_id=0);"
        "assert cache.get_seq_length() == 27"
    )
    command = [sys.executable, "-P", "-c", script, str(folder)]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "past_key_values" not in result.stderr


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}], ids=["auto", "one"])
def test_a_device_map_changes_no_logit(folder: Path, tokens: dict[str, Any], device_map: str | dict[str, str]) -> None:
    pytest.importorskip("accelerate", reason="device_map needs accelerate: pip install 'titans-mcore[evals]'")
    mapped = load(folder, device_map=device_map)
    with torch.no_grad():
        assert torch.equal(mapped(**tokens).logits, load(folder)(**tokens).logits)
    generated = mapped.generate(**tokens, max_new_tokens=4, do_sample=False)
    assert torch.equal(generated, load(folder).generate(**tokens, max_new_tokens=4, do_sample=False))


@pytest.mark.parametrize("asked", ["eager", "sdpa"])
def test_transformers_names_of_attention_are_taken(folder: Path, tokens: dict[str, Any], asked: str) -> None:
    backend = {"eager": "dense", "sdpa": "sdpa"}[asked]
    loaded = TitansForCausalLM.from_pretrained(folder, attn_implementation=asked)
    for model in (load(folder, attn_implementation=asked), loaded):
        assert model.config.to_titans().attention_backend == backend
        with torch.no_grad():
            torch.testing.assert_close(model(**tokens).logits, load(folder)(**tokens).logits, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="attn_implementation is 'flex_attention'; Titans models have eager, sdpa, fl"):
        TitansForCausalLM.from_pretrained(folder, attn_implementation="flex_attention")


@pytest.mark.skipif(flash_installed(), reason="flash-attn is installed; what it computes needs a CUDA device")
def test_flash_attention_2_without_its_package_is_refused_in_a_sentence(folder: Path) -> None:
    for model in (load, TitansForCausalLM.from_pretrained):
        with pytest.raises(ImportError, match=r"FlashAttention2.*installed"):
            model(folder, attn_implementation="flash_attention_2")


def test_the_cards_code_runs_as_it_stands(folder: Path, tmp_path: Path) -> None:
    """Where nobody answers questions, and without a warning of transformers' own."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    place = tmp_path / "path" / "to" / "this"
    place.mkdir(parents=True)
    (place / "folder").symlink_to(folder)
    # An export uses the compiled memory of the package where that is installed: of this one, not of another version.
    root = str(Path(__file__).resolve().parents[2])
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONPATH": root}
    command = [sys.executable, "-P", "-c", code]
    result = subprocess.run(
        command, env=environment, cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("['The")
    assert not re.search(r"y/N|model of type|model type", result.stdout + result.stderr)


def test_offloading_is_refused_in_a_sentence(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="device_map needs accelerate: pip install 'titans-mcore[evals]'")
    parts = dict.fromkeys(("model.embedding", "model.layers.1", "model.final_norm", "lm_head"), "cpu")
    with pytest.raises(ValueError, match="on cpu, disk: Titans models cannot be offloaded"):
        load(folder, device_map={**parts, "model.layers.0": "disk"}, offload_folder=str(tmp_path))


def test_lm_eval_scores_and_generates_as_the_model_does(folder: Path) -> None:
    pytest.importorskip("lm_eval", reason="needs lm-eval: pip install 'titans-mcore[evals]'")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    served = HFLM(pretrained=str(folder), trust_remote_code=True, dtype="float32", device="cpu", batch_size=3)
    model, tokenizer = load(folder), AutoTokenizer.from_pretrained(folder)
    pairs = [(text, " " + word) for text in TEXTS for word in ("memory", "surprise")]
    asked = [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)]
    for (text, word), (score, greedy) in zip(pairs, served.loglikelihood(asked), strict=True):
        start, whole = (tokenizer(part, return_tensors="pt").input_ids for part in (text, text + word))
        cut = start.shape[1]
        with torch.no_grad():
            logs = model(whole).logits.log_softmax(-1)[0, cut - 1 : -1]
        assert score == pytest.approx(float(logs.gather(1, whole[0, cut:, None]).sum()), abs=1e-4)
        assert greedy == bool((logs.argmax(-1) == whole[0, cut:]).all())
    how = {"until": ["\n"], "max_gen_toks": 5, "do_sample": False}
    asked = [Instance("generate_until", {}, (text, how), index) for index, text in enumerate(TEXTS)]
    for text, answer in zip(TEXTS, served.generate_until(asked), strict=True):
        start = tokenizer(text, return_tensors="pt")
        full = model.generate(**start, max_new_tokens=5, do_sample=False)
        expected = tokenizer.decode(full[0, start.input_ids.shape[1] :], skip_special_tokens=True)
        assert answer == expected.partition("\n")[0]


def test_lm_eval_scores_whole_texts_with_one_start_token_as_the_card_says(folder: Path) -> None:
    pytest.importorskip("lm_eval", reason="needs lm-eval: pip install 'titans-mcore[evals]'")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    (setting,) = set(re.findall(r"`(add_bos_token)=False`", (folder / "README.md").read_text()))
    served = HFLM(pretrained=load(folder), tokenizer=AutoTokenizer.from_pretrained(folder), **{setting: False})
    asked = [Instance("loglikelihood_rolling", {}, (text,), index) for index, text in enumerate(TEXTS)]
    tokenizer, model = AutoTokenizer.from_pretrained(folder), load(folder)
    for text, score in zip(TEXTS, served.loglikelihood_rolling(asked), strict=True):
        ids = tokenizer(text, return_tensors="pt").input_ids  # one start token
        with torch.no_grad():
            expected = -float(model(ids, labels=ids).loss) * (ids.shape[1] - 1)
        assert score == pytest.approx(expected, rel=1e-4)


def test_a_model_pushed_to_a_hub_lies_there_with_its_code(folder: Path, tokens: Any, tmp_path: Path) -> None:
    script = (
        "import sys; from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; folder = sys.argv[1];"
        "M.from_pretrained(folder, trust_remote_code=True).push_to_hub('someone/titans', token='hf_none');"
        "T.from_pretrained(folder).push_to_hub('someone/titans', token='hf_none')"
    )
    with local_hub(tmp_path / "hub") as address:
        environment = os.environ | {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
        environment |= {"HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
        environment.pop("PYTHONPATH", None)
        command = [sys.executable, "-P", "-c", script, str(folder)]
        result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    pushed = tmp_path / "hub" / "someone" / "titans"
    assert sorted(file.name for file in pushed.glob("*.py")) == sorted(flatten_code())
    ours, theirs = (load_file(place / "model.safetensors") for place in (folder, pushed))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    with torch.no_grad():
        assert torch.equal(load(pushed)(**tokens).logits, load(folder)(**tokens).logits)
    assert (
        AutoTokenizer.from_pretrained(pushed)(TEXTS).input_ids == AutoTokenizer.from_pretrained(folder)(TEXTS).input_ids
    )
