"""What the model writes at each evaluation of a training run: a sample to read, and how long its
answers are.

sample: 春天来了，小草从土里探出头来……

The sample is printed, and metrics.jsonl keeps it beside the figures of that step.
"""

from collections.abc import Callable
from typing import Any

from nanophi.infer.generate import fits, generate
from nanophi.model.phi import Phi
from nanophi.tokenizer.tokenizer import Tokenizer


def evaluating_aloud(
    evaluate: Callable | None, tok: Tokenizer, prompt: list[int], tokens: int = 60
) -> Callable:
    """An `evaluate` for the training loop that also tells how the model continues a prompt.

    evaluate: model -> figures, called after the sample; None: there are no figures
    prompt: its ids; of a prompt that fills the context only the last half context is read, because
        a sample must not stop a training run
    tokens: of the continuation, which is greedy, so that samples of different steps compare
    """

    def evaluated(model: Phi) -> dict[str, Any]:
        was_training = model.training
        model.eval()
        half = model.cfg.max_position_embeddings // 2
        ids = generate(model, prompt if fits(model, prompt) else prompt[-half:], tokens)
        model.train(was_training)
        written = tok.decode(ids, skip_special_tokens=True)
        print("sample:", (tok.decode(prompt) + written).replace("\n", "⏎"))
        figures = evaluate(model) if evaluate is not None else {}
        return figures | {"sample": written}

    return evaluated


def answer_length(model: Phi, prompts: list[list[int]], longest: int) -> float:
    """The mean number of tokens of a model's greedy answers, each cut at `longest`."""
    was_training = model.training
    model.eval()
    answers = generate(model, prompts, longest)
    model.train(was_training)
    return sum(map(len, answers)) / len(answers)
