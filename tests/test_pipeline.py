"""The scripts in a row on a tiny text, and the original's way of using what they leave."""

import io
import json
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch

import dpo
import generate
import sft
from nanophi import load
from nanophi.cli import UserError
from nanophi.infer.pairs import similarity
from tests.conftest import ANSWER, QUESTION, SFT, write

ROOT = Path(__file__).resolve().parents[1]
TRANSFORMERS_457 = ROOT / ".venv-457" / "bin" / "python"


def metrics(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def answer(model, **settings) -> str:
    stdout = io.StringIO()
    with redirect_stdout(stdout):
        generate.main(generate.Config(model=str(model), prompt=QUESTION, device="cpu", **settings))
    return stdout.getvalue().removesuffix("\n")


def test_each_stage_learns(house):
    pretraining, fine_tuning, preferences = (
        metrics(house / name) for name in ("pretrain", "sft", "dpo")
    )
    vocab = len(load(house / "pretrain")[1])
    assert pretraining[0]["loss"] == pytest.approx(
        torch.tensor(float(vocab)).log().item(), rel=0.02
    )
    assert pretraining[-1]["loss"] < 4
    assert [line["step"] for line in pretraining if "val_bits_per_byte" in line] == [10, 20, 30]
    assert fine_tuning[-1]["loss"] < 0.2
    assert preferences[0]["loss"] == pytest.approx(0.6931, abs=1e-4)
    assert preferences[-1]["margin"] > 0


def test_the_trained_question_is_answered_as_taught(house):
    assert answer(house / "sft") == ANSWER
    assert similarity(answer(house / "dpo"), ANSWER) > 0.9


def test_checkpoint_directories_are_complete(house):
    for name in ("pretrain", "sft", "dpo"):
        more = {"reference.pt"} if name == "dpo" else set()
        assert {p.name for p in (house / name).iterdir() if p.is_file()} == more | {
            "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
            "tokenizer_config.json", "special_tokens_map.json", "run.json",
            "metrics.jsonl", "train_state.pt",
        }  # fmt: skip
    described = json.loads((house / "sft" / "run.json").read_text())
    assert described["config"]["lr"] == 1e-2
    assert described["versions"]["torch"] == torch.__version__


def test_sampling_and_raw_prompts(house):
    how = {"sampling": {"temperature": 1.0}, "seed": 1}
    assert answer(house / "sft", **how) == answer(house / "sft", **how)
    stdout = io.StringIO()
    with redirect_stdout(stdout):
        generate.main(
            generate.Config(
                model=str(house / "sft"), prompt=f"##提问:\n{QUESTION}\n##回答:\n", raw=True
            )
        )
    assert stdout.getvalue() == ANSWER + "\n"


def test_chat_at_the_terminal(house):
    command = [
        sys.executable,
        str(ROOT / "generate.py"),
        "--model",
        str(house / "sft"),
        "--chat",
        "--device",
        "cpu",
    ]
    done = subprocess.run(
        command,
        input=f"{QUESTION}\n\n{QUESTION}\n/exit\n",
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0
    assert done.stdout.count(ANSWER) == 2


# The calls of the original's README, in its order and with its arguments; {encode} is what version
# 5 renamed.
ORIGINAL_USE = """
import sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

directory, question = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(directory)
model = AutoModelForCausalLM.from_pretrained(directory)
settings = GenerationConfig(
    num_beams=1, do_sample=False, max_length=320, max_new_tokens=256, no_repeat_ngram_size=4,
    eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
)
encoded = tokenizer{encode}(text=f"##提问:\\n{{question}}\\n##回答:\\n")
ids, mask = torch.LongTensor([encoded.input_ids]), torch.LongTensor([encoded.attention_mask])
outputs = model.generate(inputs=ids, attention_mask=mask, generation_config=settings)
answer = outputs[0].cpu().numpy()
print(tokenizer.decode(answer, clean_up_tokenization_spaces=True, skip_special_tokens=True))
"""


def original_use(python, encode, directory) -> str:
    code = ORIGINAL_USE.format(encode=encode)
    done = subprocess.run(
        [python, "-c", code, str(directory), QUESTION], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.removesuffix("\n")


def checkpoints(house):
    """The demo's result where it is there, the tiny one in any case."""
    demo = ROOT / "out" / "demo" / "dpo"
    return [house / "dpo", *([demo] if (demo / "model.safetensors").exists() else [])]


def test_the_originals_snippet_says_what_generate_says(house):
    for directory in checkpoints(house):
        said = original_use(sys.executable, "", directory)
        answered = answer(directory, sampling={"no_repeat_ngram_size": 4})
        assert said == f"##提问:\n{QUESTION}\n##回答:\n" + answered


@pytest.mark.slow
def test_the_originals_snippet_under_transformers_457(house):
    if not TRANSFORMERS_457.exists():
        pytest.skip("needs transformers 4.57 in .venv-457, which `make test-slow` installs")
    for directory in checkpoints(house):
        said = original_use(str(TRANSFORMERS_457), ".encode_plus", directory)
        answered = answer(directory, sampling={"no_repeat_ngram_size": 4})
        assert said == f"##提问:\n{QUESTION}\n##回答:\n" + answered


def test_mistakes_leave_what_is_there(house):
    before = (house / "sft" / "model.safetensors").read_bytes()
    again = sft.Config(
        init_from=str(house / "pretrain"), data=[str(house / "sft.jsonl")], out=str(house / "sft")
    )
    with pytest.raises(UserError, match="holds a run"):
        sft.main(again)
    with pytest.raises(
        UserError, match=r"sft\.jsonl, line 1: a preference pair needs prompt, chosen, rejected"
    ):
        dpo.main(
            dpo.Config(
                init_from=str(house / "sft"),
                data=[str(house / "sft.jsonl")],
                out=str(house / "new"),
            )
        )
    with pytest.raises(UserError, match="give --steps or --epochs"):
        sft.main(sft.Config(**vars(again) | {"steps": 1, "epochs": 1.0, "out": str(house / "new")}))
    with pytest.raises(UserError, match="--context 256 exceeds the 128"):
        sft.main(sft.Config(**vars(again) | {"context": 256, "out": str(house / "new")}))
    with pytest.raises(
        UserError, match="no such file"
    ):  # --overwrite once deleted the old run before it looked
        sft.main(sft.Config(**vars(again) | {"data": ["typo.jsonl"], "overwrite": True}))
    with pytest.raises(UserError, match="overwrite what it starts from"):
        sft.main(sft.Config(**vars(again) | {"init_from": str(house / "sft"), "overwrite": True}))
    with pytest.raises(UserError, match=r"of 3 conversations .* fits in a context of 5 tokens"):
        sft.main(sft.Config(**vars(again) | {"context": 5, "out": str(house / "new")}))
    assert (house / "sft" / "model.safetensors").read_bytes() == before


def test_prompts_beyond_the_context_are_refused(house):
    with pytest.raises(UserError, match="the model was made for 128: shorten it"):
        generate.main(generate.Config(model=str(house / "sft"), prompt="很长" * 200, device="cpu"))


def test_conversations_that_do_not_fit_or_have_no_answer_are_dropped(house, tmp_path, capsys):
    _, tok = load(house / "sft")
    length = len(tok.encode(f"##提问:\n{QUESTION}\n##回答:\n{ANSWER}")) + 1
    rows = [
        write(tmp_path / "rows.jsonl", [SFT[0], {"messages": [{"role": "user", "content": "问"}]}])
    ]
    assert (
        len(sft.pack(rows, tok, length - 1, 1, 0, bos=False)) == 1
    )  # n tokens are n - 1 inputs: it just fits
    assert capsys.readouterr().out.endswith("sft: dropped 1 without an answer, the first: 问\n")
    with pytest.raises(UserError, match="none has an answer and fits"):
        sft.pack(rows, tok, length - 2, 1, 0, bos=False)


def test_bos_is_put_before_conversations_and_pairs(house):
    _, tok = load(house / "sft")
    assert (
        sft.pack([str(house / "sft.jsonl")], tok, 128, 1, 0, bos=True).batch_at(0).ids[0, 0]
        == tok.bos_id
    )
    pair = dpo.read_pairs([str(house / "dpo.jsonl")], tok, 128, bos=True)[0][0]
    assert pair.chosen[0][0] == pair.rejected[0][0] == tok.bos_id
    assert not pair.chosen[1][0]


def test_dpo_in_bf16_starts_at_ln_2_too(house):
    """The reference was once computed in fp32 beside a bf16 policy: the rewards were not zero at
    the start.
    """
    out = house / "dpo-bf16"
    common = {"steps": 2, "batch_pairs": 3, "device": "cpu", "dtype": "bfloat16", "context": 128}
    dpo.main(
        dpo.Config(
            init_from=str(house / "sft"), data=[str(house / "dpo.jsonl")], out=str(out), **common
        )
    )
    first = metrics(out)[0]
    assert first["loss"] == pytest.approx(0.6931, abs=1e-4)
    assert first["margin"] == pytest.approx(0, abs=1e-4)
    assert load(out)[0].lm_head.weight.dtype == torch.float32


def test_the_last_answer_alone_can_be_learned(tok, tmp_path):
    """In a conversation of two turns, the first answer is then a part of the question."""
    turns = [("user", "你好"), ("assistant", "你好！"), ("user", "再见"), ("assistant", "再见！")]
    messages = [{"role": role, "content": content} for role, content in turns]
    data = [write(tmp_path / "rows.jsonl", [{"messages": messages}])]
    learned = {}
    for learn in ("all", "last"):
        batch = sft.pack(data, tok, 128, 1, 0, bos=False, learn=learn).batch_at(0)
        learned[learn] = tok.decode(batch.targets[batch.targets >= 0].tolist())
    assert learned == {"all": "你好！[EOS]再见！[EOS]", "last": "再见！[EOS]"}
