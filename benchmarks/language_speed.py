"""Speed and memory of the language benchmark's models: optimizer steps, and greedy decoding after long prompts."""

from __future__ import annotations

import dataclasses
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.language_peers import FROM_FLA, OURS, OtherModel, build_model, count_parameters, missing
from models.ten import TENConfig

Row = dict[str, str]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MATMUL_SIZE = {"cpu": 2048, "cuda": 8192}
STEPS_PER_TURN = 8  # of decoding
MIN_ROUNDS, MAX_ROUNDS = 3, 20
EMPTY = {"parameters": "-", "tokens_per_s": "-", "p20": "-", "p80": "-", "runs": "0", "share": "-", "peak_mib": "-"}


@dataclasses.dataclass(frozen=True)
class Device:
    name: str = "cpu"
    precision: str = "fp32"

    def autocast(self) -> AbstractContextManager[None]:
        return torch.autocast(self.name, DTYPES[self.precision], enabled=self.precision != "fp32")

    def synchronize(self) -> None:
        if self.name == "cuda":
            torch.cuda.synchronize()


def take_turns(runs: dict[str, Callable[[], object]], device: Device, seconds: float) -> dict[str, list[float]]:
    """Seconds of each run, for about `seconds` in all and at least MIN_ROUNDS rounds.

    A round begins one run later than the round before: the machine's drift meets all alike.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    names, start = list(runs), time.perf_counter()
    for done in range(MAX_ROUNDS):
        if done >= MIN_ROUNDS and time.perf_counter() - start > seconds:
            break
        first = done % len(names)
        for name in names[first:] + names[:first]:
            device.synchronize()
            begin = time.perf_counter()
            runs[name]()
            device.synchronize()
            times[name].append(time.perf_counter() - begin)
    return times


def rates(items: int, seconds: list[float]) -> Row:
    """Items per second of runs that took `seconds`: median, and the 20th and 80th percentile."""
    fifths = statistics.quantiles(seconds, n=5, method="inclusive")
    values = {"tokens_per_s": statistics.median(seconds), "p20": fifths[3], "p80": fifths[0]}
    return {name: f"{items / value:.1f}" for name, value in values.items()} | {"runs": str(len(seconds))}


def build_all(
    peers: Iterable[str], base: TENConfig, device: Device, longest: int
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """({name: model on the device}, {name of one that cannot run: why})."""
    models, notes = {}, {}
    for name in peers:
        reason = missing(name, device.name)
        if reason is None:
            try:
                models[name] = build_model(name, base, longest).to(device.name)
            except ValueError as error:
                reason = str(error)
        if reason is not None:
            notes[name] = f"n/a: {reason}"
    return models, notes


# ------------------------------------------------------------------------------------------------------------- training


class Training:
    """A model, its optimizer, and one optimizer step."""

    def __init__(self, model: nn.Module, device: Device) -> None:
        self.model, self.device = model.train(), device
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step(self, tokens: Tensor) -> None:
        """tokens [B, T + 1] int64: inputs and, one later, labels."""
        with self.device.autocast():
            loss = self.model(tokens[:, :-1], labels=tokens[:, 1:].contiguous())["loss"]
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def peak_memory(self, tokens: Tensor) -> int:
        """Bytes on the GPU that a step takes at most, without what the other models hold there."""
        state = [t for slots in self.optimizer.state.values() for t in slots.values()]
        ours = sum(t.nbytes for t in [*self.model.parameters(), *self.model.buffers(), *state] if t.is_cuda)
        others = torch.cuda.memory_allocated() - ours
        torch.cuda.reset_peak_memory_stats()
        self.step(tokens)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - others


def random_tokens(base: TENConfig, rows: int, length: int, device: Device) -> Tensor:
    return torch.randint(base.vocab_size, (rows, length + 1), device=device.name)


def training_speed(
    peers: Iterable[str],
    base: TENConfig,
    device: Device,
    *,
    lengths: Iterable[int],
    tokens_per_step: int,
    seconds: float,
    memory: bool,
    compiled: bool = False,
) -> Iterator[Row]:
    """A row for each length and model, and one for the matmul that takes turns with them. `seconds` per length."""
    models, notes = build_all(peers, base, device, max(lengths))
    trainings = {name: Training(model, device) for name, model in models.items()}
    flops = {(name, n): flops_per_token(name, model, base, n) for name, model in models.items() for n in lengths}
    size = MATMUL_SIZE[device.name]
    square = torch.randn(size, size, device=device.name, dtype=DTYPES[device.precision])
    for model in models.values() if compiled else ():
        model.compile()
    for length in lengths:
        batch = max(1, tokens_per_step // length)
        tokens = random_tokens(base, batch, length, device)
        runs = {name: lambda t=training, x=tokens: t.step(x) for name, training in trainings.items()}
        for run in runs.values():
            run()  # allocates and compiles
        times = take_turns({**runs, "matmul": lambda: square @ square}, device, seconds)
        ceiling = 2 * size**3 / min(times["matmul"])
        for name in peers:
            row = {"T": str(length), "peer": name, **EMPTY, "note": notes.get(name, "")}
            if name in trainings:
                row |= {"parameters": str(count_parameters(models[name])), **rates(batch * length, times[name])}
                if per_token := flops[name, length]:
                    row["share"] = f"{float(row['tokens_per_s']) * per_token / ceiling:.3f}"
                if memory and device.name == "cuda":
                    row["peak_mib"] = f"{trainings[name].peak_memory(tokens) / 2**20:.0f}"
                elif memory:
                    row["peak_mib"] = f"{peak_memory_apart(name, base, device, batch, length) / 2**20:.0f}"
            yield row
        note = f"ceiling of the shares: {ceiling / 1e9:,.0f} GFLOP/s"
        yield {"T": str(length), "peer": "matmul", **EMPTY, "runs": str(len(times["matmul"])), "note": note}


def flops_per_token(name: str, model: nn.Module, base: TENConfig, length: int) -> float | None:
    """Of forward and backward, counted without computing; None for kernels that do not say.

    Attention is counted for the half of the square that a causal one needs.
    """
    if name in FROM_FLA:
        return None
    fake = FakeTensorMode()
    own = {n: fake.from_tensor(t) for n, t in [*model.named_parameters(), *model.named_buffers()]}
    ids = fake.from_tensor(random_tokens(base, 1, length - 1, Device(next(model.parameters()).device.type)))
    # The plain attention is the one whose matmuls the counter sees on every device.
    with fake, sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        functional_call(model, own, (ids,), {"labels": ids})["loss"].backward()
    flops = counter.get_total_flops()
    if isinstance(model, OtherModel):
        flops -= counter.get_flop_counts()["Global"][torch.ops.aten.bmm] // 2
    return flops / length


def peak_memory_apart(name: str, base: TENConfig, device: Device, batch: int, length: int) -> int:
    """Bytes on a CPU: how far a process that trains nothing else grows, from before it builds the model."""
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    process = context.Process(target=_growth, args=(name, base, device, batch, length, results))
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"the process that measures {name} at {length} tokens ended with status {process.exitcode}")
    return results.get()


def _growth(name: str, base: TENConfig, device: Device, batch: int, length: int, results) -> None:
    with torch.device("meta"):
        build_model(name, base, length)  # imports its library
    before = _resident("VmRSS")
    training = Training(build_model(name, base, length), device)
    training.step(random_tokens(base, 1, 8, device))  # the optimizer's state
    training.step(random_tokens(base, batch, length, device))
    results.put(_resident("VmHWM") - before)


def _resident(field: str) -> int:
    """Bytes of this process, now (VmRSS) or at most (VmHWM); getrusage's maximum would be the parent's (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))


# ------------------------------------------------------------------------------------------------------------- decoding


class Decoding:
    """One row of greedy tokens, each computed from the one before."""

    def __init__(self, name: str, model: nn.Module, prompt: Tensor, room: int) -> None:
        self.model = model
        logits, self.state = model.prefill(prompt) if name in OURS else model.prefill(prompt, room)
        self.token = logits.argmax(dim=-1)  # [1]

    def step(self) -> None:
        logits, self.state = self.model.step(self.token, self.state)
        self.token = logits.argmax(dim=-1)

    def turn(self) -> None:
        for _ in range(STEPS_PER_TURN):
            self.step()

    def capture(self) -> None:
        """From now on a step is the replay of a CUDA graph, which reads and writes `token` and `state` in place."""

        def in_place() -> None:
            logits, state = self.model.step(self.token, self.state)
            self.token.copy_(logits.argmax(dim=-1))
            self.state.copy_(state)

        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(3):
                in_place()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            in_place()
        self.step = graph.replay


@torch.no_grad()
def decoding_speed(
    peers: Iterable[str], base: TENConfig, device: Device, *, prompts: Iterable[int], seconds: float
) -> Iterator[Row]:
    """A row for each prompt length and model: tokens per second of one row after the prompt. `seconds` per length.

    Weights are held in the precision. On a GPU our models, whose step does no work on the host, have a row as a CUDA
    graph too; the others keep their keys and values in a cache of fixed size.
    """
    room = STEPS_PER_TURN * (MAX_ROUNDS + 1)
    models, notes = build_all(peers, base, device, max(prompts) + room)
    for model in models.values():
        model.to(DTYPES[device.precision]).eval()
    cost_after_shortest: dict[str, float] = {}
    for length in prompts:
        prompt = random_tokens(base, 1, length - 1, device)
        decodings = {name: Decoding(name, model, prompt, room) for name, model in models.items()}
        for name in [n for n in decodings if n in OURS and device.name == "cuda"]:
            decodings[f"{name}, CUDA graph"] = Decoding(name, models[name], prompt, room)
            decodings[f"{name}, CUDA graph"].capture()
        for decoding in decodings.values():
            decoding.turn()
        times = take_turns({name: decoding.turn for name, decoding in decodings.items()}, device, seconds)
        for name in [*decodings, *notes]:
            row = {"T": str(length), "peer": name, **EMPTY, "note": notes.get(name, "")}
            if name in times:
                row |= rates(STEPS_PER_TURN, times[name])
                row["parameters"] = str(count_parameters(decodings[name].model))
                cost = statistics.median(times[name])
                row["note"] = f"{cost / cost_after_shortest.setdefault(name, cost):.2f} x the cost at {prompts[0]}"
            yield row
