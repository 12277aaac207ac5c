"""One measurement of a peer: prints one JSON object.

    python peer.py pretrain [--compile] --layer dense|sltrain --layers 8 --hidden 512 --intermediate 1376 --heads 8 ...
    python peer.py vit      [--compile] --batch 32
    python peer.py galore   --rank 128
    python peer.py peft     --model DIR --batch 2 --seq-len 256
    python peer.py generate --model DIR --tokens 64

Times are medians over the steps after the first three; memory is the peak of the process.
"""

import argparse
import json
import resource
import statistics
import time

import torch


def timed(steps, step):
    seconds = []
    for _ in range(steps):
        begin = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds[3:])


def report(**figures):
    figures["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    figures["torch"] = torch.__version__
    figures["instructions"] = torch.backends.cpu.get_cpu_capability()
    figures["threads"] = torch.get_num_threads()
    print(json.dumps(figures))


class SparseLowRank(torch.nn.Module):
    """SLTrain as its authors' layer computes it: the dense weight is composed in every forward pass."""

    def __init__(self, d_in, d_out, rank, density):
        super().__init__()
        self.a = torch.nn.Parameter(torch.empty(rank, d_in).uniform_(-(d_in**-0.5), d_in**-0.5))
        self.b = torch.nn.Parameter(torch.zeros(d_out, rank))
        count = int(density * d_in * d_out)
        self.register_buffer("index", torch.randperm(d_in * d_out)[:count].sort().values)
        self.value = torch.nn.Parameter(torch.empty(count).uniform_(-(d_in**-0.5), d_in**-0.5))
        self.scale = 32 / rank

    def forward(self, x):
        return Composed.apply(x, self.a, self.b, self.value, self.index, self.scale)


class Composed(torch.autograd.Function):
    """Keeps the factors alone; composes the weight again in the backward pass."""

    @staticmethod
    def weight(a, b, value, index, scale):
        weight = (b @ a) * scale
        weight.view(-1).scatter_add_(0, index, value)
        return weight

    @staticmethod
    def forward(ctx, x, a, b, value, index, scale):
        ctx.save_for_backward(x, a, b, value, index)
        ctx.scale = scale
        return x @ Composed.weight(a, b, value, index, scale).T

    @staticmethod
    def backward(ctx, dy):
        x, a, b, value, index = ctx.saved_tensors
        dweight = dy.flatten(0, -2).T @ x.flatten(0, -2)
        da = ctx.scale * (b.T @ dweight)
        db = ctx.scale * (dweight @ a.T)
        dvalue = dweight.view(-1).gather(0, index)
        return dy @ Composed.weight(a, b, value, index, ctx.scale), da, db, dvalue, None, None


def llama(options):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=options.vocab,
        hidden_size=options.hidden,
        intermediate_size=options.intermediate,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        num_key_value_heads=options.heads,
        tie_word_embeddings=False,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config)
    if options.layer == "sltrain":
        for name, module in list(model.named_modules()):
            if isinstance(module, torch.nn.Linear) and name != "lm_head":
                parent = model.get_submodule(name.rpartition(".")[0])
                layer = SparseLowRank(module.in_features, module.out_features, options.rank, 0.03)
                setattr(parent, name.rpartition(".")[2], layer)
    return model


def pretrain(options):
    ids = torch.randint(0, options.vocab, (options.batch, options.seq_len))
    train(llama(options), options, input_ids=ids, labels=ids, use_cache=False)


def vit(options):
    """vit-small on images of 224 x 224."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(hidden_size=384, intermediate_size=1536, num_attention_heads=6, num_labels=2, attn_implementation="sdpa")
    pixels, labels = torch.randn(options.batch, 3, 224, 224), torch.randint(0, 2, (options.batch,))
    train(ViTForImageClassification(config), options, pixel_values=pixels, labels=labels)


def train(model, options, **batch):
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    if options.compile:
        model = torch.compile(model)

    def step():
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    report(step_seconds=timed(options.steps, step))


def galore(options):
    from galore_torch import GaLoreAdamW

    model = llama(options)
    hidden = [p for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n and "lm_head" not in n]
    chosen = {id(p) for p in hidden}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    group = {"params": hidden, "rank": options.rank, "update_proj_gap": 1, "scale": 0.25, "proj_type": "std"}
    optimizer = GaLoreAdamW([{"params": rest}, group], lr=1e-4)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    report(step_seconds=timed(options.steps, optimizer.step))


def peft(options):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    config = LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", lora_dropout=0.0)
    model = get_peft_model(model, config)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    ids = torch.randint(0, 1000, (options.batch, options.seq_len))

    def step():
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    report(step_seconds=timed(options.steps, step))


def generate(options):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    ids = torch.randint(0, 1000, (1, 16))
    speeds = []
    with torch.no_grad():
        for _ in range(4):
            begin = time.perf_counter()
            model.generate(ids, max_new_tokens=options.tokens, min_new_tokens=options.tokens, do_sample=False)
            speeds.append(options.tokens / (time.perf_counter() - begin))
    report(tokens_per_second=statistics.median(speeds[1:]))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["pretrain", "vit", "galore", "peft", "generate"])
    parser.add_argument("--layer", choices=["dense", "sltrain"], default="dense")
    parser.add_argument("--model")
    parser.add_argument("--compile", action="store_true", help="pretrain and vit: through torch.compile")
    for name, value in {
        "layers": 8, "hidden": 512, "intermediate": 1376, "heads": 8, "vocab": 8192, "batch": 4, "seq-len": 256,
        "rank": 128, "steps": 10, "tokens": 64, "threads": 2,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    globals()[options.what](options)


main()
