"""Evaluation: every token is scored once, with as much context as it can have.

Multiple choice is tested with a model whose choice is known.
"""

import csv
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import nanophi
from nanophi.cli import UserError
from nanophi.infer.evaluate import (
    OPTIONS,
    Config,
    as_text,
    main,
    option_logprobs,
    read_subjects,
    score_text,
    windows,
)
from nanophi.tokenizer.bpe import train_bpe
from nanophi.tokenizer.chat import chat_prompt
from nanophi.tokenizer.template import TEMPLATES
from tests.conftest import TEXTS, tiny_model


@given(length=st.integers(0, 200), context=st.integers(2, 40), share=st.floats(0, 1))
def test_windows_score_each_token_once_with_enough_context(length, context, share):
    stride = max(1, round(share * context))
    targets = []
    for start, first, stop in windows(length, context, stride):
        assert stop - 1 - start <= context
        # Inputs before the first target. With stride = context there once were none.
        assert first - start >= max(1, min(first, context - stride))
        targets += range(first, stop)
    assert targets == list(range(1, length))


def test_score_is_that_of_the_plain_model(tok):
    model = tiny_model(max_position_embeddings=64)
    text = TEXTS[0]
    ids = torch.tensor([*tok.encode(text), tok.eos_id])
    assert len(ids) <= 65
    score = score_text(model, tok, text, stride=32)
    logps = model(ids[None])[0, :-1].log_softmax(-1)
    assert score.nats == pytest.approx(-logps.gather(1, ids[1:, None]).sum().item(), rel=1e-5)
    assert score.tokens == len(ids) - 1
    assert score.bytes == len(text.encode()) - len(tok.decode_bytes(ids[:1].tolist()))


def test_score_is_transformers_loss_converted(tok):
    from tests.model.test_phi import hf_twin

    model, text = tiny_model(max_position_embeddings=64), TEXTS[3]
    ids = torch.tensor([[*tok.encode(text), tok.eos_id]])
    assert ids.shape[1] <= 65
    theirs = hf_twin(model)(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
    assert score_text(model, tok, text, stride=64).nats == pytest.approx(theirs, rel=1e-5)


def test_sliding_window_sees_more_than_blocks(tok):
    """With stride = context each block starts without context; a smaller stride gives more."""
    model = tiny_model(max_position_embeddings=16)
    text = TEXTS[0] + TEXTS[2]
    ids = torch.tensor([*tok.encode(text), tok.eos_id])
    by_hand = 0.0
    for start, first, stop in windows(len(ids), 16, 4):
        logps = model(ids[None, start : stop - 1])[0].log_softmax(-1)
        by_hand -= sum(logps[t - 1 - start, ids[t]].item() for t in range(first, stop))
    assert score_text(model, tok, text, stride=4).nats == pytest.approx(by_hand, rel=1e-5)


def write_csv(path, *answers):
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [f"{i},问题{i}是什么,甲,乙,丙,丁,{answer}" for i, answer in enumerate(answers)]
    path.write_text("\n".join(["id,question,A,B,C,D,answer", *rows]) + "\n", encoding="utf-8")


def test_val_takes_examples_from_dev_and_dev_alone_leaves_one_out(tmp_path):
    write_csv(tmp_path / "two/val/law_val.csv", "A", "B")
    write_csv(tmp_path / "two/dev/law_dev.csv", "C")
    (law,) = read_subjects(tmp_path / "two")
    assert (law.name, len(law.questions), len(law.examples), law.left_out) == ("law", 2, 1, False)
    write_csv(tmp_path / "one/dev/agronomy.csv", "A", "B", "C")
    (agronomy,) = read_subjects(tmp_path / "one")
    assert agronomy.left_out
    assert agronomy.examples == agronomy.questions
    with pytest.raises(UserError, match="holds no val/"):
        read_subjects(tmp_path)


def test_the_likeliest_option_is_chosen_and_examples_that_do_not_fit_are_left_out(tok):
    row = {"question": "天空是什么颜色", "A": "红", "B": "蓝", "C": "绿", "D": "黑", "answer": "B"}
    assert as_text(row, True).endswith("答案：B\n\n")
    length = len(tok.encode(as_text(row, False)))
    model = tiny_model(max_position_embeddings=2 * length + 10)
    with torch.no_grad():
        model.lm_head.bias[tok.encode("C")[0]] = 100.0
    for examples, fitting in (([], 0), ([row] * 5, 1)):
        logprobs, shown = option_logprobs(model, tok, row, examples)
        assert (OPTIONS[logprobs.argmax()], shown) == ("C", fitting)


@pytest.mark.parametrize("shots", [0, 2])
def test_option_logprobs_are_those_of_transformers(tok, shots):
    from tests.model.test_phi import hf_twin

    model = tiny_model(max_position_embeddings=512)
    row = {
        "question": "月亮为什么会发光",
        "A": "自己发光",
        "B": "反射太阳的光",
        "C": "不发光",
        "D": "都不对",
        "answer": "B",
    }
    others = [row | {"question": question} for question in ("春天来了吗", "今天是星期几")]
    prompt = "".join(as_text(example, True) for example in reversed(others[:shots])) + as_text(
        row, False
    )
    logits = hf_twin(model)(torch.tensor([tok.encode(prompt)])).logits[0, -1]
    expected = logits.log_softmax(-1)[[tok.encode(option)[0] for option in "ABCD"]]
    found, shown = option_logprobs(model, tok, row, others[:shots])
    assert shown == shots
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("template", TEMPLATES)
def test_in_chat_each_example_is_a_turn_of_the_template(template):
    tok = train_bpe(TEXTS, 420)
    model = tiny_model(max_position_embeddings=512)
    tok.add_tokens(list(TEMPLATES[template].specials), special=True)
    tok.template = template
    row = {"question": "一加一是", "A": "一", "B": "二", "C": "三", "D": "四", "answer": "B"}
    example = row | {"question": "三加一是", "answer": "D"}
    messages = [
        {"role": "user", "content": as_text(example, with_answer=False)},
        {"role": "assistant", "content": "D"},
        {"role": "user", "content": as_text(row, with_answer=False)},
    ]
    ids = torch.tensor([chat_prompt(messages, tok)])
    expected = model(ids)[0, -1].log_softmax(-1)[[tok.encode(option)[0] for option in "ABCD"]]
    found, shown = option_logprobs(model, tok, row, [example], in_chat=True)
    assert shown == 1
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_flags_of_the_template_go_with_choices_in_chat():
    with pytest.raises(UserError, match="--in-chat goes with --choices"):
        main(Config(model="m", data=["x.txt"], in_chat=True))
    with pytest.raises(UserError, match="--template goes with --in-chat"):
        main(Config(model="m", choices="folder", template="chatml"))


def test_answers_that_are_no_option_are_left_out(tmp_path):
    """An empty answer was once taken for a question: "" is in "ABCD"."""
    write_csv(tmp_path / "val/law_val.csv", "A", "", "AB", "E")
    (law,) = read_subjects(tmp_path)
    assert len(law.questions) == 1
    write_csv(tmp_path / "val/law_val.csv", "")
    with pytest.raises(UserError, match="holds no CSV file with a question"):
        read_subjects(tmp_path)
    (tmp_path / "val/law_val.csv").write_bytes("id,问题".encode("gbk"))
    with pytest.raises(UserError, match=r"law_val\.csv is no CSV file in UTF-8"):
        read_subjects(tmp_path)


def test_command_prints_both(tok, tmp_path, capsys):
    model = tiny_model(max_position_embeddings=256)
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.bias.zero_()
        model.lm_head.bias[tok.encode("A")[0]] = 1e-3  # always A
    nanophi.save(tmp_path / "model", model, tok)
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS[:3]), encoding="utf-8")
    write_csv(tmp_path / "ceval/val/law_val.csv", "A", "B", "A", "D")
    data, choices = [str(tmp_path / "texts.txt")], str(tmp_path / "ceval")
    result = main(Config(model=str(tmp_path / "model"), data=data, choices=choices))
    assert result["accuracy"] == 0.5
    assert result["standard_error"] == 0.25
    bits = sum(len(tok.encode(text)) for text in TEXTS[:3]) * math.log2(448)
    spelled = sum(len(tok.decode_bytes(tok.encode(text)[1:])) for text in TEXTS[:3])
    assert result["bits_per_byte"] == pytest.approx(bits / spelled, rel=1e-3)
    printed = capsys.readouterr().out
    assert "2 of 4 right = 50.0%, standard error 25.0%, chance 25.0%" in printed
    with pytest.raises(UserError, match="say what to evaluate"):
        main(Config(model="x"))


def test_bad_weights_give_figures_or_a_message(tok, tmp_path, capsys):
    """With the head times 1,000 the perplexity was an OverflowError: math range error."""
    model = tiny_model(max_position_embeddings=64, spread=0.3)
    with torch.no_grad():
        model.lm_head.weight.mul_(1000)
    nanophi.save(tmp_path / "model", model, tok)
    (tmp_path / "texts.txt").write_text(TEXTS[0], encoding="utf-8")
    main(Config(model=str(tmp_path / "model"), data=[str(tmp_path / "texts.txt")]))
    assert " inf " in capsys.readouterr().out
    with torch.no_grad():
        model.lm_head.weight.fill_(1e38)
    row = {"question": "？", "A": "一", "B": "二", "C": "三", "D": "四", "answer": "B"}
    with pytest.raises(UserError, match="the model gives no probabilities"):
        score_text(model, tok, TEXTS[0], stride=32)
    with pytest.raises(UserError, match="the model gives no probabilities"):
        option_logprobs(model, tok, row, [])


HEAD = "id,question,A,B,C,D,answer\n"
BAD_CSV = {
    "a field beyond the limit": (HEAD + f"1,{'长' * 200_000},甲,乙,丙,丁,A", "is no CSV file"),
    "a lone return": ("id,question\r1,2\r\r,", "lack some of question|is no CSV file"),
    "too few columns": ("id,question,A\n1,问,甲", "lack some of question"),
    "a cell is missing": ("answer,question,A,B,C,D\nA,问,甲,乙", "C, D would be empty"),
    "the answer is missing": (HEAD + "1,问,甲", "holds no CSV file with a question"),
    "empty": ("", "holds no CSV file with a question"),
    "header only": (HEAD, "holds no CSV file with a question"),
    "an open quote": (HEAD + '1,"问,甲,乙,丙,丁,A\n' * 2, "is no CSV file"),
}


@pytest.mark.parametrize(("text", "message"), BAD_CSV.values(), ids=BAD_CSV.keys())
def test_malformed_questions_are_named(text, message, tmp_path):
    """A row with too few cells was asked as "C. None"."""
    csv.field_size_limit(131_072)  # the default, which reading another .csv may have raised
    (tmp_path / "val").mkdir()
    (tmp_path / "val/law_val.csv").write_text(text, encoding="utf-8", newline="")
    with pytest.raises(UserError, match=message):
        read_subjects(tmp_path)


def test_a_folder_named_like_a_file_is_no_subject(tmp_path):
    write_csv(tmp_path / "val/law_val.csv", "A")
    (tmp_path / "val/x.csv").mkdir()
    assert [subject.name for subject in read_subjects(tmp_path)] == ["law"]


def test_all_files_are_looked_at_before_the_model(tmp_path):
    """A second file without a text was named after the first one had been scored. The model does
    not exist, so nothing has begun.
    """
    (tmp_path / "full.txt").write_text(TEXTS[0], encoding="utf-8")
    (tmp_path / "empty.txt").write_text("", encoding="utf-8")
    full, empty = str(tmp_path / "full.txt"), str(tmp_path / "empty.txt")
    with pytest.raises(UserError, match=r"empty\.txt holds no text to score"):
        main(Config(model="none", data=[full, empty]))
    with pytest.raises(UserError, match="holds no val/"):
        main(Config(model="none", data=[full], choices=str(tmp_path)))
