"""Tokens a second of the server with 1, 8 and 100 streaming clients, beside `generate` for one.

    python bench/serving.py --model out/demo/dpo
    python bench/serving.py --model out/demo/dpo --seconds 60      # and clients that misbehave

The server runs on --cores of its own, as `generate.py --serve` starts it. All clients run here, on
the other cores; each asks one question after the other. With --seconds, 100 clients ask for so
long, 30 more vanish in the middle of answers, and 10 more read one byte a second: what fails, what
differs from the answer that one client alone gets, and the server's memory are counted.
"""

import asyncio
import contextlib
import json
import os
import random
import re
import socket
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import httpx2
from machine import cpu_has, cpu_name, measured_alone
from table import print_head, print_row

from nanophi.cli import flag, run_command

ROOT = Path(__file__).resolve().parents[1]
PROMPTS = 40
LONG = 400  # tokens of the prompt of a first turn


@dataclass(kw_only=True)
class Config:
    model: str = flag(help="a checkpoint with its tokenizer")
    weights: str = flag("auto", help="of both sides, as generate.py takes it")
    streams: list[int] | None = flag(None, help="clients at once (default: 1 8 100)")
    tokens: int = flag(60, at_least=1, help="longest answer")
    rows: int = flag(16, at_least=1, help="of the server")
    cores: int = flag(1, at_least=1, help="of each side")
    seconds: int = flag(0, at_least=0, help="also let clients misbehave for so long")


def main(cfg: Config) -> None:
    cores = sorted(os.sched_getaffinity(0))
    mine = cores[-cfg.cores :]
    os.sched_setaffinity(0, cores[: -cfg.cores] or cores)
    features = [name for name in ("avx512f", "avx2") if cpu_has(name)]
    print(f"{cfg.cores} core(s) of {cpu_name()} ({', '.join(features)}), weights {cfg.weights}\n")
    given = ["generate", cfg.model, cfg.weights, str(cfg.tokens), str(cfg.cores)]
    alone = measured_alone(__file__, given, mine)
    assert alone is not None
    print_head("clients", "tokens/s", "x generate", "first token, ms")
    print_row("generate", f"{alone['speed']:,.0f}", "1.00", "")
    process, url = start(cfg, mine)
    try:
        for clients in cfg.streams or [1, 8, 100]:
            speed, first = asyncio.run(ask_all(url, clients, cfg.tokens))
            ratio = f"{speed / alone['speed']:.2f}"
            print_row(str(clients), f"{speed:,.0f}", ratio, f"{first * 1000:.0f}")
        first, second = asyncio.run(two_turns(url))
        print(
            f"\nfirst token of a prompt of {LONG} tokens: {first * 1000:.0f} ms; of the next turn, "
            f"which begins with it: {second * 1000:.0f} ms ({first / second:.1f} x faster)"
        )
        if cfg.seconds:
            print(asyncio.run(stress(url, process.pid, cfg.seconds, cfg.tokens)))
    finally:
        process.terminate()
        process.wait(60)


def start(cfg: Config, cores: list[int]) -> tuple[subprocess.Popen, str]:
    command = [
        sys.executable, str(ROOT / "generate.py"), "--model", cfg.model, "--serve", "--port", "0",
        "--weights", cfg.weights, "--rows", str(cfg.rows), "--queue", "1000",
    ]  # fmt: skip
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": str(cfg.cores), "PYTHONPATH": str(ROOT)},
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
    )
    assert process.stdout is not None
    found = re.search(r"http://[\d.:]+", process.stdout.readline())
    assert found is not None
    return process, found.group()


def prompt_of(number: int) -> list[int]:
    number %= PROMPTS
    return [7 + (number * 31 + i * 13) % 900 for i in range(12 + number % 20)]


# ---- what clients do


async def ask(client: httpx2.AsyncClient, url: str, prompt: list[int], tokens: int) -> dict:
    """Ask for one answer, by a stream: its ids, its text, and when the first token came."""
    body = {"prompt": prompt, "max_tokens": tokens, "stream": True,
            "return_token_ids": True}  # fmt: skip
    began = time.perf_counter()
    said: dict = {
        "ids": [],
        "text": "",
        "status": 0,
        "first": 0.0,
        "whole": False,
    }
    async with client.stream("POST", f"{url}/v1/completions", json=body) as answer:
        said["status"] = answer.status_code
        async for line in answer.aiter_lines():
            if line == "data: [DONE]":
                said["whole"] = True
            elif line.startswith("data: "):
                event = json.loads(line[6:])
                if "error" in event:
                    break
                said["first"] = said["first"] or time.perf_counter() - began
                said["ids"] += event["choices"][0]["token_ids"]
                said["text"] += event["choices"][0]["text"]
    return said


def connections() -> httpx2.AsyncClient:
    return httpx2.AsyncClient(timeout=120, limits=httpx2.Limits(max_connections=None))


async def ask_all(url: str, clients: int, tokens: int) -> tuple[float, float]:
    """Tokens a second while `clients` ask two or more questions each, and the median wait."""
    questions = max(2, 40 // clients)
    async with connections() as client:
        await ask(client, url, prompt_of(0), tokens)  # what is made at the first use

        async def one(number: int) -> list[dict]:
            asked = [prompt_of(number + clients * i) for i in range(questions)]
            return [await ask(client, url, prompt, tokens) for prompt in asked]

        began = time.perf_counter()
        answers = [
            a for several in await asyncio.gather(*map(one, range(clients))) for a in several
        ]
        seconds = time.perf_counter() - began
    assert all(answer["whole"] for answer in answers)
    count = sum(len(answer["ids"]) for answer in answers)
    return count / seconds, statistics.median(answer["first"] for answer in answers)


async def two_turns(url: str, times: int = 9) -> tuple[float, float]:
    """The median wait for the first token of a long prompt, and of the turn behind it."""
    waits: tuple[list[float], list[float]] = ([], [])
    async with connections() as client:
        for number in range(times):
            prompt = [7 + (number * 997 + i * 31) % 1500 for i in range(LONG)]
            for several in waits:
                said = await ask(client, url, prompt, 8)
                several.append(said["first"])
                prompt = [*prompt, *said["ids"], *range(20, 40)]
    return statistics.median(waits[0]), statistics.median(waits[1])


@dataclass
class Stress:
    """What the clients have seen."""

    answers: int = 0
    refused: int = 0  # 429
    errors: int = 0  # 5xx
    broken: int = 0  # streams that ended without [DONE]
    different: int = 0  # from the answer that one client alone gets
    memory_mb: list[float] = field(default_factory=list)

    def __str__(self) -> str:
        first, last = self.memory_mb[0], max(self.memory_mb)
        return (
            f"\n{self.answers:,} answers; {self.errors} errors, {self.broken} broken off, "
            f"{self.refused} refused (429), {self.different} other than alone; the server's memory "
            f"{first:,.0f} MB at first, {last:,.0f} MB at most"
        )


async def stress(url: str, pid: int, seconds: int, tokens: int) -> Stress:
    seen = Stress()
    async with connections() as client:
        alone = [await ask(client, url, prompt_of(i), tokens) for i in range(PROMPTS)]
        ends_at = time.monotonic() + seconds

        async def good(number: int) -> None:
            while time.monotonic() < ends_at:
                answer = await ask(client, url, prompt_of(number), tokens)
                seen.refused += answer["status"] == 429
                seen.errors += answer["status"] >= 500
                if answer["status"] == 200:
                    seen.answers += 1
                    seen.broken += not answer["whole"]
                    expected = alone[number % PROMPTS]["ids"]
                    seen.different += answer["whole"] and answer["ids"] != expected
                number += 100

        async def vanishing(number: int) -> None:
            dice = random.Random(number)
            while time.monotonic() < ends_at:
                with contextlib.suppress(TimeoutError, httpx2.HTTPError):
                    await asyncio.wait_for(ask(client, url, prompt_of(number), 400), dice.random())

        async def slow(number: int) -> None:
            """Reads one byte a second."""
            host, port = url.removeprefix("http://").split(":")
            data = json.dumps({"prompt": prompt_of(number), "max_tokens": 400, "stream": True})
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
            writer.write(
                b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                + f"Content-Length: {len(data)}\r\n\r\n{data}".encode()
            )
            while time.monotonic() < ends_at:
                await reader.read(1)
                await asyncio.sleep(1)
            writer.close()

        async def weigh() -> None:
            while time.monotonic() < ends_at:
                pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
                seen.memory_mb.append(pages * 4096 / 1e6)
                await asyncio.sleep(1)

        await asyncio.gather(
            weigh(), *map(good, range(100)), *map(vanishing, range(30)), *map(slow, range(10))
        )
    return seen


# ---- the other side, in a process of its own


def work(side: str, model: str, weights: str, tokens: str, cores: str) -> None:
    """Answer the same prompts one after the other, and print the speed as JSON."""
    import torch

    from nanophi.infer.generate import generate
    from nanophi.model.checkpoint import load

    torch.set_num_threads(int(cores))
    loaded, _ = load(model, weights=weights)
    generate(loaded, prompt_of(0), int(tokens))
    began = time.perf_counter()
    count = sum(len(generate(loaded, prompt_of(i), int(tokens))) for i in range(PROMPTS))
    print(json.dumps({"speed": count / (time.perf_counter() - began)}))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work(*sys.argv[2:])
    else:
        run_command(Config, main)
