"""The page at the end of `make demo`: out/demo/report.html, one file that needs nothing else.

It shows how the model came about: time and memory of each stage, the losses, one question answered
at several moments of training, the tokenizer's first merges, what of a conversation is learned,
where one head of attention looks, and answers that are right and wrong.

Every sentence stands there in Chinese and in English; the button at the top changes between them.
Each section is a function of this file that returns HTML.
"""

import io
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

import torch

import nanophi
from nanophi.files import write_text
from nanophi.infer.generate import generate
from nanophi.tokenizer.chat import chat_prompt, encode_chat
from nanophi.train.plot import draw_panel, import_pyplot, read_metrics

STYLE = """
body { font: 16px/1.6 system-ui, 'PingFang SC', 'Microsoft YaHei', 'Noto Sans CJK SC', sans-serif;
       max-width: 960px; margin: 0 auto; padding: 24px 16px; color: #1f2328; background: #fff; }
h1 { font-size: 26px; } h2 { font-size: 20px; margin-top: 40px; }
p { max-width: 46em; } .note { color: #59636e; }
table { border-collapse: collapse; display: block; overflow-x: auto; }
td, th { padding: 4px 10px; border-bottom: 1px solid #d1d9e0; text-align: left;
         vertical-align: top; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
.token { padding: 2px 1px; margin: 1px; border-radius: 4px; background: #eef1f4;
         display: inline-block; white-space: pre; }
.learned { background: #aceebb; } .right::before { content: '✓ '; color: #1a7f37; }
.wrong::before { content: '✗ '; color: #cf222e; }
.map td { padding: 0; width: 20px; height: 20px; border: 1px solid #f6f8fa; font-size: 12px; }
.map th { padding: 0 4px; font-size: 12px; font-weight: normal; border: 0; white-space: pre; }
.map th.below { writing-mode: vertical-rl; }
svg { max-width: 100%; height: auto; }
button { float: right; font: inherit; }
body.zh .en, body.en .zh { display: none; }
"""

SCRIPT = """
document.body.className = navigator.language.startsWith('zh') ? 'zh' : 'en';
document.querySelector('button').onclick = () =>
  document.body.className = document.body.className === 'zh' ? 'en' : 'zh';
"""


def both(chinese: str, english: str) -> str:
    """A text in both languages, of which the page shows one."""
    return f'<span class="zh" lang="zh">{chinese}</span><span class="en" lang="en">{english}</span>'


def table(rows: Iterable[Sequence[str]], head: Sequence[str] = (), kind: str = "") -> str:
    """Rows of cells that are HTML already. A cell of digits stands at the right."""
    lines = [f'<table class="{kind}">']
    if head:
        lines.append("<tr>" + "".join(f"<th>{cell}</th>" for cell in head) + "</tr>")
    for row in rows:
        cells = []
        for cell in row:
            is_number = cell.replace(",", "").replace(".", "").isdigit()
            cells.append(f'<td class="number">{cell}</td>' if is_number else f"<td>{cell}</td>")
        lines.append("<tr>" + "".join(cells) + "</tr>")
    return "\n".join([*lines, "</table>"])


def write_report(path: str | Path, title: str, sections: list[tuple[str, str, str]]) -> None:
    """Write the page. sections: (heading, a sentence about it, its content), all HTML."""
    parts = [
        '<!doctype html><html><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f'<title>nanophi</title><style>{STYLE}</style></head><body class="zh">',
        f"<button>中文 / English</button><h1>{title}</h1>",
    ]
    for heading, sentence, content in sections:
        parts.append(f'<h2>{heading}</h2>\n<p class="note">{sentence}</p>\n{content}')
    parts.append(f"<script>{SCRIPT}</script></body></html>")
    write_text(path, "\n".join(parts) + "\n")


# ---- time and losses


def stages(rows: Sequence) -> tuple[str, str, str]:
    """rows: the stages of demo.py, each with name, seconds, peak_gb and key_figure."""
    cells = [
        (escape(row.name), f"{row.seconds:.1f}", f"{row.peak_gb:.2f}", escape(row.key_figure))
        for row in rows
    ]
    total = sum(row.seconds for row in rows)
    peak = max(row.peak_gb for row in rows)
    cells.append((both("合计", "all"), f"{total:.1f}", f"{peak:.2f}", ""))
    head = [
        both("步骤", "stage"),
        both("秒", "seconds"),
        both("内存峰值 GB", "peak GB"),
        both("结果", "result"),
    ]
    return (
        both("时间与内存", "Time and memory"),
        both("从原始文本到会聊天的模型，每一步用了多久。", "From raw text to a model that chats."),
        table(cells, head),
    )


def losses(panels: dict[str, str]) -> tuple[str, str, str]:
    """panels: title -> run directory. The curves as one SVG inside of the page."""
    pyplot = import_pyplot()
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(4.6 * len(panels), 3.6), squeeze=False, layout="constrained"
    )
    for axis, (title, run) in zip(axes[0], panels.items(), strict=True):
        draw_panel(axis, title, [run], None)
    drawn = io.StringIO()
    figure.savefig(drawn, format="svg")
    pyplot.close(figure)
    svg = drawn.getvalue()
    return (
        both("损失曲线", "Losses"),
        both(
            "预训练的损失在每一轮开头下一个台阶：同样的文档又读了一遍。DPO 的两个奖励可以一起下降，"
            "要看的是它们的差。",
            "Pretraining falls by a stair where an epoch begins: the same documents are read "
            "again. In DPO both rewards may fall; their difference counts.",
        ),
        svg[svg.index("<svg") :],
    )


# ---- one question, several moments


def samples_of(run: str, question: str, before: str) -> list[tuple[int, str]]:
    """(step, answer) at each evaluation of a run trained with `--sample`.

    Step 0 is what the model in `before` answers, from which the run began.
    """
    told = [(line["step"], line["sample"]) for line in read_metrics(run) if "sample" in line]
    return [(0, answer_of(before, question)), *told]


def answer_of(directory: str, question: str) -> str:
    """The greedy answer of a model, at most 60 tokens of it."""
    model, tok = nanophi.load(directory)
    ids = generate(model, chat_prompt(question, tok), 60)
    return tok.decode(ids, skip_special_tokens=True)


def moments(question: str, samples: list[tuple[int, str]], last: str) -> tuple[str, str, str]:
    """One question, what was answered while the model learned (`samples_of`), and at last."""
    rows = [(f"SFT, {step:,}", escape(text.replace("\n", "⏎"))) for step, text in samples]
    rows.append(("DPO", escape(last)))
    return (
        both("看着它学会", "Watch it learn"),
        both(
            f"同一个问题，训练中问了好几次：{escape(question)}",
            f"One question, asked again and again: {escape(question)}",
        ),
        table(rows, [both("训练到第几步", "step"), both("回答", "answer")]),
    )


# ---- tokenizer and mask


def tokenizer(tok: nanophi.Tokenizer, text: str) -> tuple[str, str, str]:
    """The first merges, the longest tokens, and `text` in tokens."""
    merges = []
    for pair in tok.merge_list[:8]:
        left, right = (escape(tok.piece(part)) for part in pair)
        merged = escape(tok.piece(tok.merges[pair][1]))
        merges.append((str(len(merges) + 1), f"{left} + {right}", merged))
    merged_tokens = [tok.piece(merged) for _, merged in tok.merges.values()]
    words = [token for token in merged_tokens if not token.startswith("<")]
    longest = sorted(words, key=len, reverse=True)[:12]
    pieces = [shown_token(piece) for piece in tok.pieces(text)]
    content = [
        table(merges, [both("第几次合并", "merge"), both("哪两个", "of"), both("得到", "gives")]),
        f"<p>{both('最长的 token：', 'The longest tokens: ')}",
        f"{' '.join(shown_token(each) for each in longest)}</p>",
        f"<p>{''.join(pieces)}</p>",
    ]
    return (
        both("分词器", "Tokenizer"),
        both(
            "BPE 从字节开始，一次次合并最常相邻的两个 token。最先合并出来的是汉字和标点的前半截："
            "许多字共用开头的字节。",
            "BPE begins with bytes and merges the two tokens that most often stand side by side. "
            "Its first merges are beginnings of characters, which many of them share.",
        ),
        "\n".join(content),
    )


def shown_token(text: str, kind: str = "") -> str:
    return f'<span class="token {kind}">{escape(text)}</span>'


def mask(conversation: list[dict], tok: nanophi.Tokenizer) -> tuple[str, str, str]:
    """A conversation token by token; what is learned is green."""
    ids, is_learned = encode_chat(conversation, tok)
    tokens = []
    for token_id, learned in zip(ids, is_learned, strict=True):
        shown = tok.piece(token_id).replace("\n", "⏎")
        tokens.append(shown_token(shown, "learned" if learned else ""))
    return (
        both("SFT 学哪些 token", "What SFT learns"),
        both(
            "一段对话里，只有绿色的 token（回答和它的 [EOS]）计入损失。",
            "Of a conversation only the green tokens count in the loss: the answer and its [EOS].",
        ),
        f"<p>{''.join(tokens)}</p>",
    )


# ---- attention


@torch.no_grad()
def attention(model: nanophi.Phi, tok: nanophi.Tokenizer, question: str) -> tuple[str, str, str]:
    """Where one head looks: the one that looks farthest back, of all layers."""
    ids = chat_prompt(question, tok)
    record = nanophi.Record()
    model(torch.tensor([ids], device=model.device), record=record)
    weights = torch.stack([layer[0] for layer in record.attention]).cpu()  # (L, H, T, T)
    layer, head = farthest_head(weights)
    pieces = [tok.piece(i).replace("\n", "⏎") for i in ids]
    lines = ['<table class="map">']
    for piece, row in zip(pieces, weights[layer, head].tolist(), strict=True):
        cells = "".join(
            f'<td style="background: rgba(31, 111, 235, {weight:.2f})" title="{weight:.2f}"></td>'
            for weight in row
        )
        lines.append(f"<tr><th>{escape(piece)}</th>{cells}</tr>")
    below = "".join(f'<th class="below">{escape(piece)}</th>' for piece in pieces)
    lines.append(f"<tr><th></th>{below}</tr></table>")
    return (
        both("注意力", "Attention"),
        both(
            f"第 {layer + 1} 层第 {head + 1} 个头：每一行的 token 从哪些 token 那里取信息。"
            "颜色越深，权重越大；右上角是空的，因为谁也看不见后面。",
            f"Layer {layer + 1}, head {head + 1}: from which tokens the token of each row takes "
            "what it needs. The upper right is empty, as no token sees what comes later.",
        ),
        "\n".join(lines),
    )


def farthest_head(weights: torch.Tensor) -> tuple[int, int]:
    """(layer, head) with the largest mean distance between a token and what it looks at.

    weights (L, H, T, T); what goes to the first token does not count, as heads with nothing to do
    look there.
    """
    time = weights.shape[-1]
    places = torch.arange(time)
    distance = (places[:, None] - places).clamp(min=0).float()
    distance[:, 0] = 0
    mean = (weights * distance).sum(-1).mean(-1)  # (L, H)
    layer, head = divmod(int(mean.argmax()), weights.shape[1])
    return layer, head


# ---- answers


def answers(asked: Sequence) -> tuple[str, str, str]:
    """asked: answers of demo.py to questions in other words, with question, text, as_taught."""
    rows = []
    for answer in asked:
        kind = "right" if answer.as_taught else "wrong"
        text = f'<span class="{kind}">{escape(answer.text)}</span>'
        rows.append((escape(answer.question), text))
    count = sum(answer.as_taught for answer in asked)
    return (
        both("换一种问法", "Asked in other words"),
        both(
            f"这些问法没有教过，{len(asked)} 个里答对 {count} 个。模型只知道教过的事，别的会编。",
            f"It was never asked in these words: {count} of {len(asked)} are right. It knows what "
            "it was taught and makes up the rest.",
        ),
        table(rows, [both("问题", "question"), both("回答", "answer")]),
    )


def reading(asked: Sequence) -> tuple[str, str, str]:
    """asked: answers of demo.py from texts, with question, sentence, text and is_right."""
    rows = []
    for answer in asked:
        kind = "right" if answer.is_right else "wrong"
        text = f'<span class="{kind}">{escape(answer.text)}</span>'
        rows.append((escape(answer.question), escape(answer.sentence), text))
    count = sum(answer.is_right for answer in asked)
    return (
        both("从文本里回答", "Answers from texts"),
        both(
            f"先搜索出一句话，再由模型回答。这些文本它没见过，{len(asked)} 个问题答对 {count} 个。",
            f"A search finds a sentence, and the model answers from it. It has never seen these "
            f"texts: {count} of {len(asked)} are right.",
        ),
        table(
            rows,
            [both("问题", "question"), both("找到的句子", "found"), both("回答", "answer")],
        ),
    )
