"""Reads the event files of a run with TensorBoard's own reader and compares them with metrics.jsonl.

    python interop_tensorboard.py RUN_DIR
"""
import json
import math
import sys
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator as PluginEventAccumulator

# tag of the event files, key of metrics.jsonl
PAIRS = {
    "train/loss": "loss",
    "train/learning_rate": "lr",
    "train/grad_norm": "grad_norm",
    "speed/tokens_per_second": "tokens_per_second",
    "memory/rss_bytes": "rss_bytes",
    "memory/peak_rss_bytes": "peak_rss_bytes",
    "memory/weight_bytes": "weight_bytes",
    "memory/gradient_bytes": "gradient_bytes",
    "memory/optimizer_state_bytes": "state_bytes",
    "validation/loss": "validation_loss",
}

run = Path(sys.argv[1])
events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0, "histograms": 0, "tensors": 0})
events.Reload()
lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
for tag, key in PAIRS.items():
    logged = {line["step"]: line[key] for line in lines if line.get(key) is not None}
    read = {event.step: event.value for event in events.Scalars(tag)}
    assert logged and logged.keys() == read.keys(), f"{tag}: steps {sorted(read)} instead of {sorted(logged)}"
    for step, value in logged.items():
        assert math.isclose(value, read[step], rel_tol=1e-6), f"{tag} at {step}: {read[step]} instead of {value}"
texts = [tag for tag in events.Tags()["tensors"] if tag.endswith("text_summary")]
assert any("config" in tag for tag in texts), f"no configuration among {texts}"
assert any("sample" in tag for tag in texts), f"no sample text among {texts}"
for tag in texts:
    assert events.Tensors(tag)[0].tensor_proto.string_val[0], f"{tag} is empty"

# TensorBoard's own loader, as `tensorboard --load_fast=false` uses it.
own = PluginEventAccumulator(str(run / "tensorboard"), size_guidance={"tensors": 0})
own.Reload()
for tag in own.Tags()["tensors"]:
    steps = [event.step for event in own.Tensors(tag)]
    assert len(steps) == len(set(steps)), f"{tag} has points twice: {steps}"
histograms = events.Tags()["histograms"]
assert any(tag.startswith("weights/") for tag in histograms), "no histogram of weights"
assert any(tag.startswith("gradients/") for tag in histograms), "no histogram of gradients"
for tag in histograms:
    histogram = events.Histograms(tag)[0].histogram_value
    assert sum(histogram.bucket) == histogram.num, tag
print(f"{len(PAIRS)} scalars, {len(texts)} texts and {len(histograms)} histograms agree")
