"""A trace of a few steps, for TensorBoard and Perfetto, and a table of what takes longest in them."""

import tempfile
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from raycifar.engine import torch_internals
from raycifar.storage.run_folder import PROFILE, RunFolder

BEFORE, WARM_UP, TRACED = 5, 2, 8  # steps: in the first ones, libraries are loaded and CUDA graphs captured
NEEDED = BEFORE + WARM_UP + TRACED
ROWS, MAX_NAME_LENGTH = 12, 60  # of the table
GRAPHS = "Steps are replayed as CUDA graphs: these are the kernels of the graphs, which no operation launches."


class StepProfiler:
    """Traces some of a worker's steps, and writes what it finds to the run's folder, again after a restart.

    The steps follow each other: where an epoch has fewer than `NEEDED`, its scoring is traced with its last step.
    On a GPU it also writes a snapshot of the memory, which https://pytorch.org/memory_viz draws.
    """

    def __init__(self, folder: RunFolder, rank: int, device: torch.device) -> None:
        self.folder, self.name, self.on_gpu = folder, f"{PROFILE}/worker{rank}", device.type == "cuda"
        self.is_over = False
        activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * self.on_gpu]
        torch_internals.start_tracer(activities)
        self.profile = profile(
            activities=activities,
            schedule=schedule(wait=BEFORE, warmup=WARM_UP, active=TRACED, repeat=1),
            on_trace_ready=self.write,
        )
        if self.on_gpu:
            torch_internals.record_memory()
        self.profile.start()

    def step(self) -> None:
        """Call this after each step."""
        if not self.is_over:
            self.profile.step()

    def stop(self) -> None:
        """Stop tracing; of a run that ends before all steps are traced, nothing is written."""
        if not self.is_over:
            self.is_over = True
            self.profile.stop()

    def write(self, traced: profile) -> None:
        if self.is_over:
            return
        self.is_over = True
        self.folder.write(f"{self.name}.txt", self.table(traced).encode())
        with tempfile.TemporaryDirectory() as temporary:
            file = Path(temporary, "trace.json.gz")
            traced.export_chrome_trace(str(file))
            self.folder.write(f"{self.name}.pt.trace.json.gz", file.read_bytes())
        if self.on_gpu:
            self.folder.write(f"{self.name}.memory.pickle", torch_internals.memory_snapshot())

    def table(self, traced: profile) -> str:
        """Return what takes longest, itself, without what it calls: milliseconds and calls of a step."""
        events = traced.key_averages()
        steps = max(event.count for event in events if event.key.startswith("ProfilerStep"))
        if self.on_gpu:
            found = {e.key: (e.self_device_time_total, e.count) for e in events if not e.is_user_annotation}
        else:
            found = {e.key: (e.self_cpu_time_total, e.count) for e in events}
        total = sum(time for time, _ in found.values())
        lines = [f"{steps} steps of {total / steps / 1000:.2f} ms on the {'GPU' if self.on_gpu else 'CPU'}"]
        lines.append(f"{'share':>6}  {'ms':>8}  {'calls':>6}  operation")
        for key, (time, count) in sorted(found.items(), key=lambda item: -item[1][0])[:ROWS]:
            name = "Python, between operations" if key.startswith("ProfilerStep") else key[:MAX_NAME_LENGTH]
            lines.append(f"{time / total:6.1%}  {time / steps / 1000:8.3f}  {count / steps:6.1f}  {name}")
        if any(event.key == "cudaGraphLaunch" for event in events):
            lines.append(GRAPHS)
        return "\n".join(lines) + "\n"
