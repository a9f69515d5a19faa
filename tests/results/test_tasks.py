"""Tasks through lm-eval: local ones, whose scores are known, and the paper's suite."""

import json
from pathlib import Path

import pytest
import torch
from conftest import build_model, byte_tokenizer, write_yaml
from peft import LoraConfig, get_peft_model
from test_evaluate import TOKENS, run  # noqa: F401  (run is a fixture)
from transformers import AutoModelForCausalLM, AutoTokenizer

from axolotl_loram.config_evaluate import EvaluationRequest
from axolotl_loram.errors import LoRAMError
from axolotl_loram.results.candidates import Candidate, load_model, put_on
from axolotl_loram.results.evaluate import evaluate
from axolotl_loram.results.tasks import OWN, SUITES, Task, resolve_tasks, score, wrap

CHOICES = ["red", "green", "blue"]
PROMPTS = [f"Question {i}: what is {i} + {i + 1}?\nAnswer:" for i in range(8)]


def likeliest(model, tokenizer, prompt):
    """The choice of the largest summed log probability after the prompt."""

    def log_likelihood(choice):
        start = len(tokenizer(prompt)["input_ids"])
        ids = torch.tensor(tokenizer(f"{prompt} {choice}")["input_ids"])
        with torch.no_grad():
            found = model(ids[None]).logits[0].log_softmax(-1)
        return float(found[torch.arange(start - 1, len(ids) - 1), ids[start:]].sum())

    return max(range(len(CHOICES)), key=lambda i: log_likelihood(CHOICES[i]))


def continuation(model, tokenizer, prompt):
    ids = tokenizer(prompt, return_tensors="pt")
    with torch.no_grad():
        made = model.generate(**ids, max_new_tokens=4, do_sample=False)
    return tokenizer.decode(made[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.fixture(scope="module")
def tasks(run, make_model, tmp_path_factory):
    """Two tasks of which base + recovered adapter gets exactly the first three of eight right."""
    folder = tmp_path_factory.mktemp("tasks")
    tokenizer = AutoTokenizer.from_pretrained(make_model())
    model = put_on(load_model(str(make_model())), run / "out").merge_and_unload()
    model.save_pretrained(run / "merged")
    tokenizer.save_pretrained(run / "merged")
    lines = []
    for number, prompt in enumerate(PROMPTS):
        best, text = likeliest(model, tokenizer, prompt), continuation(model, tokenizer, prompt)
        right = number < 3
        gold = best if right else (best + 1) % len(CHOICES)
        answer = text if right else "something else"
        lines.append({"prompt": prompt, "gold": gold, "answer": answer})
    data = folder / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, lines)))
    common = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}}
    common |= {"test_split": "test", "doc_to_text": "{{prompt}}", "num_fewshot": 0}
    chosen = {"task": "colours", "output_type": "multiple_choice", "doc_to_target": "{{gold}}"}
    chosen |= {"doc_to_choice": CHOICES, "metric_list": [{"metric": "acc"}]}
    written = {"task": "written", "output_type": "generate_until", "doc_to_target": "{{answer}}"}
    written |= {"generation_kwargs": {"until": ["\u0000"], "max_gen_toks": 4, "do_sample": False}}
    written["metric_list"] = [{"metric": "exact_match"}]
    return [
        write_yaml(folder / f"{each['task']}.yaml", common | each) for each in (chosen, written)
    ]


def test_merged_and_recovered_score_the_same_and_what_they_should(run, tasks, tmp_path):
    request = EvaluationRequest(
        run / "loram.yml",
        models=["base", "base+recovered", "pruned+adapter"],
        also={"merged": run / "merged"},
        tasks=[str(file) for file in tasks],
        output=tmp_path / "evaluation.json",
        device="cpu",
        batch_size=3,
    )
    found = evaluate(request)["tasks"]
    assert found["colours"]["metric"] == "acc,none" and found["colours"]["samples"] == 8
    assert found["written"]["metric"] == "exact_match,none"
    for task in ("colours", "written"):
        models = found[task]["models"]
        assert models["base+recovered"] == models["also:merged"]
        assert models["base+recovered"]["value"] == 3 / 8
        assert models["base"]["value"] != 3 / 8 and "pruned+adapter" in models
        paired = found[task]["paired"]
        assert paired["base+recovered"] == paired["also:merged"]
        gained = models["base+recovered"]["value"] - models["base"]["value"]
        assert paired["base+recovered"]["difference"] == pytest.approx(gained)
    assert "validation" not in evaluate(request)["perplexity"]  # the YAML holds nothing out


def test_a_limit_and_another_question_set_are_other_results(run, tasks):
    (task,) = resolve_tasks([f"{tasks[0]}:0"])
    candidate = Candidate("base", "somewhere")
    base = AutoModelForCausalLM.from_pretrained(run / "merged")
    tokenizer = AutoTokenizer.from_pretrained(run / "merged")
    found, _ = score(task, candidate, base, tokenizer, 4, limit=2, seed=0)
    assert found["colours"]["samples"] == 2 and found["colours"]["per_sample"] == [1, 1]
    before = task.identity()
    data = tasks[0].parent / "data.jsonl"
    data.write_text(data.read_text() + "\n")
    assert task.identity() != before and task.shots == 0


@pytest.mark.parametrize("saved", [None, ["lm_head"]])
def test_a_tied_lm_head_with_an_adapter_is_wrapped_as_it_is(saved):
    model = build_model(tie_word_embeddings=True)
    targets = ["q_proj"] if saved else ["q_proj", "lm_head"]
    config = LoraConfig(r=2, target_modules=targets, modules_to_save=saved)
    config.init_lora_weights = False
    adapted = get_peft_model(model, config).eval()
    before = adapted(TOKENS).logits
    assert torch.equal(wrap(adapted, byte_tokenizer(), 2).model(TOKENS).logits, before)
    assert "tie_weights" not in vars(adapted)


def test_the_papers_suite_is_in_the_installed_lm_eval():
    """Each name resolves to a declaration, whose answers are scored as the paper does."""
    tasks = {task.name: task for task in resolve_tasks([], "paper", allow_code=True)}
    assert {name: task.shots for name, task in tasks.items()} == dict(SUITES["paper"])
    for name, task in tasks.items():
        text = Path(task.file).read_text(encoding="utf-8")
        assert f"task: {name}" in text and ("results/lm_eval" in str(task.file)) == (name in OWN)
    assert "strict-match" in Path(tasks["gsm8k_cot"].file).read_text(encoding="utf-8")
    assert Task("humaneval_pass10").identity() != tasks["humaneval_pass10"].identity()


def test_own_tasks_ask_what_lm_evals_do():
    """But for where the data is, and how many answers are sampled."""
    import lm_eval.tasks
    from lm_eval.utils import load_yaml_config

    theirs = Path(lm_eval.tasks.__file__).parent
    for name, file, ours in (
        ("mathqa", "mathqa/mathqa.yaml", set()),
        ("humaneval_pass10", "humaneval/humaneval_64.yaml", {"repeats", "generation_kwargs"}),
    ):
        mine = load_yaml_config(str(OWN[name]), mode="simple")
        original = load_yaml_config(str(theirs / file), mode="simple")
        same = {"output_type", "test_split", "doc_to_text", "doc_to_target", "num_fewshot"}
        same |= {"repeats", "generation_kwargs"} - ours
        assert {k: mine.get(k) for k in same} == {k: original.get(k) for k in same}
    from axolotl_loram.results.lm_eval import utils

    options = {"options": "a ) 38 , b ) 27.675 , c ) 30 , d ) data inadequate , e ) none of these"}
    assert utils.doc_to_choice(options)[:3] == ["38", "27.675", "30"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("arc_esy", r"did you mean arc_easy"),
        ("humaneval", "--allow-code-execution for humaneval"),
        ("./nowhere.yaml", "found nowhere.yaml unreadable"),
        (str(OWN["humaneval_pass10"]), "--allow-code-execution"),
    ],
)
def test_unknown_and_unsafe_tasks_are_refused(name, message, monkeypatch):
    from axolotl_loram.results import tasks as harness

    class Index:
        task_index = {"arc_easy": {}, "hellaswag": {}}  # lm-eval's own takes ten seconds to make

    monkeypatch.setattr(harness, "_manager", lambda: Index)
    with pytest.raises(LoRAMError, match=message):
        resolve_tasks([name])
