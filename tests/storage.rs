//! Weights in fewer bytes: trained with the same bits whatever the way, frozen below adapters, refused where they cannot be.

#[path = "program.rs"]
mod program;

use std::path::Path;

use program::{Workshop, checkpoints, metrics, refused, succeeded, summary, tensors};
use safetensors::{Dtype, SafeTensors};

const STORAGES: [&str; 5] = ["bf16", "bf16-nearest", "bf16-kahan", "24bit", "int8"];

/// Losses of a run by step.
fn losses(run: &Path) -> Vec<f64> {
    metrics(run).iter().filter_map(|line| line["loss"].as_f64()).collect()
}

/// Type of a weight in a checkpoint.
fn dtype(checkpoint: &Path, name: &str) -> Dtype {
    let bytes = std::fs::read(checkpoint.join("model.safetensors")).expect("weights");
    SafeTensors::deserialize(&bytes).expect("safetensors").tensor(name).expect("the weight").dtype()
}

#[test]
fn narrow_weights_train_with_the_same_bits_whatever_threads_backward_and_resume() {
    let shop = Workshop::new(10);
    let last = |run: &str| checkpoints(&shop.path(run)).pop().expect("a checkpoint");
    for storage in STORAGES {
        let run = |out: &str, more: &[&str]| {
            let fixed = ["--weights", storage, "--steps", "6", "--lr", "0.01", "--set", "optimizer.clip=0"];
            let kept = ["--set", "checkpoint.every=3", "--set", "schedule.warmup_steps=1"];
            let out = format!("{storage}-{out}");
            succeeded(shop.run(&shop.tiny(&out, &[&fixed[..], &kept[..], more].concat())));
            out
        };
        let whole = run("whole", &[]);
        let expected = tensors(&last(&whole));
        assert!(losses(&shop.path(&whole)).iter().all(|loss| loss.is_finite()));
        let kind = dtype(&last(&whole), "model.layers.0.mlp.up_proj.weight");
        assert_eq!(kind, if storage == "int8" { Dtype::U8 } else { Dtype::BF16 }, "{storage}");
        for more in [["--set", "train.threads=1"], ["--backward", "checkpointed"]] {
            assert!(tensors(&last(&run(more[1], &more))) == expected, "{storage}, {more:?}");
        }
        succeeded(shop.run(&["pretrain", "--quiet", "--out", &whole, "--resume-from", "step-000003"]));
        assert!(tensors(&last(&whole)) == expected, "{storage} resumed");
        // Another seed rounds otherwise.
        if storage == "bf16" {
            assert!(tensors(&last(&run("seed", &["--seed", "7"]))) != expected);
        }
    }
    let args = ["pretrain", "--quiet", "--out", "24bit-whole", "--resume", "--steps", "8", "--weights", "bf16"];
    refused(&shop.run(&args), &["weights.storage"]);
}

#[test]
fn blocks_updated_at_once_and_other_optimizers_and_layers_take_narrow_weights() {
    let shop = Workshop::new(10);
    let ways: [&[&str]; 5] = [
        &["--weights", "bf16", "--backward", "per-layer", "--set", "optimizer.clip=0", "--optimizer", "scale"],
        &["--weights", "24bit", "--optimizer", "adamw-8bit", "--set", "optimizer.options.codes=companded"],
        &["--weights", "int8", "--optimizer", "galore", "--set", "optimizer.options.rank=6"],
        &["--weights", "bf16", "--parameterization", "sltrain", "--set", "model.parameterization.options.rank=6"],
        &["--weights", "bf16-kahan", "--parameterization", "cola", "--set", "model.parameterization.options.rank=6"],
    ];
    for (number, way) in ways.iter().enumerate() {
        let out = format!("way-{number}");
        let fixed = ["--steps", "40", "--lr", "0.01", "--set", "schedule.warmup_steps=2"];
        succeeded(shop.run(&shop.tiny(&out, &[&fixed[..], way].concat())));
        let losses = losses(&shop.path(&out));
        let (first, last) = (losses[0], losses[losses.len() - 1]);
        assert!(last < first - 0.3, "{way:?}: {first} {last}");
    }
}

#[test]
fn adapters_learn_on_frozen_weights_in_few_bytes() {
    let shop = Workshop::with_model(40);
    let mut bytes = Vec::new();
    for base in ["f32", "bf16", "int8", "nf4"] {
        let more =
            ["--base", base, "--steps", "30", "--adapter", "lora", "--rank", "4", "--set", "checkpoint.every=30"];
        succeeded(shop.run(&shop.tuned(base, &more)));
        let losses = losses(&shop.path(base));
        let mean = |losses: &[f64]| losses.iter().sum::<f64>() / losses.len() as f64;
        assert!(mean(&losses[20..]) < mean(&losses[..10]) - 0.05, "{base}: {losses:?}");
        bytes.push(summary(&shop.path(base))["weight_bytes"].as_u64().unwrap_or_default());
        let adapter = checkpoints(&shop.path(base)).pop().expect("a checkpoint");
        let adapter = adapter.to_string_lossy().into_owned();
        let with = ["--model", "model", "--adapter", &adapter, "--weights", base];
        succeeded(shop.run(&[&["generate", "--prompt", "the model", "--tokens", "4"][..], &with].concat()));
        let out = format!("merged-{base}");
        let merged = ["merge", "--model", "model", "--adapter", &adapter, "--base", base, "--out", &out];
        succeeded(shop.run(&[&merged[..], &["--dtype", "bf16"]].concat()));
        assert_eq!(dtype(&shop.path(&out), "model.layers.0.mlp.up_proj.weight"), Dtype::BF16);
        succeeded(shop.run(&["generate", "--model", &out, "--prompt", "the model", "--tokens", "4"]));
    }
    // In so small a model maps and scales weigh more than codes.
    assert!(bytes[1..].iter().all(|narrow| *narrow < bytes[0]), "{bytes:?}");
    // An adapter that was interrupted goes on with the same bits.
    let more = ["--base", "nf4", "--steps", "8", "--adapter", "lora", "--set", "checkpoint.every=4"];
    succeeded(shop.run(&shop.tuned("again", &more)));
    let last = || checkpoints(&shop.path("again")).pop().expect("a checkpoint");
    let expected = tensors(&last());
    succeeded(shop.run(&["finetune", "--quiet", "--out", "again", "--resume-from", "step-000004"]));
    assert!(tensors(&last()) == expected);
}

#[test]
fn storages_that_a_run_cannot_have_are_refused_with_the_reason() {
    let shop = Workshop::with_model(10);
    let ways: [(&[&str], [&str; 3]); 6] = [
        (&["--weights", "nf4"], ["weights.storage", "nf4", "bf16"]),
        (
            &["--weights", "int8", "--parameterization", "sltrain", "--set", "model.parameterization.options.rank=4"],
            ["weights.storage = int8", "sltrain", "bf16"],
        ),
        (
            &["--weights", "bf16", "--parameterization", "loro", "--set", "model.parameterization.options.rank=4"],
            ["weights.storage = bf16", "loro", "f32"],
        ),
        (
            &["--weights", "int8", "--optimizer", "q-galore", "--set", "optimizer.options.rank=4"],
            ["weights.storage = int8", "q-galore", "weight_bits"],
        ),
        (&["--set", "weights.base=nf4"], ["weights.base", "pretrain", "remove it"]),
        (&["--set", "weights.storage=half"], ["weights.storage", "half", "bf16"]),
    ];
    for (more, parts) in ways {
        refused(&shop.run(&shop.tiny("refused", &[&["--steps", "2"], more].concat())), &parts);
        assert!(!shop.path("refused").exists(), "{more:?} left a folder");
    }
    let ways: [(&[&str], [&str; 2]); 4] = [
        (&["--base", "q8_0", "--adapter", "lora"], ["weights.base = q8_0", "48 inputs"]),
        (&["--base", "int4"], ["weights.base", "nf4"]),
        (&["--base", "nf4", "--adapter", "none"], ["weights.base = nf4", "weights.storage"]),
        (&["--weights", "bf16", "--adapter", "lora"], ["weights.storage = bf16", "weights.base"]),
    ];
    for (more, parts) in ways {
        refused(&shop.run(&shop.tuned("refused", &[&["--steps", "2"], more].concat())), &parts);
        assert!(!shop.path("refused").exists(), "{more:?} left a folder");
    }
    for (storage, parts) in [("int4", &["int4", "nf4"][..]), ("q8_0", &["down_proj", "48 inputs", "q8_0", "int8"])] {
        refused(&shop.run(&["generate", "--model", "model", "--prompt", "the", "--weights", storage]), parts);
    }
}
