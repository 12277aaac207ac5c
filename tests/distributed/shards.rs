//! Optimizer state that is divided among processes: the bits of one process, in less memory of each.

use std::collections::BTreeMap;

use lowrank_optim::registry::METHODS;

use crate::launch::{SHARD, same_bits, saved, skipped, together};
use crate::program::{Workshop, refused, stderr, succeeded, summary};

/// Adds the division of the state to settings.
fn divided<'a>(steps: &'a str, settings: &[&'a str]) -> Vec<&'a str> {
    let settings = settings.iter().chain([&SHARD]).flat_map(|setting| ["--set", *setting]);
    ["--steps", steps].into_iter().chain(settings).collect()
}

/// Bytes of the largest state of a parameter in a checkpoint.
fn largest_state(saved: &BTreeMap<String, Vec<u8>>) -> u64 {
    let mut states = BTreeMap::<&str, u64>::new();
    for (name, bytes) in saved {
        if let Some((id, _)) = name.strip_prefix("optimizer: ").and_then(|field| field.split_once('.')) {
            *states.entry(id).or_default() += bytes.len() as u64;
        }
    }
    states.into_values().max().expect("a state")
}

#[test]
fn every_optimizer_gets_the_bits_of_one_process_from_divided_state() {
    if skipped() {
        return;
    }
    let shop = Workshop::new(40);
    for (number, method) in METHODS.iter().enumerate() {
        let name = format!("optimizer.name={}", method.name);
        let backward = ["train.backward=whole", "train.backward=checkpointed"][number % 2];
        let mut settings = vec![name.as_str(), backward];
        let options = method.options();
        for (option, setting) in [
            ("rank", "optimizer.options.rank=6"),
            ("update_proj_gap", "optimizer.options.update_proj_gap=3"),
            ("min_8bit_size", "optimizer.options.min_8bit_size=0"),
        ] {
            // A density takes the place of a rank.
            let ranked = option != "rank" || options.get("density").is_none();
            if ranked && options.get(option).is_some() {
                settings.push(setting);
            }
        }
        let ranks = 2 + number % 3;
        same_bits(&shop, "pretrain", ranks, &divided("6", &settings));
        let held = &summary(&shop.path("several"))["process_state_bytes"];
        let held: Vec<u64> = held.as_array().unwrap().iter().map(|bytes| bytes.as_u64().unwrap()).collect();
        let (most, all) = (held.iter().copied().max().unwrap(), held.iter().sum::<u64>());
        // The state of one parameter is not divided.
        let largest = largest_state(&saved(&shop.path("alone")));
        let share = all / ranks as u64;
        assert!(most <= largest.max(share) + share / 4, "{}: {held:?}, {largest}", method.name);
    }
}

#[test]
fn narrow_weights_parameterizations_and_adapters_divide_their_state() {
    if skipped() {
        return;
    }
    let shop = Workshop::with_model(40);
    for storage in ["bf16", "bf16-kahan", "24bit", "int8"] {
        let storage = format!("weights.storage={storage}");
        same_bits(&shop, "pretrain", 3, &divided("5", &[&storage]));
    }
    let rank = "model.parameterization.options.rank=6";
    let sltrain = ["model.parameterization.name=sltrain", rank];
    same_bits(&shop, "pretrain", 2, &divided("6", &sltrain));
    let relora = [
        "model.parameterization.name=relora",
        rank,
        "model.parameterization.options.reset_every=3",
        "model.parameterization.options.restart_warmup=1",
        "optimizer.weight_decay=0",
        "schedule.warmup_steps=2",
    ];
    same_bits(&shop, "pretrain", 3, &divided("6", &relora));
    let lora = ["--rank", "4", "--dropout", "0.1"];
    same_bits(&shop, "finetune", 3, &[&divided("6", &["schedule.warmup_steps=2"])[..], &lora].concat());
}

#[test]
fn clipping_skipped_steps_and_blocks_are_those_of_undivided_state() {
    if skipped() {
        return;
    }
    let shop = Workshop::new(40);
    same_bits(&shop, "pretrain", 2, &divided("6", &["optimizer.clip=0.01"]));
    for (out, shard) in [("whole", "train.shard_state=false"), ("divided", SHARD)] {
        let more = ["--steps", "8", "--set", "train.backward=per-layer", "--set", "optimizer.clip=0"];
        let more = [&more[..], &["--set", "optimizer.block_clip=0.1", "--set", shard]].concat();
        succeeded(together(&shop, 3, &shop.tiny(out, &more)));
    }
    assert!(saved(&shop.path("whole")) == saved(&shop.path("divided")), "per-layer");
    // A learning rate that makes the loss infinite after the first step.
    let more = ["optimizer.lr=1e6", "optimizer.clip=0", "schedule.warmup_steps=0", "train.max_skipped_steps=50"];
    let mut losses = Vec::new();
    for (out, shard) in [("whole", "train.shard_state=false"), ("divided", SHARD)] {
        let more: Vec<&str> = more.iter().chain([&shard]).flat_map(|setting| ["--set", *setting]).collect();
        let args = shop.tiny(out, &[&["--steps", "8", "--overwrite"][..], &more].concat());
        succeeded(together(&shop, 2, &args));
        losses.push(summary(&shop.path(out))["skipped_steps"].clone());
    }
    assert!(losses[0] == losses[1] && losses[0].as_u64() > Some(0), "{losses:?}");
    assert!(saved(&shop.path("whole")) == saved(&shop.path("divided")), "skipped steps");
}

#[test]
fn a_run_goes_on_in_another_number_of_processes_with_the_same_bits() {
    if skipped() {
        return;
    }
    let shop = Workshop::new(40);
    let more = [
        "optimizer.name=trion",
        "optimizer.options.rank=6",
        "checkpoint.every=3",
        "checkpoint.keep_last=9",
        "log.sample_tokens=0",
    ];
    let run = |out: &'static str, ranks: usize, more: &[&str]| {
        let args = [&shop.tiny(out, &divided("6", &[]))[..], more].concat();
        succeeded(if ranks == 1 { shop.run(&args) } else { together(&shop, ranks, &args) });
    };
    let settings: Vec<&str> = more.iter().flat_map(|setting| ["--set", *setting]).collect();
    run("run", 4, &settings);
    let whole = saved(&shop.path("run"));
    let resume = |ranks: usize, more: &[&str]| {
        let args = [&["pretrain", "--resume-from", "step-000003", "--out", "run"][..], more].concat();
        if ranks == 1 { shop.run(&args) } else { together(&shop, ranks, &args) }
    };
    let set = |accumulation, shard| ["--set", accumulation, "--set", shard];
    let (one, two, four) = ("train.accumulation=1", "train.accumulation=2", "train.accumulation=4");
    let undivided = "train.shard_state=false";
    for (ranks, settings) in
        [(4, set(one, SHARD)), (1, set(four, SHARD)), (4, set(one, undivided)), (1, set(four, undivided))]
    {
        let output = succeeded(resume(ranks, &settings));
        assert!(!stderr(&output).contains("another order"), "{}", stderr(&output));
        assert!(saved(&shop.path("run")) == whole, "{ranks} processes with {settings:?}");
    }
    // The checkpoint of step 3 is still that of four processes.
    let output = succeeded(resume(2, &set(two, SHARD)));
    assert!(stderr(&output).contains("another order"), "{}", stderr(&output));
    refused(&resume(3, &set(one, SHARD)), &["train.accumulation x processes", "4", "3"]);
    // One process begins, and three with divided state go on.
    run("other", 1, &[&settings[..], &["--set", "train.accumulation=3"]].concat());
    let whole = saved(&shop.path("other"));
    let args = ["pretrain", "--quiet", "--resume-from", "step-000003", "--out", "other", "--set", one];
    succeeded(together(&shop, 3, &args));
    assert!(saved(&shop.path("other")) == whole);
}

#[test]
fn rules_that_need_all_states_are_refused() {
    if skipped() {
        return;
    }
    let shop = Workshop::with_model(20);
    let loro = ["model.parameterization.name=loro", "model.parameterization.options.rank=6"];
    refused(
        &together(&shop, 2, &shop.tiny("run", &divided("4", &loro))),
        &["train.shard_state = true", "moments of both factors", "set it to false"],
    );
    assert!(!shop.path("run").exists(), "nothing is left behind");
    let pro = [&divided("4", &[])[..], &["--rank", "4", "--rule", "lora-pro"]].concat();
    refused(&together(&shop, 2, &shop.tuned("run", &pro)), &["train.shard_state = true", "lora-pro"]);
    // One process has all states.
    succeeded(shop.run(&shop.tuned("run", &pro)));
}
