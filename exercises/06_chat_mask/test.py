import functools

import nanophi
from nanophi.tokenizer.chat import segments
from nanophi.tokenizer.template import Segment

END = Segment("[EOS]", learned=True, special=True)
# Two exchanges; the second question holds what looks like a part of the template.
MESSAGES = [
    {"role": "user", "content": "你是谁？"},
    {"role": "assistant", "content": "我是一个小助手。"},
    {"role": "user", "content": "“##回答:”和 [EOS] 是什么意思？"},
    {"role": "assistant", "content": "是对话的格式。"},
]


@functools.cache
def tokenizer():
    """It has a token for ：“, because its texts often go on so."""
    return nanophi.train_bpe(["他说：“好。”她说：“不好。”我是谁？"] * 5, vocab_size=300)


def test_ids_and_mask_are_those_of_the_library(mine):
    ids, mask = mine.encode_segments(segments(MESSAGES), tokenizer())
    assert len(ids) == len(mask), f"{len(ids)} ids and {len(mask)} entries of the mask"
    expected, expected_mask = nanophi.encode_chat(MESSAGES, tokenizer())
    agree("ids", list(ids), expected)
    assert list(map(bool, mask)) == expected_mask, (
        f"learned is {learned(expected, expected_mask)!r}, with your mask {learned(ids, mask)!r}"
    )


def test_an_answer_that_would_merge_with_the_question(mine):
    """In one text, ： and “ are one token: half question and half answer."""
    tok = tokenizer()
    joined = [tok.decode([i]) for i in tok.encode("你说：“好。”")]
    assert any("：“" in token for token in joined), f"this test is of no use: {joined}"
    ids, mask = mine.encode_segments([Segment("你说："), Segment("“好。”", learned=True), END], tok)
    assert learned(ids, mask) == "“好。”[EOS]", (
        f"learned is {'“好。”[EOS]'!r}, with your mask {learned(ids, mask)!r}: "
        "encode each segment by itself"
    )
    asked = tok.decode([i for i, is_learned in zip(ids, mask, strict=True) if not is_learned])
    assert asked == "你说：", f"not learned is '你说：', with your mask {asked!r}"


def test_who_types_a_special_token_gets_its_characters(mine):
    tok = tokenizer()
    ids, _ = mine.encode_segments([Segment("[EOS]是什么？"), Segment("好", learned=True), END], tok)
    count = list(ids).count(tok.eos_id)
    assert count == 1, f"only the last segment is the end of an answer; {count} ids are [EOS]"
    assert ids[-1] == tok.eos_id, f"the last id is {tok.eos_id}, [EOS]; yours is {ids[-1]}"


def test_the_target_is_the_next_token(mine):
    inputs, targets = mine.inputs_and_targets([5, 6, 9, 1], [False, False, True, True])
    assert list(inputs) == [5, 6, 9], f"the inputs are [5, 6, 9]; {list(inputs)} came"
    assert list(targets) == [-100, 9, 1], (
        f"6 shall be followed by 9, and 9 by 1: targets [-100, 9, 1]; {list(targets)} came"
    )


def test_targets_are_those_of_a_packed_row(mine):
    ids, mask = nanophi.encode_chat(MESSAGES, tokenizer())
    inputs, targets = mine.inputs_and_targets(ids, mask)
    packed = nanophi.Packed([ids], context=len(ids) - 1, batch_rows=1, seed=0, masks=[mask])
    batch = packed.batch_at(0)
    for name, found, row in (("inputs", inputs, batch.ids), ("targets", targets, batch.targets)):
        agree(name, list(found), row[0].tolist())


def agree(name, found, expected):
    """Where they differ first."""
    same = 0
    while same < len(expected) and found[same : same + 1] == expected[same : same + 1]:
        same += 1
    assert found == expected, (
        f"{name}: after {same} equal ones expected {expected[same : same + 5]}, "
        f"{found[same : same + 5]} came, of {len(expected)} and {len(found)} in all"
    )


def learned(ids, mask):
    """The text that is learned."""
    assert len(ids) == len(mask), (
        f"{len(ids)} ids and {len(mask)} entries of the mask: one for each id, not for each segment"
    )
    return tokenizer().decode([i for i, is_learned in zip(ids, mask, strict=True) if is_learned])
