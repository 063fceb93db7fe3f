"""lm-evaluation-harness finds what evaluate.py finds, and what its own backend for transformers
finds in the same checkpoint.
"""

import json
import math

import pytest
import torch

pytest.importorskip("lm_eval")

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from examples.lm_eval_nanophi import Config, NanophiLM, main
from nanophi.infer.evaluate import OPTIONS, as_text, option_logprobs, prompt_of, score_text
from nanophi.model.checkpoint import load_with_tokenizer, save
from tests.conftest import TEXTS, tiny_model, write

NAMES = ["月亮", "感冒", "春天", "风筝", "太阳", "故乡"]
QUESTIONS = [
    {
        "question": f"{i}. {text}" * (1 + i % 3),  # the longest do not fit into the context
        **{option: NAMES[(i + place) % 6] for place, option in enumerate(OPTIONS)},
        "answer": OPTIONS[i % 4],
    }
    for i, text in enumerate(TEXTS[:5] * 4)
]

# C-Eval as evaluate.py asks it. Without the delimiter the harness scores " A" and not "A".
CHOICES = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}\nA. {{A}}\nB. {{B}}\nC. {{C}}\nD. {{D}}\n答案：",
    "doc_to_choice": list(OPTIONS),
    "doc_to_target": "answer",
    "target_delimiter": "",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}
BITS = {
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{text}}",
    "metric_list": [{"metric": "bits_per_byte"}],
}


def write_task(folder, rows, task):
    """A directory with the task "own" and its rows."""
    rows = write(folder / "rows.jsonl", rows)
    where = {"data_files": {"test": rows}, "cache_dir": str(folder / "cache")}
    head = {"task": "own", "dataset_path": "json", "dataset_kwargs": where, "test_split": "test"}
    (folder / "own.yaml").write_text(json.dumps(head | task), encoding="utf-8")
    return str(folder)


def evaluated(lm, folder):
    known = TaskManager(include_path=folder, include_defaults=False)
    how = {"bootstrap_iters": 0, "torch_random_seed": None}
    found = simple_evaluate(lm, tasks=["own"], task_manager=known, **how)
    return found["results"]["own"], found["samples"]["own"]


def ask(lm, kind, *arguments):
    requests = [Instance(kind, {}, given, i) for i, given in enumerate(arguments)]
    return getattr(lm, kind)(requests)


# ---- the same as evaluate.py


def test_each_choice_is_that_of_evaluate(tok, tmp_path):
    model = tiny_model(spread=0.3, max_position_embeddings=100)
    results, samples = evaluated(NanophiLM(model, tok), write_task(tmp_path, QUESTIONS, CHOICES))
    lengths = [len(prompt_of(tok, row, [], in_chat=False)) for row in QUESTIONS]
    assert min(lengths) < model.cfg.max_position_embeddings < max(lengths)
    chosen = []
    for row, sample in zip(QUESTIONS, samples, strict=True):
        assert sample["arguments"][0] == (as_text(row, with_answer=False), "A")
        found = torch.tensor([logprob for logprob, _ in sample["filtered_resps"]])
        expected, _ = option_logprobs(model, tok, row, [])
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
        assert found.argmax() == expected.argmax()
        chosen.append(OPTIONS[int(found.argmax())])
    assert len(set(chosen)) > 1
    right = sum(choice == row["answer"] for choice, row in zip(chosen, QUESTIONS, strict=True))
    assert results["acc,none"] == right / len(QUESTIONS)


def test_bits_are_those_of_evaluate_but_for_the_ends(tok, tmp_path):
    """evaluate.py predicts no first token, and [EOS] behind the text. The harness predicts all of
    the text behind [EOS]. So its sum is evaluate's for [EOS] and the text, less what [EOS] costs
    at the end; the bytes are all of the text's then. Longer texts than these are also cut into
    other windows: the harness's begin with one token of context, evaluate's with half a window.
    """

    class BehindEos:
        """The tokenizer, with [EOS] before each text."""

        eos_id = tok.eos_id
        decode_bytes = tok.decode_bytes

        def encode(self, text):
            return [tok.eos_id, *tok.encode(text)]

    model = tiny_model(spread=0.3)
    texts = TEXTS[:3]
    folder = write_task(tmp_path, [{"text": text} for text in texts], BITS)
    results, _ = evaluated(NanophiLM(model, tok), folder)
    nats = 0.0
    for text in texts:
        ids = torch.tensor([BehindEos().encode(text)])
        assert ids.shape[1] < model.cfg.max_position_embeddings
        score = score_text(model, BehindEos(), text, stride=32)
        assert score.bytes == len(text.encode())
        nats += score.nats + model(ids)[0, -1].log_softmax(-1)[tok.eos_id].item()
    expected = nats / math.log(2) / sum(len(text.encode()) for text in texts)
    assert results["bits_per_byte,none"] == pytest.approx(expected, rel=1e-5)


# ---- the same as the harness's backend for transformers


@pytest.fixture(scope="module")
def both(house):
    """Ours and the harness's of one checkpoint; it takes [BOS], which the model has never seen."""
    directory = str(house / "pretrain")
    model, tok = load_with_tokenizer(directory)
    how = {"device": "cpu", "dtype": "float32", "batch_size": 1, "prefix_token_id": tok.eos_id}
    return NanophiLM(model, tok), HFLM(pretrained=directory, **how)


def test_likelihoods_are_those_through_transformers(both):
    texts = [("".join(TEXTS),), ("春天来了，小草",), ("好",)]  # the first takes several windows
    pairs = [
        ("感冒多由病毒引起，", "要多喝温水，好好休息"),
        ("月亮本身不发光，", "它反射的是太阳的光。"),
        ("春天来了，小草从土里探出头来，", "孩"),
        ("He said:", " yes"),
        ("", "春天"),
        ("".join(TEXTS), "？"),  # the end of a long context is read
    ]
    for kind, asked in (("loglikelihood_rolling", texts), ("loglikelihood", pairs)):
        ours, theirs = (torch.tensor(ask(lm, kind, *asked)) for lm in both)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_token_across_the_border_is_no_error(both):
    """The harness cuts the ids of both texts behind as many as the first has. 月亮本身不发光 is one
    token here, so nothing was left behind 月亮, and its backend ended with an AssertionError.
    """
    ours, theirs = both
    pair = ("月亮", "本身不发光")
    assert theirs._encode_pair(*pair) == (ours.tok.encode("月亮"), [])
    with pytest.raises(AssertionError):
        ask(theirs, "loglikelihood", pair)
    ((logprob, _),) = ask(ours, "loglikelihood", pair)
    assert -math.inf < logprob < 0


def test_answers_are_those_through_transformers_and_stop(both):
    asked = [
        ("春天来了，", {"until": ["。"], "max_gen_toks": 40}),
        ("春天来了，", {"until": ["放风筝", "探出"], "max_gen_toks": 40}),
        ("春天来了，", {"until": "园", "max_gen_toks": 40, "do_sample": False}),
        ("春天来了，", {"until": [], "max_gen_toks": 2}),
        ("".join(TEXTS), {"until": [], "max_gen_toks": 20}),  # too long for the context
    ]
    ours, theirs = (ask(lm, "generate_until", *asked) for lm in both)
    assert ours == theirs
    whole = "小草从土里探出头来，孩子们在公园里放风筝"
    assert ours[:4] == [whole, "小草从土里", whole.split("园")[0], "小草从土里探出头来，"]


# ---- the command


def test_the_command_prints_a_table(tok, tmp_path, capsys):
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.bias[tok.encode("A")[0]] = 100.0
    save(tmp_path / "model", model, tok)
    main(Config(model=str(tmp_path / "model"), tasks=write_task(tmp_path, QUESTIONS, CHOICES)))
    assert "|acc   |↑  | 0.25|" in capsys.readouterr().out
