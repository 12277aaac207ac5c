//! Every allocation in the program: runs that resume, files of ranks and layers, exports, refusals.

#[path = "program.rs"]
mod program;

use std::collections::BTreeMap;
use std::path::Path;

use lowrank_models::adapter::ALLOCATIONS;
use program::{Workshop, checkpoints, metrics, refused, stderr, succeeded, tensors};
use safetensors::SafeTensors;

/// Tensors of a checkpoint; its list of ranks may be written relative to those that were read.
fn values(checkpoint: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut all = tensors(checkpoint);
    let file = all.remove("adapter_model.safetensors").expect("an adapter");
    let file = SafeTensors::deserialize(&file).expect("safetensors");
    all.extend(file.tensors().into_iter().map(|(name, view)| (name, view.data().to_vec())));
    all
}

#[test]
fn the_program_trains_resumes_reports_and_exports() {
    let shop = Workshop::with_model(60);
    let more = |name: &'static str, options: &[&'static str]| {
        let mut args = vec![
            "--allocation",
            name,
            "--steps",
            "8",
            "--set",
            "checkpoint.every=1",
            "--set",
            "checkpoint.keep_last=9",
        ];
        options.iter().for_each(|option| args.extend(["--set", option]));
        args
    };
    let growing = more(
        "increlora",
        &["allocation.options.init_warmup=1", "allocation.options.increment_interval=2", "allocation.options.top_h=9"],
    );
    succeeded(shop.run(&shop.tuned("growing", &growing)));
    let run = shop.path("growing");
    let ranks = || -> serde_json::Value {
        serde_json::from_str(&std::fs::read_to_string(run.join("rank.json")).expect("ranks")).expect("JSON")
    };
    let before = ranks();
    assert_eq!(before["total_rank"], 28, "{before}");
    let logged: Vec<_> = metrics(&run).into_iter().filter(|line| !line["layers"].is_null()).collect();
    assert!(logged.len() > 1 && logged.last().expect("a line")["layers"] == before["layers"], "{logged:?}");
    let whole = values(&checkpoints(&run)[7]);
    // Before, at and after the second growth.
    for from in ["step-000004", "step-000005", "step-000006"] {
        succeeded(shop.run(&["finetune", "--quiet", "--resume-from", from, "--out", "growing"]));
        assert!(values(&checkpoints(&run)[7]) == whole, "{from}");
        assert_eq!(ranks(), before);
    }
    let longer =
        shop.run(&["finetune", "--quiet", "--resume", "--out", "growing", "--set", "allocation.options.top_h=3"]);
    assert!(stderr(&longer).contains("allocation.options.top_h"), "{}", stderr(&longer));

    // Ranks that were found are used for a plain LoRA.
    let found = ["--steps", "2", "--set", "adapter.rank_pattern=@growing/rank.json"];
    succeeded(shop.run(&shop.tuned("found", &found)));
    let plain = std::fs::read_to_string(checkpoints(&shop.path("found"))[0].join("adapter_config.json")).expect("JSON");
    assert!(plain.contains("self_attn") && plain.contains("rank_pattern"), "{plain}");
    let other = std::fs::read_to_string(run.join("rank.json")).expect("ranks").replace("layers.1.", "layers.7.");
    std::fs::write(shop.path("other.json"), other).expect("a file");
    let wrong = ["--steps", "2", "--set", "adapter.rank_pattern=@other.json"];
    refused(&shop.run(&shop.tuned("out", &wrong)), &["layers", "7", "no linear layer matches"]);
    assert!(!shop.path("out").exists());

    let staged = more("sora", &["allocation.options.thresholds=[0.05, 0.1]", "adapter.options.gate_lr_scale=2.0"]);
    succeeded(shop.run(&shop.tuned("staged", &staged)));
    assert_eq!(
        checkpoints(&shop.path("staged")).last().and_then(|dir| dir.file_name()).expect("a name"),
        "step-000016"
    );

    succeeded(shop.run(&shop.tuned("nested", &more("dylora", &["adapter.rank=4"]))));
    let nested = checkpoints(&shop.path("nested")).pop().expect("a checkpoint");
    let nested = nested.to_str().expect("a path");
    for (command, rank, out) in [("merge", "2", "merged"), ("export", "2", "exported"), ("export", "4", "whole")] {
        succeeded(shop.run(&[command, "--model", "model", "--adapter", nested, "--rank", rank, "--out", out]));
    }
    let config =
        |dir: &str| std::fs::read_to_string(shop.path(dir).join("adapter_config.json")).expect("a configuration");
    assert!(config("exported").contains("\"r\": 2") && config("whole").contains("\"r\": 4"));
    let measured = |more: &[&str]| {
        let args = ["eval", "--quiet", "--data", "examples.jsonl", "--seq-len", "48", "--model"];
        String::from_utf8(succeeded(shop.run(&[&args, more].concat())).stdout).expect("text")
    };
    assert_eq!(measured(&["merged"]), measured(&["model", "--adapter", nested, "--rank", "2"]));
    assert_eq!(measured(&["model", "--adapter", "exported"]), measured(&["merged"]));
    refused(
        &shop.run(&["merge", "--model", "model", "--adapter", nested, "--rank", "5", "--out", "x"]),
        &["--rank 5", "1 to 4"],
    );

    for (args, parts) in [
        (
            vec!["--allocation", "diffora", "--steps", "4", "--set", "allocation.options.search_steps=4"],
            vec!["search_steps = 4", "train.steps"],
        ),
        (
            vec!["--allocation", "diffora", "--steps", "4", "--set", "allocation.options.val_fraction=0.001"],
            vec!["val_fraction = 0.001", "57 examples"],
        ),
        (
            vec!["--allocation", "diffora", "--steps", "9", "--backward", "per-layer", "--set", "optimizer.clip=0"],
            vec!["allocation", "gradients of a second batch"],
        ),
        (vec!["--targets", "@other.json"], vec!["adapter.targets = @other.json", "modules.json"]),
        (vec!["--allocation", "sroa"], vec!["allocation.name", "sora"]),
        (vec!["--allocation", "sora", "--adapter", "lora"], vec!["allocation.name = sora", "gated"]),
        (vec!["--allocation", "adalora", "--minutes", "1"], vec!["adalora", "train.minutes"]),
        (vec!["--allocation", "adalora", "--rank", "2", "--steps", "5"], vec!["target_rank = 8", "112", "28"]),
        (
            vec!["--allocation", "increlora", "--steps", "500", "--optimizer", "muon"],
            vec!["optimizer.name = muon", "increlora"],
        ),
        (vec!["--allocation", "sora", "--adapter", "none"], vec!["allocation.name = sora"]),
    ] {
        refused(&shop.run(&shop.tuned("out", &args)), &parts);
        assert!(!shop.path("out").exists(), "{args:?}");
    }
}

#[test]
fn a_search_selects_layers_resumes_and_its_choice_serves_another_run() {
    let shop = Workshop::with_model(60);
    for (order, sharing, layers) in [("first", "pair", 14), ("second", "none", 8)] {
        let options = [
            "checkpoint.every=1".to_string(),
            "checkpoint.keep_last=9".into(),
            "allocation.options.search_steps=4".into(),
            format!("allocation.options.order={order}"),
            format!("allocation.options.sharing={sharing}"),
        ];
        let mut args = vec!["--allocation", "diffora", "--steps", "8", "--rank", "2"];
        options.iter().for_each(|option| args.extend(["--set", option]));
        succeeded(shop.run(&shop.tuned(order, &args)));
        let run = shop.path(order);
        let whole = values(&checkpoints(&run)[7]);
        let modules = || std::fs::read_to_string(run.join("modules.json")).expect("what was selected");
        let selected = modules();
        let list: serde_json::Value = serde_json::from_str(&selected).expect("JSON");
        // Four of the seven layers of each of two blocks.
        assert_eq!(list["modules"].as_array().map(Vec::len), Some(8), "{selected}");
        let weights: Vec<f64> = metrics(&run)
            .iter()
            .filter_map(|line| line["layers"].as_object().cloned())
            .flat_map(|layers| layers.into_iter().filter_map(|(_, layer)| layer["weight"].as_f64()))
            .collect();
        assert!(weights.iter().any(|weight| *weight != 0.5 && *weight != 1.0), "weights learn: {weights:?}");
        // Within the search, at its end, and after it.
        for from in ["step-000002", "step-000004", "step-000006"] {
            succeeded(shop.run(&["finetune", "--quiet", "--resume-from", from, "--out", order]));
            assert!(values(&checkpoints(&run)[7]) == whole, "{order}: {from}");
            assert_eq!(modules(), selected);
        }
        let longer =
            shop.run(&["finetune", "--quiet", "--resume", "--out", order, "--set", "allocation.options.rho=0.9"]);
        assert!(stderr(&longer).contains("allocation.options.rho"), "{}", stderr(&longer));

        let adapter = checkpoints(&run).pop().expect("a checkpoint");
        let adapter = adapter.to_str().expect("a path");
        let exported = format!("{order}-exported");
        succeeded(shop.run(&["export", "--model", "model", "--adapter", adapter, "--out", &exported]));
        let file = std::fs::read(shop.path(&exported).join("adapter_model.safetensors")).expect("an adapter");
        let factors = SafeTensors::deserialize(&file).expect("safetensors").len();
        assert_eq!(factors, 2 * layers, "{order}: layers without an adapter are left out");
        let loss = |more: &[&str]| {
            let args =
                ["eval", "--quiet", "--data", "examples.jsonl", "--seq-len", "48", "--model", "model", "--adapter"];
            String::from_utf8(succeeded(shop.run(&[&args, more].concat())).stdout).expect("text")
        };
        assert_eq!(loss(&[adapter]), loss(&[&exported]));

        let (target, out) = (format!("@{order}/modules.json"), format!("{order}-plain"));
        succeeded(shop.run(&shop.tuned(&out, &["--steps", "2", "--targets", &target])));
        let plain = checkpoints(&shop.path(&out)).pop().expect("a checkpoint");
        let file = std::fs::read(plain.join("adapter_model.safetensors")).expect("an adapter");
        assert_eq!(SafeTensors::deserialize(&file).expect("safetensors").len(), 16);
    }
}

#[test]
fn bits_and_sparsity_are_shared_resumed_and_leave_as_peft_reads_them() {
    let shop = Workshop::with_model(60);
    let every_step = ["--set", "checkpoint.every=1", "--set", "checkpoint.keep_last=9"];
    for (name, more) in
        [("snella", vec!["--steps", "8", "--rank", "2"]), ("bayesian", vec!["--steps", "8", "--rank", "3"])]
    {
        let args = [&["--allocation", name][..], &more, &every_step].concat();
        succeeded(shop.run(&shop.tuned(name, &args)));
        let run = shop.path(name);
        let whole = values(&checkpoints(&run)[7]);
        for from in ["step-000002", "step-000005"] {
            succeeded(shop.run(&["finetune", "--quiet", "--resume-from", from, "--out", name]));
            assert!(values(&checkpoints(&run)[7]) == whole, "{name}: {from}");
        }
        let adapter = checkpoints(&run).pop().expect("a checkpoint");
        let adapter = adapter.to_str().expect("a path");
        let exported = format!("{name}-exported");
        let form = if name == "snella" { vec!["--as", "shira"] } else { vec![] };
        let args = ["export", "--model", "model", "--adapter", adapter, "--out", &exported];
        succeeded(shop.run(&[&args[..], &form].concat()));
        let config =
            std::fs::read_to_string(shop.path(&exported).join("adapter_config.json")).expect("a configuration");
        let kind = if name == "snella" { "SHIRA" } else { "LORA" };
        assert!(config.contains(&format!("\"peft_type\": \"{kind}\"")), "{name}: {config}");
        let loss = |adapter: &str| -> f64 {
            let args = [
                "eval",
                "--quiet",
                "--data",
                "examples.jsonl",
                "--seq-len",
                "48",
                "--model",
                "model",
                "--adapter",
                adapter,
            ];
            let text = String::from_utf8(succeeded(shop.run(&args)).stdout).expect("text");
            let number = text.split_whitespace().find_map(|word| word.parse().ok());
            number.unwrap_or_else(|| panic!("no loss in {text}"))
        };
        assert!((loss(adapter) - loss(&exported)).abs() < 1e-4, "{name}");
    }
    let (snell, lora) = ("snella-exported", "bayesian-exported");
    for (args, parts) in [
        (vec!["--adapter", lora, "--as", "shira", "--model", "model"], vec!["--as shira", "not sparse", "--as lora"]),
        (vec!["--adapter", snell, "--as", "shira"], vec!["--as shira", "--model"]),
        (vec!["--adapter", snell, "--as", "lora"], vec!["--as lora", "--rank"]),
        (vec!["--adapter", snell, "--as", "shira", "--rank", "3", "--model", "model"], vec!["--as shira", "--rank"]),
    ] {
        refused(&shop.run(&[&["export", "--out", "none"][..], &args].concat()), &parts);
        assert!(!shop.path("none").exists());
    }
}

#[test]
fn every_allocation_trains_in_every_backward_mode_that_it_has() {
    let shop = Workshop::with_model(30);
    let modes: [&[&str]; 3] =
        [&[], &["--backward", "checkpointed"], &["--backward", "per-layer", "--set", "optimizer.clip=0"]];
    for (entry, mode) in ALLOCATIONS.iter().flat_map(|entry| modes.map(|mode| (entry, mode))) {
        let name = entry.entry.name;
        let options: &[&str] = match name {
            "increlora" => {
                &["--set", "allocation.options.init_warmup=2", "--set", "allocation.options.increment_interval=3"]
            }
            _ => &[],
        };
        let args = [&["--allocation", name, "--steps", "12", "--overwrite"][..], options, mode].concat();
        let output = shop.run(&shop.tuned("run", &args));
        if output.status.code() == Some(2) && mode.contains(&"per-layer") {
            refused(&output, &["train.backward = per-layer", name, "needs all gradients"]);
            continue;
        }
        succeeded(output);
        let losses = metrics(&shop.path("run"));
        assert!(losses.iter().all(|line| line["loss"].as_f64().is_some_and(f64::is_finite)), "{name} {mode:?}");
    }
}
