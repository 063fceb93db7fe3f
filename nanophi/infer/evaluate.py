"""How good a model is: bits per byte of a text, and multiple choice.

    python -m nanophi.infer.evaluate --model out/pretrain --data held-out.jsonl
    python -m nanophi.infer.evaluate --model out/sft --choices ceval/ --shots 3
    python -m nanophi.infer.evaluate --model out/sft --questions asked.jsonl --report out/sft

Bits per byte compare models of different tokenizers, and mean something at every size. A model that
gives every byte the same probability needs 8 bits per byte; a text costs fewer, the better the
model predicts it. Multiple choice (C-Eval, CMMLU) means nothing below some billion parameters:
chance is 25 %, and the original project's models scored 23 to 28 %. What answers are like, by
answers.py, says something at every size too. --report leaves all figures as two files.

Reading order: 1. bits per byte (`windows`, `score_text`), 2. multiple choice (`as_text`,
`prompt_of`, `option_logprobs`), 3. the command.
"""

import csv
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from nanophi.cli import SHOWN, Progress, UserError, flag, run_command
from nanophi.files import refuse_special
from nanophi.infer.answers import answer_all, figures_of
from nanophi.infer.generate import fits
from nanophi.infer.pairs import questions_of
from nanophi.infer.report import JSON_NAME, MARKDOWN_NAME, write_report
from nanophi.model.checkpoint import load_with_tokenizer
from nanophi.model.phi import Phi
from nanophi.text.corpus import expand, read_rows, read_texts
from nanophi.tokenizer.chat import chat_prompt
from nanophi.tokenizer.template import template_flag
from nanophi.tokenizer.tokenizer import Tokenizer
from nanophi.train.losses import head_cross_entropy

# ---- 1. bits per byte

LARGEST_EXPONENT = 709  # e^710 is beyond the largest float


@dataclass
class Score:
    """What a text costs, and how long it is.

    >>> score = Score(nats=3 * math.log(2), tokens=1, bytes=3, characters=1)  # 好, with p = 1/8
    >>> total = score + score
    >>> total.tokens, round(total.bits_per_byte, 3)
    (2, 1.0)
    """

    nats: float = 0.0  # sum of -ln p over the tokens predicted; 1 nat = 1 / ln 2 bits
    tokens: int = 0  # predicted
    bytes: int = 0  # that the predicted tokens spell
    characters: int = 0  # that the predicted tokens spell

    def __add__(self, other: "Score") -> "Score":
        return Score(
            nats=self.nats + other.nats,
            tokens=self.tokens + other.tokens,
            bytes=self.bytes + other.bytes,
            characters=self.characters + other.characters,
        )

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / max(self.bytes, 1)

    @property
    def bits_per_character(self) -> float:
        return self.nats / math.log(2) / max(self.characters, 1)

    def __str__(self) -> str:
        nats_per_token = self.nats / max(self.tokens, 1)
        perplexity = math.exp(nats_per_token) if nats_per_token < LARGEST_EXPONENT else math.inf
        return (
            f"{self.bits_per_byte:8.3f} {self.bits_per_character:9.3f} {perplexity:11.2f} "
            f"{self.tokens:10,} {self.bytes:11,}"
        )

    def figures(self) -> dict[str, float]:
        return {
            "bits_per_byte": self.bits_per_byte,
            "bits_per_character": self.bits_per_character,
            "tokens": self.tokens,
            "bytes": self.bytes,
        }


def windows(length: int, context: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Cut a document of `length` tokens into windows (start, first target, stop).

    Every token but the first is a target once. Before a target there are at least
    context - stride tokens (and at least one), where the document has them. With 10 tokens,
    context 4 and stride 2 (i: input, T: input and target, t: target only):

        token       0 1 2 3 4 5 6 7 8 9
        (0, 1, 5)   i T T T t
        (3, 5, 8)         i i T T t
        (6, 8, 10)              i i T t

    >>> list(windows(10, context=4, stride=2))
    [(0, 1, 5), (3, 5, 8), (6, 8, 10)]
    """
    first = 1  # the first target of the window
    while first < length:
        start = 0 if first == 1 else max(0, first - max(1, context - stride))
        stop = min(start + context + 1, length)
        yield start, first, stop
        first = stop


NO_NUMBERS = (
    "the model gives no probabilities (nan or infinite): its weights are damaged or far too large"
)


@torch.inference_mode()
def score_text(model: Phi, tok: Tokenizer, text: str, stride: int) -> Score:
    """Score one document with its [EOS], which costs bits and spells nothing."""
    ids = torch.tensor([*tok.encode(text), tok.eos_id], device=model.device)
    head = model.lm_head
    score = Score(tokens=len(ids) - 1)
    for start, first, stop in windows(len(ids), model.cfg.max_position_embeddings, stride):
        hidden = model.hidden(ids[None, start : stop - 1])[0]  # (inputs, D)
        # The input at place i predicts the token at place i + 1.
        hidden = hidden[first - 1 - start :]
        score.nats += head_cross_entropy(hidden, head.weight, head.bias, ids[first:stop]).item()
    if not math.isfinite(score.nats):
        raise UserError(NO_NUMBERS)
    spelled = tok.decode_bytes(ids[1:-1].tolist())
    score.bytes = len(spelled)
    score.characters = len(spelled.decode("utf-8", "ignore"))
    return score


# ---- 2. multiple choice

OPTIONS = ("A", "B", "C", "D")
COLUMNS = {"question", "answer", *OPTIONS}  # that a CSV file must have


@dataclass
class Subject:
    """One CSV file of questions, such as law_val.csv."""

    name: str
    questions: list[dict]
    examples: list[dict] = field(default_factory=list)  # solved questions that are shown before
    left_out: bool = False  # the examples are the questions themselves, without the one asked


def read_subjects(directory: str | Path) -> list[Subject]:
    """Read a C-Eval or CMMLU folder.

    Questions are those of val/, otherwise of test/, with the examples of dev/. Where there is only
    dev/, its questions are asked, with each other as examples.
    """
    root = Path(directory)
    folders = {name: root / name for name in ("val", "test", "dev") if (root / name).is_dir()}
    if not folders:
        raise UserError(
            f"{root} holds no val/, test/ or dev/ folder of CSV files (id,question,A,B,C,D,answer)"
        )
    examples = {}
    for path in csv_files(folders.get("dev", root)):
        examples[name_of(path)] = read_questions(path)
    asked = next(iter(folders))  # the name of the first folder there is
    subjects = []
    for path in csv_files(folders[asked]):
        name = name_of(path)
        subject = Subject(name, read_questions(path), examples.get(name, []), asked == "dev")
        subjects.append(subject)
    if not any(subject.questions for subject in subjects):
        raise UserError(
            f"{folders[asked]} holds no CSV file with a question whose answer is A, B, C or D"
        )
    return subjects


def csv_files(folder: Path) -> list[Path]:
    """The CSV files of a folder, in order."""
    return sorted(path for path in folder.glob("*.csv") if path.is_file())


def read_questions(path: Path) -> list[dict]:
    """The rows of a CSV file whose answer is A, B, C or D.

    CMMLU writes Question and Answer where C-Eval writes question and answer: column names of more
    than one letter are put into lower case.
    """
    rows = []
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            for cells in csv.DictReader(file, strict=True):
                row = {}
                for name, value in cells.items():
                    if name is not None:  # None: the cells beyond the last column
                        row[name.lower() if len(name) > 1 else name] = value
                rows.append(row)
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is no CSV file in UTF-8: {error}") from None
    if rows and not rows[0].keys() >= COLUMNS:
        raise UserError(
            f"{path}: the columns {', '.join(rows[0])} lack some of question, A, B, C, D, answer"
        )
    questions = [row for row in rows if row["answer"] in OPTIONS]
    for row in questions:
        lacking = [name for name in sorted(COLUMNS) if row[name] is None]
        if lacking:
            raise UserError(
                f"{path}: the question {str(row['question'])[:SHOWN]!r} has fewer cells than there "
                f"are columns; {', '.join(lacking)} would be empty"
            )
    return questions


def name_of(path: Path) -> str:
    """The subject of a file.

    >>> name_of(Path("dev/law_dev.csv"))
    'law'
    """
    return path.stem.removesuffix("_dev").removesuffix("_val").removesuffix("_test")


def as_text(row: dict, with_answer: bool) -> str:
    """A question as the model reads it; an example has its answer too.

    >>> row = {"question": "一加一是", "A": "一", "B": "二", "C": "三", "D": "四", "answer": "B"}
    >>> print(as_text(row, with_answer=True).strip())
    一加一是
    A. 一
    B. 二
    C. 三
    D. 四
    答案：B
    """
    options = "\n".join(f"{option}. {row[option]}" for option in OPTIONS)
    text = f"{row['question']}\n{options}\n答案："
    if with_answer:
        text += f"{row['answer']}\n\n"
    return text


def prompt_of(tok: Tokenizer, row: dict, solved: list[dict], in_chat: bool) -> list[int]:
    """The ids behind which the letter of the answer stands: solved examples, then the question.

    in_chat: each example is a turn of a conversation, in the chat template of the tokenizer
    """
    if not in_chat:
        texts = [as_text(example, with_answer=True) for example in solved]
        texts.append(as_text(row, with_answer=False))
        return [token for text in texts for token in tok.encode(text)]
    messages = []
    for example in solved:
        messages.append({"role": "user", "content": as_text(example, with_answer=False)})
        messages.append({"role": "assistant", "content": example["answer"]})
    messages.append({"role": "user", "content": as_text(row, with_answer=False)})
    return chat_prompt(messages, tok)


@torch.inference_mode()
def option_logprobs(
    model: Phi, tok: Tokenizer, row: dict, examples: Iterable[dict], in_chat: bool = False
) -> tuple[torch.Tensor, int]:
    """log p of A, B, C and D as the token after 答案：, (4,), and how many examples were shown.

    The model writes no answer; only the probabilities of the four letters are compared. With 0.20
    for A, 0.31 for B, 0.25 for C and 0.04 for D the choice is B, even if another token, such as 我,
    is likelier still.

        example 2 with its answer    ┐ as many as fit into the context; the first example
        example 1 with its answer    ┘ stands next to the question
        question ... 答案：           ─> the next token
    """
    context = model.cfg.max_position_embeddings
    ids = prompt_of(tok, row, [], in_chat)[-context:]
    solved: list[dict] = []
    for example in examples:
        longer = prompt_of(tok, row, [example, *solved], in_chat)
        if len(longer) > context:
            break
        solved = [example, *solved]
        ids = longer
    hidden = model.hidden(torch.tensor([ids], device=model.device))[0, -1]  # (D,)
    logprobs = model.lm_head(hidden).float().log_softmax(-1)  # (V,)
    of_options = logprobs[option_ids(tok)]
    if of_options.isnan().any():
        raise UserError(NO_NUMBERS)
    return of_options, len(solved)


def option_ids(tok: Tokenizer) -> list[int]:
    """The tokens of A, B, C and D, which a tokenizer without these letters cannot tell apart."""
    ids = [tok.encode(option)[0] for option in OPTIONS]
    if len(set(ids)) < len(OPTIONS):
        raise UserError(
            "the tokenizer does not know the letters A, B, C and D: no choice can be seen"
        )
    return ids


def multiple_choice(
    model: Phi, tok: Tokenizer, subjects: list[Subject], shots: int, in_chat: bool = False
) -> dict:
    """Accuracy over all questions of some subjects, printed by subject.

    shots: examples before each question. in_chat: see `prompt_of`. The standard error of a share p
    of n right answers is sqrt(p (1 - p) / n): with 1,346 questions and 25 % right it is 1.2 %.
    """
    total = sum(len(subject.questions) for subject in subjects)
    right = 0
    shown_total = 0
    rows = []
    print(f"{'subject':44} {'questions':>9} {'right':>6}")
    with Progress("questions", total) as bar:
        for subject in subjects:
            right_here, shown = ask_subject(model, tok, subject, shots, in_chat, bar)
            right += right_here
            shown_total += shown
            asked = len(subject.questions)
            rows.append({"subject": subject.name, "questions": asked, "right": right_here})
            bar.say(f"{subject.name:44} {asked:9} {right_here:6}")
    share = right / total
    error = math.sqrt(share * (1 - share) / total)
    way = "leave one out" if subjects[0].left_out else "examples from dev"
    print(
        f"choices: {right} of {total} right = {share:.1%}, standard error {error:.1%}, chance 25.0%"
    )
    print(
        f"examples: {shots} asked for ({way}), "
        f"{shown_total / total:.1f} fitted into the context on average"
    )
    return {
        "accuracy": share,
        "standard_error": error,
        "questions": total,
        "shots": shots,
        "subjects": rows,
    }


def ask_subject(
    model: Phi, tok: Tokenizer, subject: Subject, shots: int, in_chat: bool, bar: Progress
) -> tuple[int, int]:
    """Ask all questions of a subject: how many are right, and how many examples were shown."""
    right = 0
    shown_total = 0
    for row in subject.questions:
        others = [example for example in subject.examples if example != row]
        logprobs, shown = option_logprobs(model, tok, row, others[:shots], in_chat)
        choice = OPTIONS[int(logprobs.argmax())]
        right += choice == row["answer"]
        shown_total += shown
        bar.update()
    return right, shown_total


# ---- 3. the command


@dataclass(kw_only=True)
class Config:
    model: str = flag(help="a checkpoint directory")
    data: list[str] | None = flag(
        None, help="texts to score, by file: .txt .jsonl .json, plain or .gz or .xz"
    )
    choices: str | None = flag(
        None, help="a C-Eval or CMMLU folder (dev/, val/) of multiple-choice CSV files"
    )
    shots: int = flag(
        0, at_least=0, help="examples before each question; as many as the context holds"
    )
    in_chat: bool = flag(
        False, help="ask the choices in the chat template, each example as a turn; after sft.py"
    )
    questions: list[str] | None = flag(
        None, help="conversations whose first questions are answered: what are the answers like?"
    )
    max_new_tokens: int = flag(200, at_least=1, help="longest answer to one of --questions")
    report: str | None = flag(
        None, help="a folder, such as the model's own, for evaluation.json and evaluation.md"
    )
    template: str | None = template_flag()
    stride: int | None = flag(
        None, at_least=1, help="tokens the window moves (default: half the context)"
    )
    documents: int | None = flag(None, at_least=1, help="score only the first N of each file")
    device: str = flag("auto", help="auto: cuda where there is one, else cpu")


def main(cfg: Config) -> dict:
    """Score texts, choices and answers, whatever is given; returns the figures it prints."""
    if cfg.data is None and cfg.choices is None and cfg.questions is None:
        raise UserError("say what to evaluate: --data FILES, --choices FOLDER or --questions FILES")
    if cfg.template is not None and not (cfg.in_chat or cfg.questions):
        raise UserError(
            "--template goes with --in-chat or --questions, and --in-chat with --choices FOLDER"
        )
    if cfg.in_chat and cfg.choices is None:
        raise UserError("--in-chat goes with --choices FOLDER: texts are scored as they are")
    # All files are looked at first: a mistake in the last one should not cost the work before it.
    files = expand(cfg.data or [])
    for path in files:
        if not any(read_texts([path])):
            raise UserError(f"{path} holds no text to score")
    subjects = read_subjects(cfg.choices) if cfg.choices is not None else []
    questions = [question for question, _ in read_rows(cfg.questions or [], use=questions_of)]
    if cfg.questions and not questions:
        raise UserError(f"no conversation in {', '.join(cfg.questions)}")
    if cfg.report is not None:
        for name in (JSON_NAME, MARKDOWN_NAME):
            refuse_special(Path(cfg.report) / name)
    model, tok = load_with_tokenizer(cfg.model, cfg.device, cfg.template)
    results: dict[str, Any] = {}
    if files:
        results |= score_files(model, tok, files, cfg.stride, cfg.documents)
    if subjects:
        results |= multiple_choice(model, tok, subjects, cfg.shots, cfg.in_chat)
    if questions:
        results |= look_at_answers(model, tok, questions, cfg.max_new_tokens)
    if cfg.report is not None:
        write_report(cfg.report, results)
        print(f"{Path(cfg.report) / MARKDOWN_NAME}: all of this")
    return results


def look_at_answers(model: Phi, tok: Tokenizer, questions: list[str], longest: int) -> dict:
    """Answer questions, and print what the answers are like."""
    fitting = [question for question in questions if fits(model, chat_prompt(question, tok))]
    if not fitting:
        raise UserError("all questions are longer than the context of the model")
    answers = list(answer_all(model, tok, fitting, max_new_tokens=longest))
    figures = figures_of(answers)
    print("answers: " + ", ".join(f"{name} {value:.3g}" for name, value in figures.items()))
    samples = [{"question": answer.question, "answer": answer.text} for answer in answers]
    return {"answers": figures, "samples": samples}


def score_files(
    model: Phi, tok: Tokenizer, files: list[Path], stride: int | None, documents: int | None
) -> dict:
    """Score the texts of files, printed by file; at most `documents` texts of each file."""
    context = model.cfg.max_position_embeddings
    stride = stride or context // 2
    if stride > context:
        raise UserError(
            f"--stride {stride} exceeds the context of {context}: tokens would be skipped"
        )
    print(
        f"{'bits/byte':>8} {'bits/char':>9} {'perplexity':>11} {'tokens':>9} {'bytes':>11}   file"
    )
    total = Score()
    rows = []
    for path in files:
        score = Score()
        with Progress(path.name, None) as bar:
            for number, text in enumerate(read_texts([path])):
                if number == documents:
                    break
                score += score_text(model, tok, text, stride)
                bar.update()
        if not score.tokens:
            raise UserError(f"{path} holds no text to score")
        total += score
        rows.append({"file": path.name} | score.figures())
        print(f"{score}   {path}")
    print(
        f"{total}   all; context {context}, stride {stride}; "
        "a document's first token is not predicted"
    )
    return {"bits_per_byte": total.bits_per_byte, "tokens": total.tokens, "files": rows}


if __name__ == "__main__":
    run_command(Config, main)
