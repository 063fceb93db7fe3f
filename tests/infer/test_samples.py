"""The sample that training prints at each evaluation, and keeps."""

from nanophi import generate
from nanophi.infer.samples import evaluating_aloud
from tests.conftest import tiny_model


def test_the_sample_is_greedy_and_the_model_goes_on_training(tok, capsys):
    model = tiny_model(spread=0.3).train()
    prompt = tok.encode("春天来了")
    figures = evaluating_aloud(lambda model: {"val_loss": 1.0}, tok, prompt, tokens=5)(model)
    assert model.training
    answer = tok.decode(generate(model.eval(), prompt, 5), skip_special_tokens=True)
    assert figures == {"val_loss": 1.0, "sample": answer}
    assert capsys.readouterr().out == f"sample: 春天来了{answer}".replace("\n", "⏎") + "\n"
    assert evaluating_aloud(None, tok, prompt, tokens=5)(model) == {"sample": answer}


def test_a_prompt_longer_than_the_context_does_not_stop_training(tok, capsys):
    for length in (64, 65, 1000):
        prompt = [7] * length
        evaluating_aloud(None, tok, prompt, tokens=5)(tiny_model(spread=0.3))  # context 64
        assert capsys.readouterr().out.startswith(f"sample: {tok.decode(prompt)}")
