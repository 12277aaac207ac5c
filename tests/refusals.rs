//! Settings that are refused: by key, value and cure, with nothing left behind.

#[path = "program.rs"]
mod program;

use program::{Workshop, refused};

#[test]
fn bad_settings_are_refused_and_leave_nothing() {
    let shop = Workshop::new(10);
    for (setting, parts) in [
        ("train.stesp=5", ["train.stesp", "train.steps"]),
        ("train.steps=soon", ["train.steps", "whole number"]),
        ("model.num_attention_heads=5", ["hidden_size 32", "num_attention_heads 5"]),
        ("model.num_key_value_heads=3", ["num_key_value_heads", "multiple"]),
        ("model.name=llama-8m", ["llama-8m", "llama-9m"]),
        ("optimizer.name=adamv", ["adamv", "adamw"]),
        ("optimizer.options.beta_1=1.5", ["beta_1", "1.5"]),
        ("optimizer.exclude=attn[", ["exclude", "attn["]),
        ("optimizer.exclude=attention", ["exclude", "model.layers.0"]),
        ("optimizer.include=attention", ["include", "model.layers.0"]),
        ("model.parameterization.name=sparse", ["sparse", "sltrain"]),
        ("model.parameterization.options.rank=4", ["model.parameterization.options.rank", "dense"]),
        ("train.device=tpu", ["tpu", "cuda"]),
        ("train.device=cuda", ["cuda", "--features cuda"]),
        ("train.seq_len=129", ["129", "128 positions"]),
        ("train.seq_len=100000", ["100000", "seq"]),
        ("tokenizer.path=missing.json", ["missing.json", "No such file"]),
        ("data.path=nowhere", ["nowhere", "No such file"]),
        ("data.format=csv", ["data.format", "csv"]),
        ("data.validation_fraction=0", ["data.validation_fraction", "data.validation"]),
        ("schedule.kind=sudden", ["schedule.kind", "sudden"]),
    ] {
        let output = shop.run(&shop.tiny("run", &["--steps", "3", "--set", setting]));
        refused(&output, &parts);
        assert!(!shop.path("run").exists(), "{setting} left a folder");
    }
    for (settings, parts) in [
        (vec!["model.parameterization.name=sltrain", "model.parameterization.options.rank=0"], ["rank", "at least 1"]),
        (
            vec!["model.parameterization.name=sltrain", "model.parameterization.options.rank=1000"],
            ["1000", "smaller side, 32"],
        ),
        (
            vec![
                "model.parameterization.name=sltrain",
                "model.parameterization.options.rank=4",
                "model.parameterization.options.density=1",
            ],
            ["density", "below 1"],
        ),
        (
            vec![
                "model.parameterization.name=sltrain",
                "model.parameterization.options.rank=4",
                "model.parameterization.options.density=0.0001",
            ],
            ["density", "less than one"],
        ),
        (
            vec![
                "model.parameterization.name=sltrain",
                "model.parameterization.options.rank=4",
                "model.parameterization.options.alpha=0",
            ],
            ["alpha", "greater than 0"],
        ),
        (
            vec![
                "model.parameterization.name=cola",
                "model.parameterization.options.rank=4",
                "model.parameterization.options.alpha=3",
            ],
            ["options.alpha", "cola"],
        ),
        (
            vec![
                "model.parameterization.name=low-rank",
                "model.parameterization.options.rank=4",
                "model.parameterization.options.init=svd",
            ],
            ["svd", "spectral"],
        ),
        (
            vec![
                "model.parameterization.name=lost",
                "model.parameterization.options.rank=4",
                "model.parameterization.options.gamma=2",
            ],
            ["gamma", "from 0 to 1"],
        ),
        (
            vec!["model.parameterization.name=low-rank", "model.parameterization.options.rank=33"],
            ["33", "smaller side, 32"],
        ),
        (
            vec!["model.parameterization.name=lost", "model.parameterization.options.rank=33"],
            ["33", "smaller side, 32"],
        ),
        (vec!["model.parameterization.name=cola", "model.parameterization.options.rank=0"], ["rank", "at least 1"]),
        (
            vec!["model.parameterization.name=relora", "model.parameterization.options.rank=33"],
            ["33", "smaller side, 32"],
        ),
        (
            vec!["model.parameterization.name=loro", "model.parameterization.options.rank=33"],
            ["33", "smaller side, 32"],
        ),
        (
            vec![
                "model.parameterization.name=relora",
                "model.parameterization.options.reset_every=100",
                "model.parameterization.options.restart_warmup=9",
                "model.parameterization.options.rank=4",
            ],
            ["reset_every", "inside the 100"],
        ),
        (
            vec![
                "model.parameterization.name=relora",
                "model.parameterization.options.rank=4",
                "model.parameterization.options.reset_every=0",
            ],
            ["reset_every", "at least 1"],
        ),
        (
            vec![
                "model.parameterization.name=relora",
                "model.parameterization.options.rank=4",
                "model.parameterization.options.restart_warmup=5000",
            ],
            ["restart_warmup", "5000"],
        ),
        (
            vec![
                "model.parameterization.name=relora",
                "model.parameterization.options.rank=4",
                "model.parameterization.options.reset=most",
            ],
            ["options.reset = \"most\"", "magnitude:0.9"],
        ),
        (
            vec![
                "model.parameterization.name=relora",
                "model.parameterization.options.rank=4",
                "model.parameterization.options.reset=random:1",
            ],
            ["options.reset = random:1", "below 1"],
        ),
        (
            vec![
                "model.parameterization.name=relora",
                "model.parameterization.options.rank=4",
                "schedule.final_fraction=0",
            ],
            ["final_fraction", "greater than 0"],
        ),
        (
            vec!["model.parameterization.name=relora", "model.parameterization.options.rank=4", "schedule.kind=linear"],
            ["relora", "cosine-restarts"],
        ),
        (
            vec!["model.parameterization.name=relora", "model.parameterization.options.rank=4", "optimizer.name=fira"],
            ["fira", "use adamw"],
        ),
        (vec!["schedule.kind=cosine-restarts"], ["dense has no restarts", "relora"]),
        (vec!["schedule.adjust_steps=5"], ["adjust_steps", "cosine-restarts"]),
        (
            vec!["model.parameterization.name=loro", "model.parameterization.options.rank=4", "optimizer.name=muon"],
            ["loro", "use adamw"],
        ),
        (
            vec![
                "model.parameterization.name=loro",
                "model.parameterization.options.rank=4",
                "optimizer.exclude=q_proj",
            ],
            ["exclude", "together"],
        ),
        (
            vec![
                "model.parameterization.name=loro",
                "model.parameterization.options.rank=4",
                "optimizer.options.lr_scale=2",
            ],
            ["lr_scale", "beta_1"],
        ),
        (
            vec![
                "model.parameterization.name=loro",
                "model.parameterization.options.rank=4",
                "model.parameterization.options.exact_every=0",
            ],
            ["exact_every", "at least 1"],
        ),
        (
            vec![
                "model.parameterization.name=loro",
                "model.parameterization.options.rank=4",
                "model.parameterization.options.lr_scaler=-2",
            ],
            ["lr_scaler", "greater than 0"],
        ),
        (vec!["train.backward=per-layer"], ["optimizer.clip", "block_clip"]),
        (
            vec!["train.backward=per-layer", "optimizer.clip=0", "train.accumulation=2"],
            ["train.accumulation", "set it to 1"],
        ),
        (vec!["train.backward=per-layer", "optimizer.clip=0", "train.max_skipped_steps=1"], ["max_skipped_steps", "0"]),
        (vec!["optimizer.block_clip=1"], ["block_clip", "per-layer"]),
        (vec!["train.backward=backwards"], ["backwards", "checkpointed"]),
        (vec!["optimizer.name=galore", "optimizer.options.rank=1000"], ["rank", "larger than"]),
    ] {
        let more: Vec<&str> = settings.iter().flat_map(|setting| ["--set", setting]).collect();
        refused(&shop.run(&shop.tiny("run", &[&["--steps", "3"], &more[..]].concat())), &parts);
        assert!(!shop.path("run").exists(), "{settings:?} left a folder");
    }
    refused(&shop.run(&["pretrain", "--steps", "many"]), &["--steps", "many"]);
    refused(&shop.run(&["pretrain", "--config", "missing.toml"]), &["missing.toml"]);
    refused(&shop.run(&["pretrian"]), &["pretrain"]);
    std::fs::write(shop.path("bad.toml"), "[train]\nsteps = \n").unwrap();
    refused(&shop.run(&["pretrain", "--config", "bad.toml"]), &["bad.toml", "line 2"]);
    std::fs::write(shop.path("bad.toml"), "[train]\nsteps = 3\n[modle]\nname = \"x\"\n").unwrap();
    refused(&shop.run(&["pretrain", "--config", "bad.toml"]), &["bad.toml line 4", "model.name"]);
}
