# %% [markdown]
# # 一句话的旅程：从原始文本到回答
#
# 这份 notebook 把语言模型的每一步都动手做一遍：清洗、分词、打包、预训练、微调、对齐、采样。
# 全程跟着一句话走：
#
# **月亮为什么有时圆，有时弯？**
#
# 用的是一个 46 万参数的小模型，只学过 24 篇文档和 16 段对话。它小到可以随便拆开，也小到只会背诵：
# 它答得出学过的问题，不要拿它当真的助手。不需要 GPU，不需要联网；第一次运行要先训练它，
# 大约半分钟，结果留在当前目录的 `out/small`。
#
# 每一格都很短。先猜会打印什么，再运行；然后照着“试一试”改一个数，看猜得对不对。

# %%
import math
import sys
from itertools import pairwise
from pathlib import Path

import torch

import nanophi

sys.path.insert(0, str(Path(nanophi.__file__).parents[1]))  # the repository
from examples import small
from examples.loop import train
from nanophi.model.attention import same_document
from nanophi.text.clean import Report, clean
from nanophi.tokenizer.bpe import merge_pair
from notebooks.show import plot, show_tokens, vary

tok = small.tokenizer()
model = small.model("sft")
print(tok)
print(f"{model.num_parameters():,} 个参数")

# %% [markdown]
# ## 1. 清洗
#
# 网页上的文本带着标签、繁体字、半角标点。清洗就是一串小规则，反复执行，直到什么都不再变。
#
# *试一试：把 `raw` 换成你在网上复制的一段话。哪条规则没有起作用？*

# %%
raw = "<p>月亮為什麼有時圓,有時彎?</p>"
report = Report()
text = clean(raw, final=False, report=report)  # a question gets no full stop
for rule, (before, after) in report.sample.items():
    print(f"{rule:12} {before!r}  ->  {after!r}")  # \n is a line break
print(text == small.QUESTION, text)

# %% [markdown]
# ## 2. 学会合并（BPE）
#
# 分词器从 256 个字节出发，每次把语料里最常见的相邻一对合成一个新 token。
# 下面是它最先学会的几次合并，以及合并时这一对出现了多少次。一个汉字是三个字节，
# 所以最先出现的都是“半个字”：标点和常用字开头的字节。
#
# *试一试：把 `first` 改成 700。这时学会的大多是什么？为什么有的还是半个字，甚至一个半字？*

# %%
first = 0
for rank in range(first, first + 12):
    left, right = tok.merge_list[rank]
    new = tok.merges[left, right][1]
    parts = f"{tok.piece(left)} + {tok.piece(right)} -> {tok.piece(new)}"
    print(f"{rank:4}  {parts}  ({tok.merge_counts[rank]} 次)")

# %% [markdown]
# 给新文本分词，就是按学会的先后重放这些合并：每一步都在当前的相邻对里，选最早学会的那一对。
# 看“为什么”怎样从 9 个字节变成一个 token：
#
# *试一试：换成“月亮”、“为什”、“🌙”。哪些停在半路？*

# %%
word = "为什么"
byte_ids = {raw: token for token, raw in tok.id_to_bytes.items() if len(raw) == 1}
ids = [byte_ids[bytes([byte])] for byte in word.encode()]
print(" ".join(map(tok.piece, ids)))
while known := [pair for pair in pairwise(ids) if pair in tok.merges]:
    best = min(known, key=lambda pair: tok.merges[pair][0])
    rank, new = tok.merges[best]
    ids = merge_pair(ids, best, new)
    print(" ".join(map(tok.piece, ids)), f"  <- 第 {rank} 条")
print(ids == tok.encode(word))

# %% [markdown]
# 整句话的 token。一种颜色一个 token；模型看见的只是下面那行编号。
#
# *试一试：写一句语料里不会有的话，比如你的名字。一个字要用几个 token？*

# %%
show_tokens(tok.pieces(small.QUESTION))
print(tok.encode(small.QUESTION))

# %% [markdown]
# ## 3. 打包
#
# 文档有长有短，一行的长度却是固定的。把几篇文档放进同一行，用 `cu_seqlens` 记下边界，
# 就不必用填充补齐每一篇。目标是右移一位的输入，文档之间不许互相看见。掩码里，
# x 表示这一行的 token 看得见那一列的 token。
#
# *试一试：把 `context` 改成 8 或 16。文档被切开了吗？边界变成了几个？*

# %%
texts = [small.QUESTION, "今天下雨。", "你好！"]
documents = [[*tok.encode(text), tok.eos_id] for text in texts]
packed = nanophi.Packed(documents, context=20, batch_rows=1, seed=0)
batch = packed.batch_at(0)
print(packed)
for row in (batch.ids[0], batch.targets[0]):  # a target of -100 is none
    show_tokens([tok.piece(token) if token >= 0 else "·" for token in row.tolist()])
print("边界", batch.cu_seqlens.tolist())
for row in same_document(batch.cu_seqlens, *batch.ids.shape)[0, 0].tolist():
    print(" ".join("x" if visible else "." for visible in row))

# %% [markdown]
# ## 4. 模型里的形状
#
# 问句套进对话模板，变成一行 token。每个 token 先查表得到一个向量，再经过四层，
# 最后在词表的每一个 token 上得到一个分数。
#
# *试一试：`[0, -1]` 是最后一个位置的分数。换成 `[0, 3]`，它在预测哪个 token？*

# %%
prompt = nanophi.chat_prompt(small.QUESTION, tok)
record = nanophi.Record()
with torch.no_grad():
    logits = model(torch.tensor([prompt]), record=record)
print("token      (1, T)      ", (1, len(prompt)))
print("查表以后   (1, T, D)   ", tuple(record.hidden[0].shape))
print("每层之后   (1, T, D)   ", tuple(record.hidden[-1].shape))
print("注意力     (1, H, T, T)", tuple(record.attention[0].shape))
print("分数       (1, T, V)   ", tuple(logits.shape))
print("下一个 token：", tok.piece(int(logits[0, -1].argmax())))

# %% [markdown]
# ## 5. 训练之前
#
# 没有训练过的模型什么都不知道，只能对每个 token 一视同仁：概率约为 1/V，损失约为 ln V。
# 初始损失如果离 ln V 很远，多半是哪里写错了。
#
# *试一试：初始化的标准差默认是 0.02。在 `PhiConfig` 里写 `initializer_range=1.0`，
# 初始损失会是多少？为什么？*

# %%
cfg = nanophi.PhiConfig(
    vocab_size=2048,
    hidden_size=64,
    num_attention_heads=4,
    num_hidden_layers=2,
    intermediate_size=256,
    max_position_embeddings=256,
)
torch.manual_seed(0)
tiny = nanophi.Phi(cfg)
tiny.set_vocabulary(len(tok))
documents = [[*tok.encode(text), tok.eos_id] for text in small.documents()]
data = nanophi.Packed(documents, context=128, batch_rows=4, seed=0)
with torch.no_grad():
    loss, count, _ = nanophi.next_token_loss(tiny, data.batch_at(0))
print(f"损失 {loss / count:.3f}，ln {len(tok)} = {math.log(len(tok)):.3f}")

# %% [markdown]
# ## 6. 训练 40 步
#
# 训练循环在 `examples/loop.py`，二十几行：取一个批次，求损失，求梯度，更新。先猜：
# 40 步之后它会先学到什么？
#
# *试一试：把 `lr` 改成 0.1，再改成 0.001。再运行之前，要先重新运行上一格：
# 不然训练的是已经训练过的模型。*

# %%
losses = train(tiny, data, steps=40, lr=1e-2)


def curve(figure):
    axes = figure.subplots()
    axes.plot(losses)
    axes.axhline(math.log(len(tok)), color="grey", linestyle="--", label="ln V")
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.legend()


plot(curve, f"损失：{losses[0]:.2f} -> {losses[19]:.2f} -> {losses[-1]:.2f}")
print("月亮" + tok.decode(nanophi.generate(tiny, tok.encode("月亮"), max_new_tokens=16)))

# %% [markdown]
# 它先学到的是最常见的 token：逗号、句号、“一”、“的”。词与词的关系要晚得多。40 步、24 篇文档，
# 离“会说话”还很远。
#
# ## 7. 监督微调（SFT）：只学回答
#
# 一段对话也是一行 token，但问题只读不学：损失只算在回答和结束符上。颜色深的是要学的。
#
# *试一试：如果问题也学，会有什么坏处？（想想模型在推理时会不会自己提问。）*

# %%
ids, mask = nanophi.encode_chat(small.conversations()[0], tok)
show_tokens([tok.piece(token) for token in ids], mask)
print(f"{len(ids)} 个 token，学其中 {sum(mask)} 个")

# %% [markdown]
# 微调前后，同一个问题的回答：

# %%
for stage in ("pretrain", "sft"):
    answer = nanophi.generate(small.model(stage), prompt, max_new_tokens=80)
    text = tok.decode(answer, skip_special_tokens=True)
    print(f"{stage:9}", " ".join(text.split())[:80])

# %% [markdown]
# 微调后的回答是背下来的：16 段对话里第一段就是它。换个说法问呢？
#
# *试一试：问“月亮为什么会变？”、“太阳为什么有时圆？”。哪些回答只是看起来像回答？*

# %%
for question in (small.QUESTION, "月亮为什么会有圆缺？", "太阳为什么有时圆？"):
    asked = nanophi.chat_prompt(question, tok)
    answer = nanophi.generate(model, asked, max_new_tokens=60)
    print(question, "->", tok.decode(answer, skip_special_tokens=True))

# %% [markdown]
# ## 8. 偏好对齐（DPO）：差值
#
# 每一对里有一个好回答、一个差回答。DPO 不打分，只看同参考模型（微调后的模型）相比，
# 好回答的对数概率涨了多少、差回答涨了多少。两者之差 m 叫差值（margin），损失是 −ln σ(βm)：
# 开始时 m = 0，损失是 ln 2。
#
# 注意第一列：好回答本身也可能变得更不可能，只要差回答降得更多，损失照样下降。
#
# *试一试：把 `beta` 改成 1。哪些对子的损失几乎变成 0？它们还有多少梯度？*

# %%
beta = 0.1
pairs = small.preference_data(small.model("sft"))
batch = pairs.batch_at(0)
with torch.no_grad():
    policy = nanophi.answer_logps(small.model("dpo"), batch).view(-1, 2)
reference = batch.reference.view(-1, 2)
gains = policy - reference
loss = nanophi.dpo_loss(*policy.unbind(1), *reference.unbind(1), beta=beta)
print("好回答   差回答     差值     损失    梯度的权重")
for (good, bad), value in zip(gains.tolist(), loss.tolist(), strict=True):
    weight = beta / (1 + math.exp(beta * (good - bad)))
    print(f"{good:7.2f}  {bad:7.2f}  {good - bad:7.2f}  {value:7.3f}  {weight:7.3f}")
print(f"开始时的损失 ln 2 = {math.log(2):.3f}")

# %% [markdown]
# ## 9. 温度
#
# 采样之前，分数先除以温度：低于 1，最可能的 token 更占优势；高于 1，差距缩小。
# 第一行是回答第一个 token 的概率，第二行是用这个温度采样的回答：一旦抽到一个没背过的开头，
# 后面就全错了。装了 `ipywidgets` 就有滑块，没有就逐个打印。
#
# *试一试：先猜温度 1.5 的回答，再看。种子不变，0.7 和 1.0 在哪个 token 上分开？*

# %%
with torch.no_grad():
    scores = model(torch.tensor([prompt]))[0, -1]


def look(temperature):
    best = (scores / temperature).softmax(-1).topk(5)
    shares = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    print(f"温度 {temperature}：", *(f"{tok.piece(i)} {p:.3f} " for i, p in shares))
    dice = torch.Generator().manual_seed(0)
    how = {"temperature": temperature, "generator": dice}
    ids = nanophi.generate(model, prompt, max_new_tokens=24, **how)
    print("   ", tok.decode(ids, skip_special_tokens=True))


vary(look, "temperature", [0.3, 0.7, 1.0, 1.5, 3.0])

# %% [markdown]
# ## 10. 接下来
#
# - **读**：`docs/zh/` 里的章节，每章讲这里的一节，说清楚为什么这样做。想看模型内部，
#   打开 `look_inside.ipynb`；想做自己的实验，打开 `research.ipynb`。
# - **写**：`python -m exercises` 列出练习，自己写一遍，测试会告诉你对不对。建议的顺序：
#   1（合并）、6（对话掩码）、7（文档隔离）、14（DPO）、15（KV 缓存）。
# - **训练**：`make demo` 用全部语料训练一个更大的模型，
#   再用 `python generate.py --model out/demo/dpo --chat` 同它对话。
#
# 三个值得花半天的问题：
#
# 1. 把第 5、6 节的语料换成你自己的文本（分词器也用 `nanophi.train_bpe` 重新训练），
#    损失还能直接比较吗？提示：每字节比特数（bits per byte）。
# 2. 第 7 节的模型把 16 段对话背了下来。怎样的测试能把“背下来”和“学会了”分开？
# 3. 只有 24 篇文档时，多训练几轮总是好事吗？留出两篇不学，画出它们的损失。
