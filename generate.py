"""Answer a prompt, chat in the terminal or in a browser, answer from documents, compare two models,
or learn from a person which of two answers is better.

    python generate.py --model out/dpo --prompt 感冒了要怎么办？
    python generate.py --model out/dpo --chat
    python generate.py --model out/dpo --rag documents/ --prompt 黄河的水为什么那么黄？
    python generate.py --model out/sft --compare out/dpo
    python generate.py --model out/sft --compare out/dpo --prefer mine.jsonl
    python generate.py --model out/sft --temperature 0.8 --prefer mine.jsonl
    python generate.py --model out/dpo --serve

Greedy unless --temperature is given. With --prompt only the answer goes to standard output
(sources to standard error); without it, --chat, --rag and --compare ask for questions until /exit
or Ctrl-D. /reset forgets what was said, /save FILE.jsonl keeps it, Ctrl-C stops an answer and not
the program. An answer ends where the context of the model is full, with a note on standard error.

--prefer shows two answers to each question, in random order and without names: those of both
models, or two samples of one. Type 1 or 2 for the better one, or s to skip. Each choice is appended
to the file at once, as a row that dpo.py reads, so Ctrl-C and Ctrl-D lose nothing. A file of such
rows is continued. Each question stands alone: no turn before it is shown to the models.

--serve opens a page to chat on, and an API in the form of OpenAI's, http://HOST:PORT/v1. Requests
are answered together; the sampling flags hold where a request says nothing. With --compare both
models are there, with --prefer the page asks which answer is better. --api-key, or the environment
variable NANOPHI_API_KEY, lets in only those who know it.
"""

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from nanophi.claims import Output, claim
from nanophi.cli import UserError, flag, run_command
from nanophi.infer.chat_modes import Reply, chatting, comparing, converse, each_line, retrieving
from nanophi.infer.engine import Engine
from nanophi.infer.generate import stream
from nanophi.infer.prefer import Preferences, preferring
from nanophi.infer.rag import FOUND, build_index
from nanophi.infer.sampling import FILTERS, FLAGS, Sampling
from nanophi.model.checkpoint import DTYPES, load_with_tokenizer
from nanophi.model.phi import DECODING_WEIGHTS, Phi
from nanophi.tokenizer.chat import chat_prompt
from nanophi.tokenizer.template import template_flag
from nanophi.tokenizer.tokenizer import Tokenizer


@dataclass(kw_only=True)
class Config:
    model: str = flag(help="a checkpoint directory, as pretrain.py, sft.py and dpo.py write")
    prompt: str | None = flag(
        None, help="one question, put into the chat template; the answer is printed"
    )
    chat: bool = flag(False, help="ask questions at the terminal; /exit or Ctrl-D ends")
    rag: list[str] | None = flag(
        None, help="answer from these documents: files, directories or globs"
    )
    compare: str | None = flag(
        None, help="a second checkpoint, whose answer is put beside the first's"
    )
    prefer: str | None = flag(
        None, help="ask which of two answers is better, and append the choices to this .jsonl"
    )
    serve: bool = flag(False, help="a page in the browser and an API; needs starlette and uvicorn")
    host: str = flag("127.0.0.1", help="--serve: 0.0.0.0 lets other machines in")
    port: int = flag(8000, at_least=0, at_most=65535, help="--serve: 0 takes a free one")
    api_key: str | None = flag(None, help="--serve: what clients have to know")
    rows: int = flag(8, at_least=1, at_most=1024, help="--serve: answers at the same time")
    queue: int = flag(64, at_least=1, at_most=10**6, help="--serve: requests that may wait")
    raw: bool = flag(False, help="continue --prompt as it is, without the template")
    history: int = flag(
        0,
        at_least=0,
        help="earlier turns that --chat shows the model; 0 suits single-turn teaching",
    )
    chunks: int = flag(2, at_least=1, help="--rag: best chunks given to the model")
    chunk_tokens: int = flag(
        96, at_least=16, help="--rag: longest chunk; the demo's model wants one of 32, a sentence"
    )
    threshold: float = flag(
        FOUND, at_least=0, help="--rag: best score (0 to 1) below which nothing counts as found"
    )
    max_new_tokens: int = flag(256, at_least=1, help="longest answer")
    sampling: dict = flag(table=FLAGS)  # --temperature, --top-k ...: one flag for each filter
    lookup: int = flag(
        0,
        at_least=0,
        help="guess so many tokens a step from the prompt; 3 suits --rag; greedy only",
    )
    speed: bool = flag(False, help="say on standard error how many tokens a second came")
    seed: int = flag(0, at_least=0, help="of the sampling, and of the order with --prefer")
    bos: bool = flag(False, help="put [BOS] first, for models trained with --bos")
    template: str | None = template_flag()
    weights: str = flag(
        "auto",
        choices=DECODING_WEIGHTS,
        help="how a CPU keeps them: fp16 and int8 are read faster; auto: fp16 where it can",
    )
    dtype: str = flag(
        "auto",
        choices=("auto", *DTYPES),
        help="of the weights; auto: bfloat16 on a GPU that has it, else float32",
    )
    device: str = flag("auto", help="auto: cuda where there is one, else cpu")


def main(cfg: Config) -> None:
    # 1. what to do
    check(cfg)
    if cfg.serve:
        serve(cfg)
        return
    if cfg.prefer is not None:
        prefer(cfg)
        return

    # 2. the model
    model, tok = loaded(cfg.model, cfg)

    # 3. a prompt as it is
    if cfg.raw:
        prompt = tok.encode(cfg.prompt)
        answer(model, tok, [tok.bos_id, *prompt] if cfg.bos else prompt, cfg)
        return

    # 4. one question, or a conversation
    start = way_to_reply(model, tok, cfg)
    if cfg.prompt is not None:
        reply = start()
        reply(cfg.prompt)
    else:
        converse(start)


def loaded(directory: str, cfg: Config) -> tuple[Phi, Tokenizer]:
    """The model of a checkpoint, and its tokenizer, as the flags want them."""
    return load_with_tokenizer(directory, cfg.device, cfg.template, cfg.weights, cfg.dtype)


def check(cfg: Config) -> None:
    """Refuse flags that contradict each other, before the model is loaded."""
    modes = [name for name in ("chat", "rag", "compare") if getattr(cfg, name)]
    if cfg.serve:
        check_serve(cfg)
        modes = ["serve"]
    elif cfg.prefer is not None:
        check_prefer(cfg)
        modes = ["prefer"]
    nothing_to_do = not modes and cfg.prompt is None
    if len(modes) > 1 or nothing_to_do or (cfg.chat and cfg.prompt is not None):
        raise UserError(
            "say what to do: --prompt TEXT, --chat or --serve; --rag FILES, --compare DIR or "
            "--prefer FILE, with --prompt or without"
        )
    if cfg.raw and modes:
        raise UserError(f"--raw goes with --prompt alone: --{modes[0]} needs the template")
    how = Sampling(**cfg.sampling)
    for_sampling = [name for name in FILTERS if name != "temperature" and not FILTERS[name].greedy]
    if how.greedy and any(name in how.chosen for name in for_sampling):
        flags = " and ".join("--" + name.replace("_", "-") for name in for_sampling)
        raise UserError(f"{flags} choose among sampled tokens: give --temperature too, 0.8 say")
    if cfg.prompt is not None and not cfg.prompt.strip():
        raise UserError("--prompt is empty: there is no question to answer")
    if cfg.compare is not None and os.path.realpath(cfg.compare) == os.path.realpath(cfg.model):
        raise UserError(f"--compare {cfg.compare} is the model itself: name another")


def check_serve(cfg: Config) -> None:
    """Refuse flags that contradict --serve."""
    others = [name for name in ("chat", "rag", "prompt", "raw") if getattr(cfg, name)]
    if others:
        raise UserError(f"--serve goes without --{others[0]}: the page and its users ask")


def check_prefer(cfg: Config) -> None:
    """Refuse flags that contradict --prefer."""
    if cfg.chat or cfg.rag:
        other = "--chat" if cfg.chat else "--rag"
        raise UserError(
            f"--prefer asks about single questions and goes without {other}: leave one of them out"
        )
    if cfg.compare is None and Sampling(**cfg.sampling).greedy:
        raise UserError(
            "--prefer without --compare shows two samples of one model, which would be equal: give "
            "--temperature too, 0.8 say, or --compare DIR"
        )


def serve(cfg: Config) -> None:
    """Serve the model, and that of --compare, until Ctrl-C."""
    from nanophi.infer.openai_api import Defaults
    from nanophi.infer.server import Settings, listen, serve_at

    directories = [path for path in (cfg.model, cfg.compare) if path is not None]
    outputs = [] if cfg.prefer is None else [Output("--prefer", cfg.prefer, suffix=".jsonl")]
    with claim(directories, *outputs), listen(cfg.host, cfg.port) as listening:
        preferences = None if cfg.prefer is None else Preferences(cfg.prefer)
        engines = {}
        for directory in directories:
            model, tok = loaded(directory, cfg)
            name = os.path.basename(os.path.realpath(directory))
            engines[directory if name in engines else name] = Engine(
                model, tok, cfg.rows, cfg.queue
            )
        settings = Settings(
            api_key=cfg.api_key or os.environ.get("NANOPHI_API_KEY"),
            history=cfg.history,
            defaults=Defaults(cfg.max_new_tokens, cfg.sampling, cfg.bos),
        )
        serve_at(listening, engines, settings, preferences)


def prefer(cfg: Config) -> None:
    """Ask which of two answers is better, about one question or many, and keep the choices."""
    assert cfg.prefer is not None
    inputs = [path for path in (cfg.model, cfg.compare) if path is not None]
    with claim(inputs, Output("--prefer", cfg.prefer, suffix=".jsonl")):
        preferences = Preferences(cfg.prefer)  # checked before the models are loaded
        model, tok = loaded(cfg.model, cfg)
        second, second_tok = model, tok
        if cfg.compare is not None:
            second, second_tok = loaded(cfg.compare, cfg)
        # One generator goes on through all answers, so that no two samples begin alike.
        generator = torch.Generator(model.device).manual_seed(cfg.seed)
        answers = (
            silent_answers(model, tok, cfg, generator),
            silent_answers(second, second_tok, cfg, generator),
        )
        ask = preferring(answers, preferences, cfg.seed)
        if cfg.prompt is not None:
            ask(cfg.prompt)
        else:
            each_line(ask)
        print(preferences)


def way_to_reply(model: Phi, tok: Tokenizer, cfg: Config) -> Callable[[], Reply]:
    """A function that starts a conversation: by --rag, by --compare, otherwise as a chat."""

    engine = None
    # It need not read again what the last turn has read. A GPU reads that in no time, and `stream`
    # makes it decode faster.
    if cfg.chat and not cfg.lookup and model.device.type != "cuda":
        engine = Engine(model, tok, rows=1).start()

    def say(prompt: list[int]) -> str:
        return answer(model, tok, prompt, cfg, engine=engine)

    if cfg.rag:
        index = build_index(cfg.rag, tok, cfg.chunk_tokens)
        return lambda: retrieving(say, tok, index, cfg.chunks, cfg.threshold, cfg.bos)
    if cfg.compare:
        second, second_tok = loaded(cfg.compare, cfg)
        models = {
            cfg.model: silent_answers(model, tok, cfg),
            cfg.compare: silent_answers(second, second_tok, cfg),
        }
        return lambda: comparing(models)
    return lambda: chatting(say, tok, model.cfg.max_position_embeddings, cfg.history, cfg.bos)


def silent_answers(
    model: Phi, tok: Tokenizer, cfg: Config, generator: torch.Generator | None = None
) -> Callable[[str], str]:
    """A function from a question to a model's answer, which shows nothing."""

    def answer_to(question: str) -> str:
        prompt = chat_prompt(question, tok, cfg.bos)
        return answer(model, tok, prompt, cfg, show=False, generator=generator)

    return answer_to


def answer(
    model: Phi,
    tok: Tokenizer,
    prompt: list[int],
    cfg: Config,
    show: bool = True,
    generator: torch.Generator | None = None,
    engine: Engine | None = None,
) -> str:
    """Answer a prompt; with `show`, print each piece as it comes.

    generator: of random numbers; by default a new one, so that the same prompt has the same answer
    engine: of the same model, which then answers; it remembers what it has read
    """
    if engine is not None:
        how = cfg.sampling
        stream_of_pieces = engine.stream(prompt, cfg.max_new_tokens, seed=cfg.seed, how=how)
    else:
        if generator is None:
            generator = torch.Generator(model.device).manual_seed(cfg.seed)
        stream_of_pieces = stream(
            model,
            tok,
            prompt,
            cfg.max_new_tokens,
            generator=generator,
            lookup=cfg.lookup,
            **cfg.sampling,
        )
    pieces: list[str] = []
    began = time.perf_counter()
    while True:
        try:
            piece = next(stream_of_pieces)
        except StopIteration as end:
            context_is_full = end.value
            break
        pieces.append(piece)
        if show:
            print(piece, end="", flush=True)
    if show:
        print()
    if cfg.speed:
        seconds = time.perf_counter() - began
        tokens = len(tok.encode("".join(pieces)))
        print(f"({tokens} tokens, {tokens / seconds:,.0f} a second)", file=sys.stderr)
    if context_is_full:
        context = model.cfg.max_position_embeddings
        print(f"(the answer stops: the context of {context} tokens is full)", file=sys.stderr)
    return "".join(pieces)


if __name__ == "__main__":
    run_command(Config, main)
