"""How good a model is: bits per byte of a text, and multiple choice.

    python -m nanophi.infer.evaluate --model out/pretrain --data held-out.jsonl
    python -m nanophi.infer.evaluate --model out/sft --choices ceval/ --shots 3

Bits per byte compare models of different tokenizers and mean something at every size. Multiple choice (C-Eval, CMMLU)
does not below some billion parameters: chance is 25 %, and the original scored 23 to 28 %.
"""

import csv
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from nanophi.cli import Progress, UserError, flag, run_command
from nanophi.model.checkpoint import load_with_tokenizer
from nanophi.model.phi import Phi
from nanophi.text.corpus import expand, read_texts
from nanophi.tokenizer.tokenizer import Tokenizer
from nanophi.train.losses import head_cross_entropy

OPTIONS = ("A", "B", "C", "D")


@dataclass
class Score:
    """What a text cost: nats over the tokens predicted, and the bytes and characters they spell."""

    nats: float = 0.0
    tokens: int = 0
    bytes: int = 0
    characters: int = 0

    def __add__(self, other: "Score") -> "Score":
        return Score(
            *(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True))
        )

    def __str__(self) -> str:
        bits = self.nats / math.log(2)
        perplexity = math.exp(self.nats / max(self.tokens, 1))
        return (
            f"{bits / max(self.bytes, 1):8.3f} {bits / max(self.characters, 1):9.3f} {perplexity:11.2f} "
            f"{self.tokens:10,} {self.bytes:11,}"
        )


def windows(length: int, context: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Cut a document of `length` tokens into (start, first target, stop): every token but the first is a target once,
    with at least context - stride tokens before it where the document has them."""
    done = 1
    while done < length:
        start = 0 if done == 1 else max(0, done - (context - stride))
        stop = min(start + context + 1, length)
        yield start, done, stop
        done = stop


@torch.inference_mode()
def score_text(model: Phi, tok: Tokenizer, text: str, stride: int) -> Score:
    """Score one document, [EOS] at its end included (it costs bits and spells nothing)."""
    ids = torch.tensor([*tok.encode(text), tok.eos_id], device=model.lm_head.weight.device)
    score = Score(tokens=len(ids) - 1)
    for start, first, stop in windows(len(ids), model.cfg.max_position_embeddings, stride):
        hidden = model.hidden(ids[None, start : stop - 1])[0, first - 1 - start :]
        score.nats += head_cross_entropy(
            hidden, model.lm_head.weight, model.lm_head.bias, ids[first:stop]
        ).item()
    spelled = tok.decode_bytes(ids[1:-1].tolist())
    score.bytes, score.characters = len(spelled), len(spelled.decode("utf-8", "ignore"))
    return score


@dataclass
class Subject:
    """One CSV of questions; `examples` are shown before each, `left_out`: the question itself is among them."""

    name: str
    questions: list[dict]
    examples: list[dict] = field(default_factory=list)
    left_out: bool = False


def read_subjects(directory: str | Path) -> list[Subject]:
    """A C-Eval or CMMLU folder: questions from val/ (or test/) with examples from dev/; where only dev/ exists, its
    questions with each other as examples, the one asked left out."""
    root = Path(directory)
    folders = {name: root / name for name in ("val", "test", "dev") if (root / name).is_dir()}
    if not folders:
        raise UserError(
            f"{root} holds no val/, test/ or dev/ folder of CSV files (id,question,A,B,C,D,answer)"
        )

    def table(path: Path) -> list[dict]:
        try:
            with open(path, encoding="utf-8-sig", newline="") as file:
                rows = [
                    {
                        key.lower() if len(key) > 1 else key: value
                        for key, value in row.items()
                        if key is not None
                    }
                    for row in csv.DictReader(file)
                ]
        except (UnicodeDecodeError, csv.Error) as error:
            raise UserError(f"{path} is no CSV file in UTF-8: {error}") from None
        if rows and not {"question", "answer", *OPTIONS} <= rows[0].keys():
            raise UserError(
                f"{path}: the columns {', '.join(rows[0])} lack some of question, A, B, C, D, answer"
            )
        return [row for row in rows if row["answer"] in OPTIONS]

    asked = next(iter(folders))
    dev = {name_of(path): table(path) for path in sorted(folders.get("dev", root).glob("*.csv"))}
    subjects = []
    for path in sorted(folders[asked].glob("*.csv")):
        name = name_of(path)
        subjects.append(Subject(name, table(path), dev.get(name, []), left_out=asked == "dev"))
    if not any(subject.questions for subject in subjects):
        raise UserError(
            f"{folders[asked]} holds no CSV file with a question whose answer is A, B, C or D"
        )
    return subjects


def name_of(path: Path) -> str:
    """law_dev.csv -> law."""
    return path.stem.removesuffix("_dev").removesuffix("_val").removesuffix("_test")


def as_text(row: dict, with_answer: bool) -> str:
    options = "\n".join(f"{option}. {row[option]}" for option in OPTIONS)
    return f"{row['question']}\n{options}\n答案：" + (f"{row['answer']}\n\n" if with_answer else "")


@torch.inference_mode()
def option_logprobs(
    model: Phi, tok: Tokenizer, row: dict, examples: Iterable[dict]
) -> tuple[torch.Tensor, int]:
    """log p of A, B, C, D as the next token after 答案：, (4,), and how many examples fitted into the context."""
    ids, shown = tok.encode(as_text(row, False))[-model.cfg.max_position_embeddings :], 0
    for example in examples:
        before = tok.encode(as_text(example, True))
        if len(before) + len(ids) > model.cfg.max_position_embeddings:
            break
        ids, shown = before + ids, shown + 1
    hidden = model.hidden(torch.tensor([ids], device=model.lm_head.weight.device))[0, -1]
    return model.lm_head(hidden).float().log_softmax(-1)[
        [tok.encode(option)[0] for option in OPTIONS]
    ], shown


def multiple_choice(model: Phi, tok: Tokenizer, directory: str, shots: int) -> dict:
    """Accuracy over all questions of a folder, printed by subject."""
    subjects = read_subjects(directory)
    right, total, shown_sum = 0, 0, 0
    print(f"{'subject':44} {'questions':>9} {'right':>6}")
    with Progress("questions", sum(len(subject.questions) for subject in subjects)) as bar:
        for subject in subjects:
            hits = 0
            for row in subject.questions:
                others = [
                    example for example in subject.examples if example is not row and example != row
                ]
                logprobs, shown = option_logprobs(model, tok, row, others[:shots])
                hits += OPTIONS[int(logprobs.argmax())] == row["answer"]
                shown_sum += shown
                bar.update()
            right, total = right + hits, total + len(subject.questions)
            bar.say(f"{subject.name:44} {len(subject.questions):9} {hits:6}")
    share = right / max(total, 1)
    error = math.sqrt(share * (1 - share) / max(total, 1))
    way = "leave one out" if subjects and subjects[0].left_out else "examples from dev"
    print(
        f"choices: {right} of {total} right = {share:.1%}, standard error {error:.1%}, chance 25.0%"
    )
    print(
        f"examples: {shots} asked for ({way}), {shown_sum / max(total, 1):.1f} fitted into the context on average"
    )
    return {"accuracy": share, "standard_error": error, "questions": total}


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
    stride: int | None = flag(
        None, at_least=1, help="tokens the window moves (default: half the context)"
    )
    documents: int | None = flag(None, at_least=1, help="score only the first N of each file")
    device: str = flag("auto", help="auto: cuda where there is one, else cpu")


def main(cfg: Config) -> dict:
    """Score texts, or choices, or both; returns the figures it prints."""
    if cfg.data is None and cfg.choices is None:
        raise UserError("say what to evaluate: --data FILES or --choices FOLDER")
    model, tok = load_with_tokenizer(cfg.model, cfg.device)
    context, results = model.cfg.max_position_embeddings, {}
    if cfg.data is not None:
        stride, total = cfg.stride or context // 2, Score()
        if stride > context:
            raise UserError(
                f"--stride {stride} exceeds the context of {context}: tokens would be skipped"
            )
        print(
            f"{'bits/byte':>8} {'bits/char':>9} {'perplexity':>11} {'tokens':>9} {'bytes':>11}   file"
        )
        for path in expand(cfg.data):
            score = Score()
            with Progress(path.name, None) as bar:
                for number, text in enumerate(read_texts([path])):
                    if cfg.documents is not None and number >= cfg.documents:
                        break
                    score += score_text(model, tok, text, stride)
                    bar.update()
            if not score.tokens:
                raise UserError(f"{path} holds no text to score")
            total += score
            print(f"{score}   {path}")
        print(
            f"{total}   all; context {context}, stride {stride}; a document's first token is not predicted"
        )
        results = {
            "bits_per_byte": total.nats / math.log(2) / max(total.bytes, 1),
            "tokens": total.tokens,
        }
    if cfg.choices is not None:
        results |= multiple_choice(model, tok, cfg.choices, cfg.shots)
    return results


if __name__ == "__main__":
    run_command(Config, main)
