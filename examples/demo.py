"""The whole path on the small texts of data/demo, in a few minutes on a CPU.

    make demo                       or, where nanophi is installed:   python examples/demo.py

    text ─> tokenizer ─> token ids ─> pretraining ─> copying ─> SFT ─> preference pairs ─> DPO
         ─> answers

`main` is the recipe, and the functions below it are its steps in the same order. Each step calls
the `main` of a script with the flags a person would give it, and leaves its result in out/demo.

The text is small, so the model knows what it was taught and nothing else: it answers trained
questions as it was taught, and other questions fluently and wrongly. What stands in a text before
it, it can say: for that it learns to copy.
"""

import os
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the scripts stand at the root of the repository

import torch

import dpo
import pretrain
import sft
import train_tokenizer
from examples import lessons, report
from examples.picture import write_chat, write_moving
from nanophi import generate, load
from nanophi.cli import flag, peak_memory_gb, run_command
from nanophi.columns import side_by_side
from nanophi.infer import pairs
from nanophi.infer.pairs import similarity
from nanophi.infer.rag import FOUND, NOT_FOUND, Index, question_with
from nanophi.text import clean, shards
from nanophi.text.corpus import read_rows
from nanophi.text.schemas import messages_of
from nanophi.tokenizer.chat import chat_prompt
from nanophi.train.plot import draw, read_metrics

TEXTS = ("documents", "sft", "rephrased", "dpo")  # files of data/demo that are trained on
CLEANED = (*TEXTS, "reading")  # and questions about texts, of which lessons.py makes rows
QUESTION = "月亮为什么有时圆，有时弯？"  # asked again and again while the model learns
ALIKE = 0.9  # an answer counts as taught from this similarity on

# Flags that all trainings have in common.
TRAINING = {
    "save_every": 10_000,  # more than the steps of any stage: each is saved once, at its end
    "keep": 0,
    "overwrite": True,  # so that the demo can run again
}


@dataclass(kw_only=True)
class Config:
    data: str = flag(
        str(ROOT / "data" / "demo"),
        help="documents, sft, rephrased, dpo, reading and both heldout .jsonl",
    )
    out: str = flag("out/demo", help="where everything goes")
    vocab_size: int = flag(2048, help="tokens")
    pretrain_epochs: float = flag(3, help="passes over the documents")
    copying: int = flag(5900, help="rows in which a text comes again and again")
    sentences: int = flag(4000, help="sentences that are asked for, among the questions")
    sft_epochs: int = flag(8, help="passes over the questions")
    dpo_epochs: float = flag(2, help="passes over the preference pairs")


def main(cfg: Config) -> dict:
    print_environment()
    stages = Stages()

    # 1. clean text
    with stages.stage("clean") as row:
        row.key_figure = clean_texts(cfg)

    # 2. a tokenizer, trained on that text
    with stages.stage("tokenizer") as row:
        row.key_figure = make_tokenizer(cfg)

    # 3. the documents as token ids
    with stages.stage("shards") as row:
        row.key_figure = write_token_ids(cfg)

    # 4. pretraining: the model learns to go on with a document
    with stages.stage("pretrain") as row:
        row.key_figure = pretrain_model(cfg)

    # 5. it learns to copy what stands before it
    with stages.stage("copying") as row:
        row.key_figure = learn_to_copy(cfg)

    # 6. supervised fine-tuning (SFT): it learns to answer questions, by heart or from a text
    with stages.stage("sft") as row:
        row.key_figure = fine_tune(cfg)

    # 7. preference pairs: a half-taught model writes the answers to reject
    with stages.stage("pairs") as row:
        row.key_figure = make_pairs(cfg)

    # 8. DPO: it learns to prefer the good answers
    with stages.stage("dpo") as row:
        row.key_figure = prefer(cfg)

    # 9. answers to all trained questions, before and after DPO
    with stages.stage("answers") as row:
        trained = answer_trained_questions(cfg)
        row.key_figure = as_taught_figure(trained)

    # 10. what has come of it
    print_answers(cfg, trained["dpo"])
    rephrased = print_rephrased(cfg)
    read = print_reading(cfg)
    print_differences(trained["sft"], trained["dpo"])
    print(stages.table())
    draw_pictures(cfg, rephrased)
    write_page(cfg, stages.rows, rephrased, read)
    print_summary(cfg, trained, rephrased, read)
    return {"trained": trained, "rephrased": rephrased, "reading": read}


# ---- where things are


def text_file(cfg: Config, name: str) -> str:
    """The cleaned file of a name, such as out/demo/text/sft.jsonl."""
    return str(Path(cfg.out) / "text" / f"{name}.jsonl")


def folder(cfg: Config, name: str) -> str:
    """The directory of a stage, such as out/demo/pretrain."""
    return str(Path(cfg.out) / name)


# ---- 1. clean text


def clean_texts(cfg: Config) -> str:
    """Clean the files of CLEANED. Documents that repeat another one are dropped."""
    counts = {}
    for name in CLEANED:
        settings = clean.Config(
            input=[str(Path(cfg.data) / f"{name}.jsonl")],
            out=text_file(cfg, name),
            dedup=name == "documents",
        )
        counts[name] = clean.main(settings)
    documents = counts["documents"]
    return (
        f"{documents['read']} documents, {documents['repeated']} repeated, "
        f"{documents['written']} kept"
    )


# ---- 2. a tokenizer


def make_tokenizer(cfg: Config) -> str:
    """Train a byte-level BPE tokenizer on all texts, the questions and answers too."""
    settings = train_tokenizer.Config(
        input=[text_file(cfg, name) for name in TEXTS],
        out=folder(cfg, "tokenizer"),
        vocab_size=cfg.vocab_size,
        overwrite=True,
    )
    report = train_tokenizer.main(settings)
    return f"{report['tokens']:,} tokens"


# ---- 3. token ids


def write_token_ids(cfg: Config) -> str:
    """Write the documents as token ids; 4 % of them are held out for validation."""
    settings = shards.Config(
        input=[text_file(cfg, "documents")],
        tokenizer=folder(cfg, "tokenizer"),
        out=folder(cfg, "tokens"),
        val_fraction=0.04,
    )
    report = shards.main(settings)
    characters_each = report["characters"] / report["tokens"]
    return f"{report['tokens']:,} tokens, {characters_each:.2f} characters each"


# ---- 4. pretraining


def pretrain_model(cfg: Config) -> str:
    """Train a model of the preset "demo" (2.6 million parameters) on the documents."""
    settings = pretrain.Config(
        data=folder(cfg, "tokens"),
        tokenizer=folder(cfg, "tokenizer"),
        out=folder(cfg, "pretrain"),
        preset="demo",
        lr=6e-3,
        warmup=10,
        epochs=cfg.pretrain_epochs,
        batch_tokens=2048,
        eval_every=50,
        **TRAINING,
    )
    pretrain.main(settings)
    last = read_metrics(settings.out)[-1]
    return f"validation {last['val_bits_per_byte']:.2f} bits per byte"


# ---- 5. copying


def learn_to_copy(cfg: Config) -> str:
    """Write the lessons, and train the pretrained model on those of copying.

    The rows have 128 tokens: in longer ones it takes more steps to notice that a text comes again.
    """
    texts = str(Path(cfg.out) / "text")
    lessons.main(
        lessons.Config(
            data=texts,
            out=texts,
            copying=cfg.copying,
            sentences=cfg.sentences,
            times=cfg.sft_epochs,
        )
    )
    settings = sft.Config(
        init_from=folder(cfg, "pretrain"),
        data=[text_file(cfg, "copying")],
        out=folder(cfg, "copying"),
        lr=6e-3,
        warmup=10,
        decay=0.15,
        epochs=1,
        batch_tokens=2048,
        context=128,
        **TRAINING,
    )
    return last_loss(settings)


def last_loss(settings: sft.Config) -> str:
    """Run sft.py; the loss of its last step, for the table."""
    sft.main(settings)
    last = read_metrics(settings.out)[-1]
    return f"loss {last['loss']:.3f}"


# ---- 6. SFT


def fine_tune(cfg: Config) -> str:
    """Train the model on questions and answers, sft_epochs times, and on sentences asked for.

    `keep_at` also keeps the model of a quarter of the steps, in out/demo/sft-early.
    """
    settings = sft.Config(
        init_from=folder(cfg, "copying"),
        data=[text_file(cfg, "lessons")],
        out=folder(cfg, "sft"),
        lr=5e-3,
        warmup=10,
        decay=0.4,
        epochs=1,
        batch_tokens=2048,
        keep_at=0.25,
        sample=QUESTION,
        eval_every=100,
        **TRAINING,
    )
    return last_loss(settings)


# ---- 7. preference pairs


def make_pairs(cfg: Config) -> str:
    """Let the early SFT model answer: its answer is the rejected one, the taught one the chosen."""
    settings = pairs.Config(
        model=folder(cfg, "sft-early"),
        data=[text_file(cfg, "sft")],
        out=text_file(cfg, "pairs"),
        batch=64,
    )
    report = pairs.main(settings)
    return f"{report['pairs']} of {report['prompts']} kept"


# ---- 8. DPO


def prefer(cfg: Config) -> str:
    """Train the SFT model on preference pairs: those of data/demo and those of stage 7."""
    settings = dpo.Config(
        init_from=folder(cfg, "sft"),
        data=[text_file(cfg, "dpo"), text_file(cfg, "pairs")],
        out=folder(cfg, "dpo"),
        lr=2e-4,
        warmup=3,
        epochs=cfg.dpo_epochs,
        batch_pairs=16,
        val_fraction=0.15,
        eval_every=4,
        **TRAINING,
    )
    dpo.main(settings)
    last = read_metrics(settings.out)[-1]
    return f"held-out margin {last['val_margin']:.2f}, accuracy {last['val_accuracy']:.0%}"


# ---- 9. answers


@dataclass
class Answer:
    """What a model answers to one question, and what it was taught to answer."""

    question: str
    taught: str
    text: str
    ended: bool  # with [EOS], before the limit of tokens

    @property
    def as_taught(self) -> bool:
        return similarity(self.text, self.taught) >= ALIKE

    def __str__(self) -> str:
        end = " [EOS]" if self.ended else " (no end)"
        return f"提问：{self.question}\n回答：{self.text}{end}\n"


def answer_trained_questions(cfg: Config) -> dict[str, list[Answer]]:
    """The name of a model, sft or dpo -> its answers to all questions it was trained on."""
    rows = list(read_rows([text_file(cfg, "sft"), text_file(cfg, "rephrased")]))
    return {name: ask(folder(cfg, name), rows) for name in ("sft", "dpo")}


def ask(directory: str, rows: list[dict], batch: int = 64) -> list[Answer]:
    """Answers of the model in `directory` to every question of the rows, always the likeliest token
    (greedy), `batch` questions at a time.
    """
    model, tok = load(directory)
    questions = questions_of(rows)
    answers = []
    for start in range(0, len(questions), batch):
        part = questions[start : start + batch]
        prompts = [chat_prompt(turns, tok) for turns, _ in part]
        generated = generate(model, prompts, max_new_tokens=200)
        for (turns, taught), ids in zip(part, generated, strict=True):
            ended = ids[-1] == tok.eos_id
            text = tok.decode(ids[:-1] if ended else ids)
            answers.append(Answer(turns[-1]["content"], taught, text, ended))
    return answers


def questions_of(rows: list[dict]) -> list[tuple[list[dict], str]]:
    """(the conversation up to a question, the taught answer) for every question of the rows.

    A conversation of two questions gives two: the second one follows the first and its answer.
    """
    questions = []
    for row in rows:
        turns = messages_of(row)
        for i in range(1, len(turns), 2):  # the assistant speaks every second turn
            questions.append((turns[:i], turns[i]["content"]))
    return questions


def count_as_taught(answers: list[Answer]) -> int:
    return sum(answer.as_taught for answer in answers)


def as_taught_figure(trained: dict[str, list[Answer]]) -> str:
    """The key figure of the stage, such as "as taught: sft 190, dpo 191 of 194"."""
    counts = [f"{name} {count_as_taught(answers)}" for name, answers in trained.items()]
    return f"as taught: {', '.join(counts)} of {len(trained['dpo'])}"


# ---- 10. what has come of it


def print_answers(cfg: Config, answers: list[Answer]) -> None:
    """Print the first six answers to trained questions."""
    print(f"\n== What {folder(cfg, 'dpo')} answers (greedy)\n")
    for answer in answers[:6]:
        print(answer)


def print_rephrased(cfg: Config) -> list[Answer]:
    """Ask the trained questions in other words, which the model has never seen; print and return
    the answers.
    """
    held_out = list(read_rows([Path(cfg.data) / "heldout.jsonl"]))
    rows = [{"instruction": row["question"], "output": row["output"]} for row in held_out]
    answers = ask(folder(cfg, "dpo"), rows)
    print(f"== The {len(answers)} questions in other words, which it was never taught\n")
    for row, answer in zip(held_out, answers, strict=True):
        print(f"{answer}（taught as：{row['rephrases']}）\n")
    return answers


@dataclass
class FromText:
    """A question about a text, and what was made of it."""

    question: str
    sentence: str  # that the search has found
    text: str  # the answer
    is_right: bool  # it holds all words that count


def print_reading(cfg: Config) -> list[FromText]:
    """Ask about texts that the model has never seen, and print and return what it answers.

    The search finds a sentence of one of the texts, and the model answers from it. Where no
    sentence has enough to do with the question, the answer is NOT_FOUND.
    """
    held_out = list(read_rows([Path(cfg.data) / "reading-heldout.jsonl"]))
    texts = dict.fromkeys(row["background"] for row in held_out)
    model, tok = load(folder(cfg, "dpo"))
    sentences = [sentence for text in texts for sentence in lessons.sentences_of(text)]
    index = Index([("", sentence) for sentence in sentences], tok)
    answers = []
    print(f"== {len(held_out)} questions about {len(texts)} texts, which it has never seen\n")
    for row in held_out:
        found = index.search(row["question"], k=1)
        sentence = found[0][1].text if found and found[0][0] >= FOUND else ""
        text = NOT_FOUND
        if sentence:
            turns = [{"role": "user", "content": question_with(found, row["question"])}]
            ids = generate(model, chat_prompt(turns, tok), max_new_tokens=100)
            text = tok.decode(ids, skip_special_tokens=True)
        is_right = all(key in text for key in row["keys"])
        answers.append(FromText(row["question"], sentence, text, is_right))
        mark = "" if is_right else "（wrong）"
        print(f"提问：{row['question']}\n回答：{text}{mark}\n")
    return answers


def print_differences(before: list[Answer], after: list[Answer]) -> None:
    """Print the first three answers that DPO has changed, beside each other."""
    print("== SFT and DPO side by side, where they differ\n")
    both = list(zip(before, after, strict=True))
    changed = [(old, new) for old, new in both if old.text != new.text]
    for old, new in changed[:3]:
        columns = side_by_side(["SFT", "DPO"], [old.text, new.text], 80)
        print(f"提问：{old.question}\n{columns}\n")


def draw_pictures(cfg: Config, rephrased: list[Answer]) -> None:
    """Draw the losses of the three trainings, and five answers as a chat."""
    losses = Path(cfg.out) / "loss.png"
    panels = {"pretraining": "pretrain", "SFT": "sft", "DPO": "dpo"}
    draw({title: [folder(cfg, name)] for title, name in panels.items()}, losses)
    chat = Path(cfg.out) / "answers.svg"
    shown = [a for a in rephrased if a.as_taught][:4] + [a for a in rephrased if not a.as_taught][
        :1
    ]
    write_chat(chat, [(answer.question, answer.text, answer.as_taught) for answer in shown])
    moving = Path(cfg.out) / "learning.svg"
    sft_losses = [line["loss"] for line in read_metrics(folder(cfg, "sft"))]
    write_moving(moving, QUESTION, sft_losses, samples(cfg))
    print(f"\nloss curves: {losses}; answers to questions in other words: {chat}")
    print(f"an answer while the model learns: {moving}")


def samples(cfg: Config) -> list[tuple[int, str]]:
    """(step of SFT, the answer to QUESTION then)."""
    return report.samples_of(folder(cfg, "sft"), QUESTION, before=folder(cfg, "copying"))


def write_page(
    cfg: Config, rows: "list[Row]", rephrased: list[Answer], read: list[FromText]
) -> None:
    """Write the page that shows how all of it came about; see examples/report.py."""
    model, tok = load(folder(cfg, "dpo"))
    taught = next(iter(read_rows([text_file(cfg, "sft")])))
    runs = {"SFT": folder(cfg, "sft"), "DPO": folder(cfg, "dpo")}
    page = Path(cfg.out) / "report.html"
    report.write_report(
        page,
        report.both("一个小语言模型是怎样炼成的", "How a small language model is made"),
        [
            report.stages(rows),
            report.losses(
                {name: folder(cfg, name) for name in ("pretrain", "copying", "sft", "dpo")}
            ),
            report.moments(QUESTION, samples(cfg), report.answer_of(runs["DPO"], QUESTION)),
            report.tokenizer(tok, QUESTION),
            report.mask(messages_of(taught), tok),
            report.attention(model, tok, QUESTION),
            report.answers(rephrased),
            report.reading(read),
        ],
    )
    print(f"the whole story on one page: {page}")


def print_summary(
    cfg: Config,
    trained: dict[str, list[Answer]],
    rephrased: list[Answer],
    read: list[FromText],
) -> None:
    """Print how many answers are as taught and end properly, and how to chat with the model."""
    for name, answers in trained.items():
        print(
            f"{folder(cfg, name)} answers {count_as_taught(answers)} of {len(answers)} "
            f"trained questions as taught (>= {ALIKE})"
        )
    model = folder(cfg, "dpo")
    print(
        f"{model} answers {count_as_taught(rephrased)} of {len(rephrased)} questions in other "
        "words with what it was taught"
    )
    right = sum(answer.is_right for answer in read)
    print(f"and {right} of {len(read)} questions about texts that it has never seen")
    all_answers = trained["dpo"] + rephrased
    ended = sum(answer.ended for answer in all_answers)
    print(f"{ended} of {len(all_answers)} answers end with [EOS]")
    python = os.path.relpath(sys.executable)
    print(f"\nChat with it:  {python} generate.py --model {model} --chat")
    print(f"in a browser:  {python} generate.py --model {model} --serve")


# ---- the table of stages


def print_environment() -> None:
    """Print what the times in the table depend on."""
    device = "CUDA" if torch.cuda.is_available() else "CPU"
    print(
        f"environment: Python {platform.python_version()}, torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads of {platform.machine()}, {device}"
    )


@dataclass
class Row:
    """One line of the table."""

    name: str
    key_figure: str = ""
    seconds: float = 0.0
    peak_gb: float = 0.0  # highest resident memory


class Stages:
    """Measures the stages, one after the other, and keeps a row of the table for each."""

    def __init__(self):
        self.rows: list[Row] = []

    @contextmanager
    def stage(self, name: str) -> Iterator[Row]:
        """Measure the time and the peak memory of the `with` block, which sets the key figure."""
        print(f"\n== {name}", flush=True)
        reset_peak_memory()
        started = time.monotonic()
        row = Row(name)
        yield row
        row.seconds = time.monotonic() - started
        row.peak_gb = peak_memory_gb()
        self.rows.append(row)

    def table(self) -> str:
        lines = [f"{'stage':12} {'seconds':>8} {'peak GB':>8}   key figure"]
        for row in self.rows:
            lines.append(f"{row.name:12} {row.seconds:8.1f} {row.peak_gb:8.2f}   {row.key_figure}")
        total = sum(row.seconds for row in self.rows)
        peak = max(row.peak_gb for row in self.rows)
        lines.append(f"{'all':12} {total:8.1f} {peak:8.2f}")
        return "\n".join(lines)


def reset_peak_memory() -> None:
    """Let the kernel forget the peak so far, where it can (Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


if __name__ == "__main__":
    run_command(Config, main)
