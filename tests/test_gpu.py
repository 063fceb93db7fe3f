"""Training on a GPU, against the plain network on the CPU. Skipped where there is no GPU.

    NANOPHI_TEST_DEVICE=cpu python -m pytest tests/test_gpu.py    on the CPU, to try the tests

What can be known without a GPU is tested elsewhere: devices and waits in test_devices.py, operators
and graphs in train/test_launches.py, decoding in infer/test_static.py.
"""

import copy
import json
import math
import os
import queue
import warnings
from functools import partial
from types import SimpleNamespace

import pytest
import torch

import pretrain
import train_tokenizer
from nanophi.infer.decoder import Decoder
from nanophi.infer.engine import Engine, Request
from nanophi.infer.generate import generate
from nanophi.infer.static import FewKernels
from nanophi.model import attention, backends, speed
from nanophi.text import shards
from nanophi.train import losses, precision
from nanophi.train.distributed import World
from nanophi.train.loop import train
from nanophi.train.losses import next_token_loss, validate
from nanophi.train.optim import build_optimizers
from nanophi.train.packing import Packed
from nanophi.train.preferences import Pairs
from nanophi.train.step import training_step
from tests.conftest import RAW, tiny_model, write
from tests.train.test_loop import config, random_documents, random_pairs

ASKED = os.environ.get("NANOPHI_TEST_DEVICE")
DEVICE = ASKED or ("cuda" if torch.cuda.is_available() else None)
ON_CUDA = DEVICE is not None and DEVICE.startswith("cuda")
WORLD = World(0, 1, DEVICE or "cpu")

pytestmark = [
    pytest.mark.skipif(DEVICE is None, reason="there is no GPU"),
    # torch's compiler warns of torch's own code.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*TensorFloat32.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*[Ss]ynchroniz.*:UserWarning"),
]

WIDE = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 256}  # heads of 16
OF_60 = {"hidden_size": 120, "num_attention_heads": 2, "intermediate_size": 256}


def data(batch_rows=8):
    return Packed(random_documents(), 32, batch_rows, seed=1)


def half_if_gpu():
    dtype = "bfloat16" if ON_CUDA else "float32"
    return precision.autocast(dtype, DEVICE, cache=False)


def step_of(model, batch, loss_fn=next_token_loss, device=None, autocast=None, **more):
    """The loss and the gradients of one step, on the CPU in fp32."""
    model.to(device or DEVICE)
    world = World(0, 1, device or DEVICE)
    named = {"autocast": autocast} if autocast else {}
    result = training_step(model, [], loss_fn, batch, 4, world, **named, **more)
    gradients = {name: p.grad.cpu().float() for name, p in model.named_parameters()}
    return result.means["loss"], gradients


def distance(found, wanted):
    """How far gradients are from others, as a share of their norm."""
    difference = sum((found[name] - wanted[name]).square().sum() for name in wanted)
    return math.sqrt(difference / sum(x.square().sum() for x in wanted.values()))


@pytest.fixture(params=[WIDE, OF_60], ids=["heads of 16", "heads of 60"])
def shape(request):
    return request.param


def test_a_step_in_fp32_is_that_of_the_cpu(shape):
    plain, fast = tiny_model(**shape), tiny_model(**shape)
    speed.speed_up(fast)
    loss, gradients = step_of(plain, data().batch_at(0), device="cpu")
    on_gpu, found = step_of(fast, data().batch_at(0))
    assert on_gpu == pytest.approx(loss, rel=1e-5)
    assert distance(found, gradients) < 1e-3  # TF32 is off, sums have another order


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_step_in_bf16_is_near_it(shape, compiled):
    """With flash attention and the fused loss where they are."""
    plain, fast = tiny_model(**shape), tiny_model(**shape)
    speed.speed_up(fast, compile=compiled)
    batch = data().batch_at(0)
    loss, gradients = step_of(plain, batch, device="cpu")
    on_gpu, found = step_of(fast, batch, autocast=half_if_gpu)
    assert on_gpu == pytest.approx(loss, rel=1e-2)
    assert distance(found, gradients) < 5e-2


def test_fp16_is_scaled(shape):
    if not ON_CUDA:
        pytest.skip("a CPU computes fp16 too slowly")
    plain, fast = tiny_model(**shape), tiny_model(**shape)
    speed.speed_up(fast)
    loss, gradients = step_of(plain, data().batch_at(0), device="cpu")
    half = partial(precision.autocast, "float16", DEVICE, cache=False)
    on_gpu, found = step_of(fast, data().batch_at(0), autocast=half, scale=32.0)
    assert on_gpu == pytest.approx(loss, rel=1e-2)
    assert distance(found, gradients) < 5e-2


def test_documents_stay_isolated():
    """A change in one document changes no loss of another, whatever kernel attends."""
    model = tiny_model(**WIDE).to(DEVICE).eval()
    rows = data().batch_at(0)
    batch = next(row for n in range(8) if len((row := rows.cut(n, n + 1)).cu_seqlens) > 2)
    ends = batch.cu_seqlens.tolist()
    other = copy.copy(batch)
    other.ids = batch.ids.clone()
    other.ids[0, : ends[1]] = 9
    with torch.no_grad(), half_if_gpu():
        states = [
            model.hidden(b.ids.to(DEVICE), b.cu_seqlens.to(DEVICE), longest=b.longest)
            for b in (batch, other)
        ]
    a, b = (x[0, ends[1] :].float() for x in states)
    assert torch.equal(a, b)
    assert not torch.equal(states[0][0, : ends[1]], states[1][0, : ends[1]])


def test_the_fused_loss_is_the_readable_one():
    torch.manual_seed(0)
    logits = 3 * torch.randn(300, 5000, device=DEVICE)
    targets = torch.randint(5000, (300,), device=DEVICE)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        rows = logits.to(dtype)
        wanted = losses.softmax_loss(rows.clone(), targets)
        for a, b in zip(speed.fused_softmax_loss(rows, targets), wanted, strict=True):
            assert (a - b).abs().max() <= tolerance * b.abs().max()


def test_a_step_waits_once_for_the_gpu():
    """As PyTorch itself counts it. Copies of pinned memory are no waits."""
    if not ON_CUDA:
        pytest.skip("a CPU waits for nobody")
    model = tiny_model(**WIDE).to(DEVICE)
    speed.speed_up(model)
    optimizers = build_optimizers(model, "muon", 1e-3, 0.1)

    def step(number):
        batch = data().batch_at(number)
        training_step(model, optimizers, next_token_loss, batch, 4, WORLD, 1.0, half_if_gpu)

    for number in range(3):
        step(number)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            step(3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [str(each.message) for each in seen if "synchroniz" in str(each.message).lower()]
    assert len(waits) <= 1, waits


def test_nothing_is_compiled_after_the_first_steps():
    torch._dynamo.reset()
    made = torch._dynamo.utils.counters["stats"]
    model = tiny_model(num_hidden_layers=10, **WIDE).to(DEVICE)
    if not ON_CUDA:
        model.attention = "sdpa"  # documents one by one are Python, which no compiler reads
    speed.speed_up(model, compile=True)
    optimizers = build_optimizers(model, "muon", 1e-3, 0.1)
    graphs = []
    for step in range(6):
        batch = data().batch_at(step)
        training_step(model, optimizers, next_token_loss, batch, 4, WORLD, 1.0, half_if_gpu)
        if step == 1:
            with half_if_gpu():
                validate(model, next_token_loss, data().in_order())
        graphs.append(made["unique_graphs"])
    assert graphs[-1] == graphs[1]


def test_pairs_that_share_their_prompts():
    loss_fn = losses.make_dpo_loss_fn()
    results = []
    for device in ("cpu", DEVICE):
        pairs = Pairs(random_pairs(8), 8, seed=1, share=True)
        pairs.reference = torch.zeros(len(pairs), 2)
        results.append(step_of(tiny_model(**WIDE), pairs.batch_at(0), loss_fn, device))
    (loss, gradients), (on_gpu, found) = results
    assert on_gpu == pytest.approx(loss, rel=1e-4)
    assert distance(found, gradients) < 1e-3


def test_a_run_stops_and_goes_on(tmp_path):
    """With all that is the default on this device: dtype, compiler, micro-batch."""
    options = {"device": DEVICE, "micro_batch": None, "steps": 8}
    documents = data()

    def run(out, **more):
        made = config(tmp_path / out, **options)
        train(tiny_model(**WIDE), next_token_loss, documents.batch_at, made, **more)
        lines = (tmp_path / out / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line)["loss"] for line in lines]

    whole = run("whole")
    run("parts", stop_at=4)
    parts = run("parts", resume="yes")
    assert len(parts) == len(whole) == 8
    assert parts == pytest.approx(whole, rel=1e-2)
    assert whole[-1] < whole[0]


def test_pretraining_with_the_defaults(tmp_path):
    """The command, from raw text: it compiles, and finds its micro-batch."""
    raw = write(tmp_path / "raw.jsonl", [{"text": text} for text in RAW])
    tokenizer, tokens = str(tmp_path / "tokenizer"), str(tmp_path / "tokens")
    train_tokenizer.main(train_tokenizer.Config(input=[raw], out=tokenizer, vocab_size=500))
    shards.main(shards.Config(input=[raw], tokenizer=tokenizer, out=tokens))
    cfg = pretrain.Config(
        data=tokens,
        tokenizer=tokenizer,
        out=str(tmp_path / "out"),
        preset="demo",
        layers=2,
        context=32,
        batch_tokens=32,
        steps=4,
        warmup=1,
        device=DEVICE,
    )
    pretrain.main(cfg)
    made = json.loads((tmp_path / "out" / "run.json").read_text())["config"]
    assert made["compile"] is ON_CUDA
    assert made["micro_batch"] >= 1


def test_an_engine_answers_as_the_model_alone():
    """Three rows of unequal lengths in two places of the cache."""
    model = tiny_model(spread=0.3, **WIDE).to(DEVICE).eval()
    prompts = [[7, 50, 200, 33], [9], [5, 6] * 10]
    answers = [queue.SimpleQueue() for _ in prompts]
    letters = SimpleNamespace(id_to_bytes=dict.fromkeys(range(model.cfg.vocab_size), b"."))
    with Engine(model, letters, rows=2) as engine:
        assert isinstance(engine.network, FewKernels if ON_CUDA else Decoder)
        for prompt, answer in zip(prompts, answers, strict=True):
            engine.submit(Request(prompt, answer.put, 20))
        for prompt, answer in zip(prompts, answers, strict=True):
            pieces = [answer.get(timeout=60)]
            while pieces[-1].finish is None:
                pieces.append(answer.get(timeout=60))
            said = [piece.token.id for piece in pieces if piece.token is not None]
            assert said == generate(model, prompt, 20)


def test_the_kernel_of_flash_attention():
    """Which one it is, is printed; the documents of a batch are its rows."""
    if not ON_CUDA:
        pytest.skip("there is no flash attention on a CPU")
    print(backends.flash_kernel())
    q, k, v = (torch.randn(1, 4, 512, 64, device=DEVICE, dtype=torch.bfloat16) for _ in range(3))
    boundaries = torch.tensor([0, 100, 356, 512], dtype=torch.int32, device=DEVICE)
    visible = attention.same_document(boundaries, 1, 512)
    wanted = attention.manual(q, k, v, visible)
    for longest in (256, 512, None):
        found = backends.varlen(q, k, v, boundaries, longest=longest)
        assert (found - wanted).abs().max() < 2e-2
