"""lm-eval's tasks by the faithful scan, against a run token by token; tasks are written here, no hub is asked."""

from __future__ import annotations

import json

import lm_eval
import pytest
import torch
import transformers
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager
from typer.testing import CliRunner

from calibrate import lm_eval_model
from calibrate.cli import lm_eval_app
from calibrate.quantized_model import quantized_copy
from calibrate.recurrence import Recurrence, replaced
from qmamba_compile.errors import QMambaError

TASKS = {
    "choices": """
task: choices
dataset_path: json
dataset_kwargs: {data_files: {test: "%s"}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: ["yes", "no!", " may be"]
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}]
""",
    "rolling": """
task: rolling
dataset_path: json
dataset_kwargs: {data_files: {test: "%s"}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: byte_perplexity}]
""",
    "continuations": """
task: continuations
dataset_path: json
dataset_kwargs: {data_files: {test: "%s"}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["q"], max_gen_toks: 12}
metric_list: [{metric: exact_match}]
""",
}
QUESTIONS = ["import os", "def main(argument):\n    return", "x", "class Reader:\n    def read(self"]


@pytest.fixture(scope="module")
def answers(model_folder, tmp_path_factory):
    """What lm-eval says, and its samples, by task."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [{"question": question, "answer": index % 3} for index, question in enumerate(QUESTIONS)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, task in TASKS.items():
        (folder / f"{name}.yaml").write_text(task % (folder / "rows.jsonl"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
        patch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
        return lm_eval.simple_evaluate(
            model="qmamba",
            model_args=f"pretrained={model_folder},weights=none,batch_size=3",
            tasks=list(TASKS),
            task_manager=TaskManager(include_path=str(folder), include_defaults=False),
            bootstrap_iters=0,
        )


@pytest.fixture(scope="module")
def stepping(model_folder):
    """Log-probabilities [l, vocab] of the token behind each of ``ids``, one step at a time on a packed state."""
    network = transformers.AutoModelForCausalLM.from_pretrained(model_folder).eval()
    model = quantized_copy(network, weights=None)

    @torch.no_grad()
    def run(ids):
        with replaced(model, Recurrence(4)):
            out = model(torch.tensor([ids[:1]]), use_cache=True)
            logits = [out.logits[0, -1]]
            for token in ids[1:]:
                out = model(torch.tensor([[token]]), cache_params=out.cache_params, use_cache=True)
                logits.append(out.logits[0, -1])
        return torch.stack(logits).log_softmax(-1)

    return run


def likelihood(stepping, context, continuation):
    ids = list(context) + list(continuation)
    said = stepping(ids[:-1])[len(context) - 1 :]
    return said.gather(1, torch.tensor(list(continuation))[:, None]).sum().item()


def test_multiple_choice(answers, stepping):
    for sample in answers["samples"]["choices"]:
        question = sample["doc"]["question"].encode()
        for choice, ((said, _),) in zip((b"yes", b"no!", b" may be"), sample["resps"], strict=True):
            # lm-eval puts a space between the two.
            assert float(said) == pytest.approx(likelihood(stepping, question, b" " + choice), rel=2e-3)
    assert 0 <= answers["results"]["choices"]["acc,none"] <= 1


def test_rolling(answers, stepping):
    for sample in answers["samples"]["rolling"]:
        question = sample["doc"]["question"].encode()
        assert float(sample["resps"][0][0]) == pytest.approx(likelihood(stepping, b"\n", question), rel=2e-3)


def test_generation(answers, stepping):
    """Greedy, batched with prompts of other lengths: token by token the same, up to a near tie."""
    for sample in answers["samples"]["continuations"]:
        ids, written = list(sample["doc"]["question"].encode()), []
        for _ in range(12):
            log = stepping(ids + written)[-1]
            written.append(int(log.argmax()))
        expected = bytes(written).decode(errors="replace").split("q")[0]
        assert sample["resps"][0][0] == expected


@pytest.fixture
def spelling(model_folder, monkeypatch):
    """A model whose text is its tokens in digits, so that no token is lost in decoding."""
    model = lm_eval_model.QMambaLM(str(model_folder), weights="none", batch_size=len(QUESTIONS))
    monkeypatch.setattr(model, "tok_decode", lambda tokens: "".join(f"{token} " for token in tokens))

    def answers(**settings):
        requests = [Instance("generate_until", {}, (text, {"max_gen_toks": 8, **settings}), 0) for text in QUESTIONS]
        return model.generate_until(requests, disable_tqdm=True)

    return model, answers


def test_what_follows_the_end_of_text_is_not_said(spelling):
    model, answers = spelling
    free = answers()
    end = free[0].split()[2]
    expected = [text.partition(f"{end} ")[0] for text in free]
    assert len({len(text.split()) for text in expected}) > 1  # some rows go on where others ended
    for tokens in (int(end), [int(end), 999]):
        assert answers(eos_token_id=tokens) == expected
        model.model.generation_config.eos_token_id = tokens
        assert answers() == expected
        model.model.generation_config.eos_token_id = None


def test_an_empty_stop_stops_nothing(spelling):
    _, answers = spelling
    free = answers()
    assert all(len(text.split()) == 8 for text in free)
    assert answers(until=[""]) == free
    assert answers(until=["", " "]) == [text.split()[0] for text in free]


def test_the_model_is_registered():
    assert get_model("qmamba") is lm_eval_model.QMambaLM


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--model_args", "pretrained=FOLDER", "--tasks", "no_such_task"], ["lm-eval", "no_such_task"]),
        (["--model_args", "pretrained=FOLDER"], ["lm-eval", "No tasks"]),
        (["--tasks", "arc_easy"], ["pretrained=DIR"]),
        (["--model_args", "pretrained=FOLDER,statebits=8", "--tasks", "arc_easy"], ["statebits", "state_bits"]),
        (["--model_args", "pretrained=FOLDER,state_bits=5", "--tasks", "arc_easy"], ["state_bits '5'", "8, 4, 3, 2"]),
    ],
)
def test_a_bad_argument_has_words(model_folder, monkeypatch, arguments, words):
    monkeypatch.setattr("sys.argv", ["qmamba"])  # the command replaces it
    result = CliRunner().invoke(lm_eval_app, [argument.replace("FOLDER", str(model_folder)) for argument in arguments])
    assert isinstance(result.exception, QMambaError) and all(word in str(result.exception) for word in words)
