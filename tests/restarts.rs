//! Parameterizations that restart within a run: ReLoRA and LORO.

#[path = "program.rs"]
mod program;

use std::collections::BTreeMap;
use std::path::Path;

use lowrank_models::parameter_id;
use program::{Workshop, checkpoints, metrics, stderr, succeeded, summary};
use safetensors::SafeTensors;

/// Tensors of a file as floats.
fn floats(path: &Path) -> BTreeMap<String, Vec<f32>> {
    let bytes = std::fs::read(path).expect("tensors");
    let file = SafeTensors::deserialize(&bytes).expect("safetensors");
    let floats = |data: &[u8]| data.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
    file.tensors().into_iter().map(|(name, view)| (name, floats(view.data()))).collect()
}

fn weights(checkpoint: &Path) -> BTreeMap<String, Vec<f32>> {
    floats(&checkpoint.join("model.safetensors"))
}

/// Moments and step counter of a parameter in a checkpoint; none where it has no state.
fn state(checkpoint: &Path, path: &str) -> Option<([Vec<f32>; 2], usize)> {
    let counters = burn_pack::Reader::from_file(checkpoint.join("optimizer.bpk")).expect("the optimizer's counters");
    let id = parameter_id(path).val();
    let time = counters.scalars().get(&format!("{id}.time")).copied();
    let mut tensors = floats(&checkpoint.join("optimizer.safetensors"));
    let mut moment = |place: u8| tensors.remove(&format!("{id}.moment_{place}"));
    let moments = [moment(1)?, moment(2)?];
    Some((moments, usize::try_from(time?).expect("a whole number")))
}

fn zero(values: &[f32]) -> bool {
    values.iter().all(|value| *value == 0.0)
}

const RELORA: [&str; 8] = [
    "model.parameterization.name=relora",
    "model.parameterization.options.rank=4",
    "model.parameterization.options.reset_every=4",
    "model.parameterization.options.restart_warmup=1",
    "schedule.warmup_steps=2",
    "optimizer.weight_decay=0",
    "checkpoint.every=1",
    "checkpoint.keep_last=30",
];

fn run(shop: &Workshop, out: &str, steps: &str, settings: &[&str]) {
    let mut more = vec!["--steps", steps];
    more.extend(settings.iter().flat_map(|setting| ["--set", setting]));
    succeeded(shop.run(&shop.tiny(out, &more)));
}

fn rates(run: &Path) -> Vec<f64> {
    metrics(run).iter().filter_map(|line| line["lr"].as_f64()).collect()
}

#[test]
fn relora_restarts_at_the_bottom_of_its_schedule_and_nowhere_else() {
    let shop = Workshop::new(20);
    let layer = "model.layers.1.mlp.down_proj";
    for mode in ["zero", "magnitude:0.9", "random:0.8"] {
        let out = mode.replace(':', "-");
        let reset = format!("model.parameterization.options.reset={mode}");
        run(&shop, &out, "12", &[&RELORA[..], &[&reset]].concat());
        let saved = checkpoints(&shop.path(&out));
        assert_eq!(saved.len(), 12);
        let mut before: Option<BTreeMap<String, Vec<f32>>> = None;
        for (place, checkpoint) in saved.iter().enumerate() {
            let update = place + 1;
            let restarted = [5, 9].contains(&update);
            let now = weights(checkpoint);
            let part = |name: &str| &now[&format!("{layer}.{name}")];
            if let Some(before) = &before {
                assert_eq!(before[&format!("{layer}.weight")] != *part("weight"), restarted, "{mode} after {update}");
            }
            // The first update has a rate of 0.
            assert_eq!(zero(part("b")), restarted || update == 1, "{mode} after {update}");
            assert!(state(checkpoint, &format!("{layer}.weight")).is_none(), "frozen weights have no state");
            for factor in ["a", "b"] {
                let (moments, time) = state(checkpoint, &format!("{layer}.{factor}")).expect("a state");
                assert_eq!(time, update, "the counter goes on");
                for moment in moments {
                    let kept = moment.iter().filter(|value| **value != 0.0).count() as f64 / moment.len() as f64;
                    match (restarted, mode) {
                        (true, "zero") => assert_eq!(kept, 0.0),
                        (true, _) => assert!(kept > 0.02 && kept < 0.35, "{mode} keeps {kept} of {factor}"),
                        // Where the second factor is 0, so is the gradient of the first one.
                        (false, _) => {
                            let quiet = factor == "a" && [1, 2, 6, 10].contains(&update);
                            assert!(kept > 0.5 || quiet, "{mode} keeps {kept} of {factor} after {update}");
                        }
                    }
                }
            }
            let (norm, _) = state(checkpoint, "model.norm.weight").expect("a state");
            assert!(!zero(&norm[0]), "what does not restart keeps its moments");
            before = Some(now);
        }
        let rates = rates(&shop.path(&out));
        let zeros: Vec<usize> = (1..=12).filter(|step| rates[step - 1] == 0.0).collect();
        assert_eq!(zeros, [1, 5, 9]);
    }
    let summary = summary(&shop.path("zero"));
    let bytes = |key: &str| summary[key].as_u64().unwrap();
    // A 32 x 32 weight has no gradient; what is trained has two moments.
    assert!(bytes("gradient_bytes") < bytes("weight_bytes"));
    assert_eq!(bytes("optimizer_state_bytes"), 2 * bytes("gradient_bytes"));
}

#[test]
fn a_period_longer_than_the_run_restarts_nothing() {
    let shop = Workshop::new(20);
    for (out, every) in [
        ("long", "model.parameterization.options.reset_every=50"),
        ("longer", "model.parameterization.options.reset_every=60"),
    ] {
        run(&shop, out, "12", &[&RELORA[..], &[every]].concat());
    }
    let last = |out: &str| program::tensors(&checkpoints(&shop.path(out)).pop().unwrap());
    assert!(last("long") == last("longer"));
}

#[test]
fn relora_stands_on_a_dense_model_and_resumes() {
    let shop = Workshop::new(20);
    run(&shop, "dense", "6", &[]);
    let dense = checkpoints(&shop.path("dense")).pop().unwrap();
    let start = weights(&dense);
    let name = dense.to_str().unwrap();
    let common = ["--set", "data.path=text", "--set", "data.cache=cache", "--set", "train.seq_len=32", "--batch", "2"];
    let with = |out: &str, model: &str, parameterization: &str, more: &[&str]| {
        let mut args = vec!["pretrain", "--quiet", "--out", out, "--model", model, "--steps", "9"];
        args.extend(common);
        args.extend(["--parameterization", parameterization, "--set", "log.sample_tokens=0"]);
        if parameterization == "relora" {
            args.extend(RELORA[1..].iter().flat_map(|setting| ["--set", setting]));
        }
        args.extend(more);
        shop.run(&args)
    };
    succeeded(with("warm", name, "relora", &[]));
    let first = weights(&checkpoints(&shop.path("warm"))[0]);
    for (path, values) in &start {
        assert!(first[path] == *values, "{path} begins as the dense model has it, and the first rate is 0");
    }
    // Cut after the restart of update 5, then on to the same bits.
    let saved = checkpoints(&shop.path("warm"));
    let whole = program::tensors(saved.last().unwrap());
    for checkpoint in &saved[5..] {
        std::fs::remove_dir_all(checkpoint).unwrap();
    }
    succeeded(shop.run(&["pretrain", "--quiet", "--resume", "--out", "warm"]));
    assert!(program::tensors(checkpoints(&shop.path("warm")).last().unwrap()) == whole);

    let shaped = with("shaped", name, "relora", &["--set", "model.hidden_size=32"]);
    refused(&shaped, &["model.name", "shape of its own"]);
    refused(&with("other", name, "sltrain", &[]), &["model.name", "shape of its own"]);
    let relora = saved[0].to_str().unwrap();
    refused(&with("twice", relora, "relora", &[]), &["relora starts from a dense model", "lowrank export"]);
    assert!(!shop.path("twice").exists());
}

fn refused(output: &std::process::Output, parts: &[&str]) {
    let text = stderr(output);
    assert_eq!(output.status.code(), Some(2), "{text}");
    assert!(parts.iter().all(|part| text.contains(part)), "{text}");
}

#[test]
fn a_checkpoint_of_another_parameterization_is_refused() {
    let shop = Workshop::new(20);
    run(&shop, "run", "3", &["model.parameterization.name=low-rank", "model.parameterization.options.rank=4"]);
    let resume = ["pretrain", "--quiet", "--resume", "--out", "run", "--parameterization", "cola"];
    refused(&shop.run(&resume), &["model.parameterization", "low-rank", "cola"]);
    let checkpoint = checkpoints(&shop.path("run")).pop().unwrap();
    let config = std::fs::read_to_string(checkpoint.join("config.json")).unwrap();
    let mut config: serde_json::Value = serde_json::from_str(&config).unwrap();
    config.as_object_mut().unwrap().remove("parameterization");
    std::fs::write(checkpoint.join("config.json"), config.to_string()).unwrap();
    let generate = ["generate", "--model", checkpoint.to_str().unwrap(), "--tokens", "2"];
    refused(&shop.run(&generate), &["model.layers.0.self_attn.q_proj.weight", "missing"]);
}

#[test]
fn loro_takes_exact_steps_and_forgets_its_moments_after_them() {
    let shop = Workshop::new(20);
    let settings = [
        "model.parameterization.name=loro",
        "model.parameterization.options.rank=4",
        "model.parameterization.options.exact_every=4",
        "model.parameterization.options.restart_warmup=2",
        "schedule.warmup_steps=6",
        "checkpoint.every=1",
        "checkpoint.keep_last=30",
    ];
    run(&shop, "loro", "10", &settings);
    let layer = "model.layers.0.self_attn.v_proj";
    for (place, checkpoint) in checkpoints(&shop.path("loro")).iter().enumerate() {
        let update = place + 1;
        let exact = [4, 8].contains(&update);
        for path in ["model.layers.0.self_attn.v_proj.a", "model.norm.weight"] {
            match state(checkpoint, path) {
                None => assert!(exact, "{path} after {update}"),
                Some((_, time)) => assert_eq!(time, update % 4, "{path} after {update}"),
            }
        }
        // Balanced factors, with the same products of columns, come from an exact step alone, and the rate is 0 at the next one.
        let now = weights(checkpoint);
        let (a, b) = (&now[&format!("{layer}.a")], &now[&format!("{layer}.b")]);
        let gram = |row: &dyn Fn(usize) -> Vec<f32>| -> Vec<f32> {
            (0..16).map(|at| row(at / 4).iter().zip(row(at % 4)).map(|(x, y)| x * y).sum()).collect()
        };
        // Files hold `[rank, d_in]` and `[d_out, rank]`.
        let first = gram(&|k| a[k * 32..(k + 1) * 32].to_vec());
        let second = gram(&|k| b.iter().skip(k).step_by(4).copied().collect());
        let far = first.iter().zip(&second).map(|(x, y)| (x - y).abs()).fold(0.0, f32::max);
        assert_eq!(far < 1e-5, [4, 5, 8, 9].contains(&update), "after {update}: {far}");
    }
    let rates = rates(&shop.path("loro"));
    let zeros: Vec<usize> = (1..=10).filter(|step| rates[step - 1] == 0.0).collect();
    assert_eq!(zeros, [1, 5, 9], "the rate falls to 0 after exact steps, in the warm-up too");
}
