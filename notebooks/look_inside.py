# %% [markdown]
# # 看模型内部 · Looking inside
#
# 语言模型的每一个中间结果都是普通的张量，拿出来看就是了。
# 这里看的是 `examples/small.py` 的小模型：46 万参数，四层，每层四个头，
# 只学过 24 篇文档和 16 段对话。它背得出这 16 段回答；至于它内部有没有“知识”，
# 请看完数字再下结论。
#
# *Everything a model computes is a tensor, and one can look at it. The model is the small one of
# examples/small.py: 0.46 million parameters, 24 documents, 16 conversations. The first run trains
# it, in half a minute. It works offline, on a CPU.*

# %%
import math
import sys
from collections import Counter
from pathlib import Path

import torch

import nanophi

sys.path.insert(0, str(Path(nanophi.__file__).parents[1]))  # the repository
from examples import small
from nanophi.infer.sampling import FILTERS, Sampling
from notebooks.show import plot, show_tokens

tok = small.tokenizer()
model = small.model("sft").requires_grad_(False)
ids, mask = nanophi.encode_chat(small.conversations()[0], tok)
pieces = [tok.piece(token) for token in ids]
begin = mask.index(True)  # where the answer begins
record = nanophi.Record()
logits = model(torch.tensor([ids]), record=record)[0]
show_tokens(pieces, mask)

# %% [markdown]
# ## 1. 每个头的注意力 · The attention of every head
#
# 横轴是被看的 token，纵轴是在看的 token。权重乘以看得见的个数：1 就是“平均地看”，越深看得越多。
# 每个头打印两个数：看得有多散（exp 熵除以看得见的个数，1 是平均地看），最大的比值。
# 小模型的头大多还很散：训练太短，还没有分工。
#
# *Each weight is multiplied by the number of visible
# tokens: 1 is what equal weights give. Printed for each head: how evenly it looks (exp of the
# entropy by the number of visible tokens, 1 is evenly),
# and its largest ratio. Most heads of this model still look rather evenly.*

# %%
seen = torch.arange(1, len(ids) + 1)[:, None]
maps = torch.stack(record.attention)[:, 0]  # (L, H, T, T)


def grid(figure):
    axes = figure.subplots(*maps.shape[:2], sharex=True, sharey=True)
    for layer, row in enumerate(axes):
        for head, each in enumerate(row):
            ratios = (maps[layer, head] * seen).tolist()
            each.imshow(ratios, cmap="Blues", vmin=0, vmax=4)
            each.set_title(f"layer {layer + 1}, head {head + 1}", fontsize=8)


entropy = -torch.xlogy(maps, maps).sum(-1)
evenness = (entropy.exp() / seen[:, 0]).mean(-1)  # (L, H)
largest = (maps * seen).amax((-2, -1))
for layer, rows in enumerate(zip(evenness, largest, strict=True), start=1):
    heads = [f"{even:.2f} {most:5.1f}" for even, most in zip(*rows, strict=True)]
    print(f"layer {layer}:  ", "    ".join(heads))
plot(grid, "(the picture needs matplotlib, and a notebook)", size=(9, 9))

# %% [markdown]
# 一个头在一个位置上看什么。改 `layer`、`head`、`place`（都从 0 数起：0 就是上面的 layer 1），
# 找一个你说得清它在做什么的头；找不到也是结果。
#
# *What one head looks at from one place. `layer` and `head` count from 0, which is layer 1 above.
# Is there a head whose work you can name? Often there is not.*

# %%
layer, head, place = 0, 0, begin + 2
weights = maps[layer, head, place, : place + 1]
print(f"from {pieces[place]}:")
show_tokens(pieces[: place + 1], (weights / weights.max()).tolist())

# %% [markdown]
# ## 2. 每一层之后会说什么 · The logit lens
#
# 把每一层之后的向量直接送进最后的归一化和输出层，看正确的下一个 token 有多大概率。
# 第 0 行是查表之后、一层都没有过的向量。
#
# *The last norm and the head read the stream after each block: how likely is the right next token
# already? Line 0 is the embedding, before any block (nostalgebraist 2020).*

# %%
shown = slice(begin, begin + 16)
right = torch.tensor(ids[1:])[:, None]
for layer, stream in enumerate(record.hidden):
    shares = model.lm_head(model.model.final_layernorm(stream))[0, :-1].softmax(-1)
    own = [1.0, *shares.gather(1, right)[:, 0].tolist()]  # nothing predicts the first
    print("layer", layer)
    show_tokens(pieces[shown], own[shown])

# %% [markdown]
# ## 3. 谁和“月亮”最近 · The neighbours of a token
#
# 余弦相似度，只比常见的 token。括号里是它在训练文本里出现的次数。先看没有训练过的模型，
# 再看训练过的：很少出现的词，邻居看不出道理；出现几百次的逗号，在**输出层**里同句号靠在了一起。
# 大模型的“词义相近、向量也近”，是大量文本换来的，不是这种结构白送的。
#
# *Cosine similarity, among frequent tokens. The neighbours of a token that was hardly ever
# seen make no sense, trained or not. The comma, seen hundreds of times, comes near the full stop
# in the head (output), less so in the embedding (input). Near vectors for near meanings take much
# text.*

# %%
counts = Counter(token for text in small.documents() for token in tok.encode(text))
common = [token for token, count in counts.items() if count >= 8]


def neighbours(weight, text):
    (token,) = tok.encode(text)  # one token
    likeness = torch.cosine_similarity(weight[common], weight[token][None])
    best = likeness.topk(6)
    found = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    near = [f"{tok.piece(common[i])!r} {p:.2f}" for i, p in found if common[i] != token]
    return f"{text} ({counts[token]})  " + "  ".join(near[:5])


networks = {"untrained": small.untrained(), "trained": small.model("pretrain")}
for name, each in networks.items():
    for part, layer in (("embedding", each.model.embed_tokens), ("head", each.lm_head)):
        print(name, part)
        for text in ("月亮", "，"):
            print("   ", neighbours(layer.weight.detach(), text))

# %% [markdown]
# ## 4. 每个 token 的损失 · The loss of each token
#
# 颜色越深，模型越意外（1 相当于完全乱猜，ln V）。第一段它学过，第二段没有。
# 把 `mine` 换成你写的一句话。
#
# *The darker, the more surprised; 1.00 is ln V, a blind guess. The first text was learned, the
# second was not. Put your own text in place of the second.*

# %%
reader = small.model("pretrain").requires_grad_(False)
mine = "今天的月亮又大又圆，我们坐在院子里吃西瓜。"
for text in (small.documents()[0][:40], mine):
    read = tok.encode(text)
    scores = reader(torch.tensor([read]))[0, :-1].log_softmax(-1)
    losses = -scores.gather(1, torch.tensor(read[1:])[:, None])[:, 0]
    surprise = (losses / math.log(len(tok))).clamp(max=1)
    show_tokens(tok.pieces(text), [0.0, *surprise.tolist()])
    spelled = sum(tok.byte_lengths()[token] for token in read[1:])
    bits = losses.sum() / math.log(2) / spelled
    print(f"{losses.mean():.2f} nats a token, {bits:.2f} bits a byte")

# %% [markdown]
# ## 5. 服务器的显微镜 · The microscope of the server
#
# `python generate.py --model out/demo/dpo --serve` 打开的网页上，点一个 token 就看见：
# 当时还想过哪些 token，每一个采样过滤器又把它们的概率变成了多少。算的就是下面这几行。
#
# *On the server's page, a click on a token shows what else the model thought of, and what each
# sampling filter made of it. It computes what these lines compute.*

# %%
how = Sampling(temperature=0.7, top_k=5, top_p=0.9)
place = begin + 2
scores = logits[place - 1 : place]  # they predict the token at `place`
columns = {"model": scores.softmax(-1)[0]}
for name, value in how.chosen.items():
    scores = FILTERS[name].apply(scores, [ids[:place]], value)
    columns[f"{name} {value}"] = scores.softmax(-1)[0]
print(f"behind {''.join(pieces[begin:place])}:", " -> ".join(columns))
for token in columns["model"].topk(8).indices.tolist():
    print("  ".join(f"{p[token]:.3f}" for p in columns.values()), "", tok.piece(token))

# %% [markdown]
# ## 6. 答案在哪一层 · Which layer knows the answer?
#
# 两种问法，答案不一样。**读**：只看到第几层为止，就能读出正确的下一个 token？**拆**：
# 把一层的注意力或 MLP 换成 0，损失涨多少？前者说信息何时*读得出*，后者说模型*用没用*这一部分。
# 最后一层之后读得最准，拆掉它却伤得最轻；第一层之后还读不全，拆掉它伤得最重。
# （后面的层从没见过 0，这样拆也许会夸大损失。换成平均输出更公平：差多少，见“试一试”。）
# 所以“知识存在某一层”这句话，先要问是怎么量的。
#
# *Two questions with two answers. Read: after how many layers can the right token be read off?
# Remove: what does the loss become when one part gives zeros? Behind the last layer one reads
# best, and it is missed least; behind the first one reads far from all, and it is missed most. So
# ask how it was measured before you believe that knowledge lies in a layer. (No later layer has
# ever met zeros, which may exaggerate. The mean output in place of 0 is a fairer test: "To try"
# shows how much it changes.)*

# %%
data = small.packed_conversations()
batches = list(data.in_order())


def answer_loss():
    results = [nanophi.next_token_loss(model, batch) for batch in batches]
    return sum(r[0].item() for r in results) / sum(r[1] for r in results)


def zeros(module, inputs, output):
    return torch.zeros_like(output)


hits, learned = Counter(), 0
for batch in batches:
    record = nanophi.Record()
    model(batch.ids, batch.cu_seqlens, record=record)
    targets = batch.targets.flatten()[batch.learned]
    learned += len(targets)
    for layer, stream in enumerate(record.hidden):
        states = model.model.final_layernorm(stream).flatten(0, 1)[batch.learned]
        hits[layer] += int((model.lm_head(states).argmax(-1) == targets).sum())
for layer, count in hits.items():
    print(f"read after {layer} layers: {count / learned:.0%} of the answers' tokens")

print(f"loss of the whole model: {answer_loss():.2f}")
for number, block in enumerate(model.model.layers, start=1):
    for name, part in (("attention", block.self_attn), ("MLP", block.mlp)):
        hook = part.register_forward_hook(zeros)
        print(f"without {name} of layer {number}: {answer_loss():.2f}")
        hook.remove()

# %% [markdown]
# ## 试一试 · To try
#
# 1. 第 6 节的 `zeros` 换成“返回这一部分输出的平均值”（`output.mean((0, 1), keepdim=True)`），
#    损失变小了吗？次序变了吗？
# 2. 第 2 节换成 `small.model("pretrain")`：没有学过对话的模型，读得出回答的哪些 token？
# 3. 一次拆掉一个头：在 `block.self_attn.dense` 的输入上把那个头的 16 维置零
#    （`register_forward_pre_hook`）。有没有拆掉反而更好的头？
#
# *1. The mean of the outputs in place of zeros: are the losses lower, and does the order change?
# 2. The lens on small.model("pretrain"). 3. Remove one head: zero its 16 dimensions in the input of
# block.self_attn.dense, with a forward pre-hook. Is there a head without which the loss is lower?*
