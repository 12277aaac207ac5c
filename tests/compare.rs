//! Comparisons of methods.

#[path = "program.rs"]
mod program;

use lowrank_models::linear::PARAMETERIZATIONS;
use program::{Workshop, refused, stderr, succeeded, summary};

/// Cells of the line of a name.
fn cells(table: &str, name: &str) -> Vec<String> {
    let line = table.lines().find(|line| line.starts_with(&format!("| `{name}` |")));
    let line = line.unwrap_or_else(|| panic!("{name} is not in:\n{table}"));
    line.trim_matches('|').split('|').map(|cell| cell.trim().to_string()).collect()
}

#[test]
fn methods_are_compared_at_their_best_learning_rates() {
    let shop = Workshop::new(20);
    let tiny = shop.tiny("unused", &[]);
    let settings = &tiny[tiny.iter().position(|word| *word == "--set").unwrap()..];
    let run = |words: &[&str]| {
        shop.run(
            &[&["compare"][..], words, &["--quiet", "--steps", "8", "--set", "schedule.warmup_steps=1"], settings]
                .concat(),
        )
    };
    let table = |words: &[&str]| String::from_utf8(succeeded(run(words)).stdout).unwrap();

    let two = ["optimizers", "muon", "adamw", "--lr", "0.01,0.001", "--out", "optimizers"];
    let text = table(&two);
    assert_eq!(std::fs::read_to_string(shop.path("optimizers/compare.md")).unwrap(), text);
    for name in ["adamw", "muon"] {
        let loss = |lr: &str| summary(&shop.path(&format!("optimizers/{name}-{lr}")))["final_validation_loss"].as_f64();
        let (a, b) = (loss("0.01").unwrap(), loss("0.001").unwrap());
        let best = if a < b { "0.01 (2)" } else { "0.001 (2)" };
        assert_eq!(cells(&text, name)[1..3], [format!("{:.4}", a.min(b)), best.to_string()], "{text}");
    }
    // Finished runs are read, not repeated, and not taken for runs with other settings.
    let before = std::fs::metadata(shop.path("optimizers/muon-0.01/summary.json")).unwrap().modified().unwrap();
    assert_eq!(table(&two), text);
    let after = std::fs::metadata(shop.path("optimizers/muon-0.01/summary.json")).unwrap().modified().unwrap();
    assert_eq!(before, after);
    refused(
        &run(&[&two[..], &["--set", "train.seed=3"]].concat()),
        &["train.seed=3", "optimizers/muon-0.001", "--out"],
    );

    // Killed before the first checkpoint, a run begins anew; killed at the end, it goes on.
    for killed in [true, false] {
        let run = shop.path("optimizers/muon-0.01");
        let note = std::fs::read_to_string(run.join("trial.json")).unwrap();
        std::fs::write(run.join("trial.json"), note.replace("\"ended\": true", "\"ended\": false")).unwrap();
        if killed {
            std::fs::remove_file(run.join("summary.json")).unwrap();
            std::fs::remove_dir_all(run.join("checkpoints")).unwrap();
            std::fs::create_dir_all(run.join("checkpoints/.unfinished-step-000008")).unwrap();
        }
        assert_eq!(cells(&table(&two), "muon")[1..3], cells(&text, "muon")[1..3]);
    }

    let text = table(&["parameterizations", "--rank", "4", "--lr", "0.01"]);
    let out = shop.path("runs/compare-parameterizations");
    let loss = |name: &str| summary(&out.join(format!("{name}-0.01")))["final_validation_loss"].as_f64().unwrap();
    for name in PARAMETERIZATIONS.iter().map(|entry| entry.spec().name) {
        let ratio = format!("{:.3} x", loss(name) / loss("dense"));
        assert_eq!(cells(&text, name)[1..4], [format!("{:.4}", loss(name)), "0.01 (1)".into(), ratio], "{text}");
    }
    // What the settings do not allow stands in the table, with its reason.
    let text = table(&["parameterizations", "dense", "low-rank", "--rank", "33", "--lr", "0.01", "--out", "wide"]);
    assert!(cells(&text, "low-rank")[1].contains("33") && cells(&text, "low-rank")[2].is_empty(), "{text}");
    assert_eq!(cells(&text, "dense")[1], format!("{:.4}", loss("dense")), "{text}");
    let wide = ["parameterizations", "low-rank", "cola", "--rank", "0", "--lr", "0.01", "--out", "none"];
    refused(&run(&wide), &["every run failed", "low-rank: ", "cola: ", "at least 1"]);
    refused(&run(&["optimizers", "adamv"]), &["adamv", "adamw"]);
    refused(&run(&["parameterizations", "sparse"]), &["sparse", "sltrain"]);
    refused(&shop.run(&["compare", "adamw"]), &["adamw", "lowrank compare <COMMAND>"]);

    // A run that fails on its way counts as tried.
    let stop = ["--set", "schedule.kind=constant", "--set", "schedule.warmup_steps=0", "--set", "optimizer.clip=0"];
    let wild = ["optimizers", "adamw", "--lr", "0.01,1000000", "--out", "wild"];
    let text = table(&[&wild[..], &stop[..]].concat());
    assert_eq!(cells(&text, "adamw")[2], "0.01 (2)", "{text}");
    let wild = ["optimizers", "adamw", "--lr", "1000000", "--out", "wild"];
    let output = run(&[&wild[..], &stop[..]].concat());
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    assert!(stderr(&output).contains("every run failed"), "{}", stderr(&output));
}

#[test]
fn adapters_are_compared_on_one_model() {
    let shop = Workshop::with_model(20);
    let words = ["compare", "adapters", "--quiet", "--model", "model", "--data", "examples.jsonl", "--steps", "2"];
    let small = ["--rank", "3", "--set", "train.batch=2", "--set", "train.seq_len=48"];
    let text = succeeded(shop.run(&[&words[..], &["vera", "bone", "svfit"], &small].concat())).stdout;
    let text = String::from_utf8(text).unwrap();
    // Two blocks of four layers [32, 32], two [32, 48] and one [48, 32], each with a vector of the rank and one of the outputs.
    assert_eq!(cells(&text, "vera")[3], (2 * (7 * 3 + 5 * 32 + 2 * 48)).to_string(), "{text}");
    assert!(cells(&text, "vera")[2].ends_with("(4)") || cells(&text, "vera")[2].ends_with("(5)"), "{text}");
    assert!(cells(&text, "bone")[1].contains('3') && cells(&text, "bone")[1].contains("32"), "{text}");
    let runs = std::fs::read_dir(shop.path("runs/compare-adapters")).unwrap();
    let runs: Vec<String> = runs.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    // The usual rate and two higher ones, and one or two beyond the end that was the best; nothing is left of what was refused.
    for name in ["vera-0.004", "vera-0.02", "vera-0.1", "svfit-0.001", "compare.md"] {
        assert!(runs.iter().any(|run| run == name), "{runs:?}");
    }
    assert!(!runs.iter().any(|run| run.starts_with("bone")), "{runs:?}");
    // `finetune` takes the usual rate too.
    let words = ["finetune", "--quiet", "--model", "model", "--data", "examples.jsonl", "--adapter", "vera"];
    succeeded(shop.run(&[&words[..], &["--out", "vera", "--steps", "1", "--seq-len", "48"]].concat()));
    let config = std::fs::read_to_string(shop.path("vera/config.toml")).unwrap();
    assert!(config.contains("lr = 0.004"), "{config}");
}

#[test]
fn seeds_show_the_spread_and_every_method_has_as_many_tries() {
    let shop = Workshop::new(20);
    let tiny = shop.tiny("unused", &[]);
    let settings = &tiny[tiny.iter().position(|word| *word == "--set").unwrap()..];
    let words =
        ["compare", "optimizers", "adamw", "muon", "--quiet", "--steps", "4", "--set", "schedule.warmup_steps=1"];
    let run = |more: &[&str]| {
        let output = succeeded(shop.run(&[&words[..], more, settings].concat()));
        String::from_utf8(output.stdout).unwrap()
    };
    let text = run(&["--lr", "0.01", "--seeds", "3", "--set", "train.seed=5"]);
    let out = shop.path("runs/compare-optimizers");
    let loss = |name: &str| summary(&out.join(name))["final_validation_loss"].as_f64().unwrap();
    let moments = |name: &str| {
        let losses = ["", "-seed-6", "-seed-7"].map(|seed| loss(&format!("{name}-0.01{seed}")));
        let mean = losses.iter().sum::<f64>() / 3.0;
        (mean, (losses.iter().map(|loss| (loss - mean).powi(2)).sum::<f64>() / 2.0).sqrt())
    };
    let (first, other) = (moments("adamw"), moments("muon"));
    for (name, (mean, deviation)) in [("adamw", first), ("muon", other)] {
        assert!(deviation > 0.0);
        assert_eq!(cells(&text, name)[1..3], [format!("{mean:.4} ± {deviation:.4}"), "0.01 (1)".into()], "{text}");
    }
    let z = (other.0 - first.0) / ((first.1.powi(2) + other.1.powi(2)) / 3.0).sqrt();
    assert_eq!(
        [cells(&text, "adamw")[3].clone(), cells(&text, "muon")[3].clone()],
        ["+0.00".into(), format!("{z:+.2}")]
    );
    // Finished runs are read again.
    assert_eq!(run(&["--lr", "0.01", "--seeds", "3", "--set", "train.seed=5"]), text);

    let text = run(&["--out", "search"]);
    let tried = |name: &str| cells(&text, name)[2].split(['(', ')']).nth(1).unwrap().to_string();
    assert_eq!(tried("adamw"), tried("muon"), "{text}");
    let runs = std::fs::read_dir(shop.path("search")).unwrap().count() - 1;
    assert_eq!(runs, 2 * tried("muon").parse::<usize>().unwrap());
    refused(&shop.run(&["compare", "optimizers", "--seeds", "0"]), &["--seeds", "1..=1000"]);
}
