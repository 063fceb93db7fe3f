"""The rewards of both answers during DPO: of the demo's pairs, and of pairs that are much alike."""

import nanophi
from docs.draw import BLUE, ORANGE
from examples import small
from nanophi.train.losses import make_dpo_loss_fn
from nanophi.train.optim import peak_rates, set_rates
from nanophi.train.reference import reference_logps

STEPS = 12
PAIRS = 6


def exchanged(text: str) -> str:
    """The same answer, its second and third clause exchanged."""
    clauses = text.split("，")
    clauses[1], clauses[2] = clauses[2], clauses[1]
    return "，".join(clauses)


def alike() -> list[tuple[str, str, str]]:
    """(prompt, chosen, rejected): a taught answer and the same one in another order."""
    taught = [(turns[0]["content"], turns[1]["content"]) for turns in small.conversations()]
    long_enough = [(prompt, answer) for prompt, answer in taught if answer.count("，") > 2]
    return [(prompt, answer, exchanged(answer)) for prompt, answer in long_enough]


def rewards(triples: list[tuple[str, str, str]]) -> dict[str, list[float]]:
    """The mean rewards of all pairs before each step."""
    tok = small.tokenizer()
    encoded = []
    for prompt, *answers in triples:
        asked = {"role": "user", "content": prompt}
        turns = [[asked, {"role": "assistant", "content": answer}] for answer in answers]
        encoded.append(nanophi.Preference(*(nanophi.encode_chat(each, tok) for each in turns)))
    model = small.model("sft")
    data = nanophi.Pairs(encoded, batch_pairs=len(encoded), seed=0)
    data.reference = reference_logps(model, data, micro_batch=4)
    loss_fn = make_dpo_loss_fn()
    optimizers = nanophi.build_optimizers(model, "muon", lr=5e-4, weight_decay=0.1)
    peaks = peak_rates(optimizers)
    found: dict[str, list[float]] = {"rewards_chosen": [], "rewards_rejected": []}
    for step in range(STEPS):
        set_rates(optimizers, peaks, nanophi.schedule("constant", step, STEPS, warmup=4))
        loss, count, metrics = loss_fn(model, data.batch_at(step))
        (loss / count).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        for name, values in found.items():
            values.append(round(metrics[name].item() / count, 3))
    return found


def data() -> dict:
    return {"written": rewards(small.pairs()[:PAIRS]), "alike": rewards(alike()[:PAIRS])}


def draw(figure, data: dict) -> None:
    left, right = figure.subplots(1, 2, sharey=True)
    titles = {"written": "two different answers", "alike": "one answer, two clauses exchanged"}
    for axes, (name, curves) in zip((left, right), data.items(), strict=True):
        axes.axhline(0, color="black", linewidth=0.5)
        axes.plot(curves["rewards_chosen"], color=BLUE, marker=".", label="chosen")
        axes.plot(curves["rewards_rejected"], color=ORANGE, marker=".", label="rejected")
        axes.set_title(titles[name], fontsize=10)
        axes.set_xlabel("step")
    left.set_ylabel("reward")
    left.legend(frameon=False, loc="lower left")
