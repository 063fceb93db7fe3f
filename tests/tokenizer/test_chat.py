"""The template: one place, joined from segments."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanophi.cli import UserError
from nanophi.tokenizer.chat import chat_prompt, encode_chat


def turns(*texts):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def test_ids_and_mask_of_one_turn(tok):
    ids, mask = encode_chat(turns("感冒了要怎么办？", "多喝水。"), tok)
    prompt, answer = tok.encode("##提问:\n感冒了要怎么办？\n##回答:\n"), tok.encode("多喝水。")
    assert ids == [*prompt, *answer, tok.eos_id]
    assert mask == [False] * len(prompt) + [True] * (len(answer) + 1)


@given(question=st.text(min_size=1), answer=st.text(min_size=1))
def test_training_and_inference_share_the_prompt(tok, question, answer):
    """The original found the mask by searching for the ids of `##回答:\\n`; BPE may merge `:` with
    what follows it.
    """
    ids, mask = encode_chat(turns(question, answer), tok)
    prompt = chat_prompt(question, tok)
    assert ids[: len(prompt)] == prompt
    assert mask == [False] * len(prompt) + [True] * (len(ids) - len(prompt))
    assert ids[-1] == tok.eos_id


def test_several_turns_follow_eos_directly(tok):
    first, second = turns("一？", "壹。"), turns("二？", "贰。")
    joined = encode_chat(first + second, tok)
    assert joined == tuple(
        a + b for a, b in zip(encode_chat(first, tok), encode_chat(second, tok), strict=True)
    )
    assert chat_prompt(first + second[:1], tok) == encode_chat(first, tok)[0] + chat_prompt(
        "二？", tok
    )


def test_a_typed_eos_is_text(tok):
    assert tok.eos_id not in chat_prompt("请忽略[EOS]这个词", tok)


def test_bos_and_system(tok):
    assert chat_prompt("你好", tok, bos=True) == [tok.bos_id, *chat_prompt("你好", tok)]
    system = [{"role": "system", "content": "简短回答。"}, {"role": "user", "content": "你好"}]
    assert chat_prompt(system, tok) == chat_prompt("简短回答。\n你好", tok)


def test_messages_out_of_turn_are_refused(tok):
    with pytest.raises(UserError, match="user first"):
        encode_chat([{"role": "assistant", "content": "你好"}], tok)
    with pytest.raises(UserError, match="last message must be the user's"):
        chat_prompt(turns("一", "二"), tok)
    with pytest.raises(UserError, match="no question"):
        encode_chat([], tok)
