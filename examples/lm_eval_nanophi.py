"""nanophi in lm-evaluation-harness (pip install lm-eval): its tasks, asked of a checkpoint.

    python examples/lm_eval_nanophi.py --model out/demo/dpo --tasks DIR_OR_NAME

DIR holds tasks of your own, as .yaml; NAME is one of the harness, which fetches its questions.
Left out: chat templates (evaluate.py has --in-chat), batches, the harness's cache within a run.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # nanophi need not be installed

import torch
from lm_eval import simple_evaluate, tasks, utils
from lm_eval.api.model import LM
from lm_eval.models.utils import normalize_gen_kwargs

from nanophi.cli import flag, run_command
from nanophi.infer.generate import stream
from nanophi.model.checkpoint import load_with_tokenizer


class NanophiLM(LM):
    def __init__(self, model, tok):
        super().__init__()
        self.model = model
        self.tok = tok
        self.context = model.cfg.max_position_embeddings

    @torch.inference_mode()
    def score(self, before, ids):
        """(log p of `ids` behind the ids `before`, whether each of them is the likeliest)."""
        both = torch.tensor([*before, *ids], device=self.model.device)[-self.context - 1 :]
        states = self.model.hidden(both[None, :-1])[0, -len(ids) :]
        logprobs = self.model.lm_head(states).float().log_softmax(-1)  # (ids, V)
        of_ids = logprobs.gather(1, both[-len(ids) :, None])
        return of_ids.sum().item(), bool((of_ids == logprobs.amax(1, keepdim=True)).all())

    def loglikelihood(self, requests):  # both texts are encoded alone, as in evaluate.py
        pairs = [map(self.tok.encode, request.args) for request in requests]
        return [self.score(before or [self.tok.eos_id], ids) for before, ids in pairs]

    def loglikelihood_rolling(self, requests):
        return [self.rolling(*request.args) for request in requests]

    def rolling(self, text):  # behind [EOS], each token once, in the windows of the harness
        ids = self.tok.encode(text)
        windows = utils.get_rolling_token_windows(ids, self.tok.eos_id, self.context, context_len=1)
        return sum(self.score(*utils.make_disjoint_window(window))[0] for window in windows)

    def generate_until(self, requests):
        return [self.answer(*request.args) for request in requests]

    def answer(self, text, settings):
        how = normalize_gen_kwargs(settings)
        longest, stop, _ = (how.pop(name) for name in ("max_gen_toks", "until", "do_sample"))
        kept = max(self.context - longest, self.context // 2)  # of a long prompt, its end
        prompt = self.tok.encode(text)[-kept:] or [self.tok.eos_id]
        return "".join(stream(self.model, self.tok, prompt, longest, stop=stop, **how))


@dataclass
class Config:
    model: str = flag(help="the directory of a checkpoint")
    tasks: str = flag(help="a directory of tasks, or the name of one of the harness's")


def main(cfg: Config) -> None:
    own = cfg.tasks if Path(cfg.tasks).is_dir() else None
    known = tasks.TaskManager(include_path=own, include_defaults=own is None)
    names = known.all_tasks if own else [cfg.tasks]
    lm = NanophiLM(*load_with_tokenizer(cfg.model))
    print(utils.make_table(simple_evaluate(lm, tasks=names, task_manager=known)))


if __name__ == "__main__":
    run_command(Config, main)
