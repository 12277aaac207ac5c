//! Promises of a run: no work is lost, no folder of another run is touched, and numbers that are compared are measured on the same text.

#[path = "program.rs"]
mod program;

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use program::{Workshop, checkpoints, metrics, refused, stderr, succeeded, summary, tensors};

fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !done() {
        assert!(begin.elapsed() < Duration::from_secs(120), "waited two minutes for {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn start(mut command: Command) -> Child {
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the program starts")
}

fn signal(process: u32, name: &str) {
    assert!(Command::new("kill").args([name, &process.to_string()]).status().expect("kill").success());
}

fn resume<'a>(job: &'a str, out: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    [&[job, "--quiet", "--resume", "--out", out], more].concat()
}

const CONSTANT: [&str; 2] = ["--set", "schedule.kind=constant"];

#[test]
fn data_and_models_that_moved_are_named_on_resume() {
    let shop = Workshop::with_model(30);
    let more = [&CONSTANT[..], &["--steps", "4", "--set", "checkpoint.every=2"]].concat();
    succeeded(shop.run(&shop.tiny("run", &more)));
    std::fs::create_dir(shop.path("elsewhere")).unwrap();
    std::fs::rename(shop.path("text"), shop.path("elsewhere/text")).unwrap();
    refused(
        &shop.run(&resume("pretrain", "run", &["--steps", "6"])),
        &["data.path = text", "--data names the new place"],
    );
    succeeded(shop.run(&resume("pretrain", "run", &["--steps", "6", "--data", "elsewhere/text"])));
    assert_eq!(summary(&shop.path("run"))["steps"], 6);
    std::fs::write(shop.path("elsewhere/text/more.txt"), "a text that was not there when the run began").unwrap();
    refused(&shop.run(&resume("pretrain", "run", &["--steps", "8"])), &["data.path", "elsewhere/text", "changed"]);

    // One run has the name of a structure, which must not be taken for the folder of an adapter.
    let runs = [("lora", "lora"), ("none", "whole")];
    for (adapter, out) in runs {
        let set = format!("adapter.name={adapter}");
        let more = [&CONSTANT[..], &["--steps", "2", "--set", &set]].concat();
        succeeded(shop.run(&shop.tuned(out, &more)));
    }
    std::fs::rename(shop.path("model"), shop.path("elsewhere/model")).unwrap();
    for (_, out) in runs {
        let moved = resume("finetune", out, &["--steps", "4", "--model", "elsewhere/model"]);
        succeeded(shop.run(&moved));
        assert_eq!(summary(&shop.path(out))["steps"], 4);
    }
    let weights = shop.path("elsewhere/model/model.safetensors");
    let mut bytes = std::fs::read(&weights).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&weights, bytes).unwrap();
    refused(&shop.run(&resume("finetune", "lora", &["--steps", "6"])), &["model.name", "elsewhere/model", "changed"]);
}

#[test]
fn held_out_text_that_changed_is_refused() {
    let shop = Workshop::new(40);
    succeeded(shop.run(&["tokenize", "--quiet", "--data", "text", "--tokenizer", "bytes", "--out", "tokens"]));
    let more = [&CONSTANT[..], &["--set", "data.path=tokens", "--steps", "4"]].concat();
    succeeded(shop.run(&shop.tiny("run", &more)));
    let held_out = shop.path("tokens/validation");
    std::fs::rename(&held_out, shop.path("aside")).unwrap();
    std::fs::create_dir(&held_out).unwrap();
    for entry in std::fs::read_dir(shop.path("tokens/train")).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, held_out.join(path.file_name().unwrap())).unwrap();
    }
    refused(&shop.run(&resume("pretrain", "run", &["--steps", "6"])), &["held out", "changed"]);
}

#[test]
fn a_run_is_lengthened_where_its_past_stays_the_same() {
    let shop = Workshop::new(20);
    let more = |kind: &'static str| {
        ["--steps", "8", "--set", kind, "--set", "checkpoint.every=4", "--set", "schedule.warmup_steps=1"]
    };
    for (out, steps) in [("short", "8"), ("long", "16")] {
        let mut args = more("schedule.kind=wsd");
        args[1] = steps;
        succeeded(shop.run(&shop.tiny(out, &args)));
    }
    // It decays over the last two of its eight steps already.
    let longer = resume("pretrain", "short", &["--steps", "16"]);
    refused(&shop.run(&longer), &["train.steps", "8 steps", "16 steps", "--resume-from", "--model"]);
    let from = resume("pretrain", "short", &["--steps", "16", "--resume-from", "step-000004"]);
    succeeded(shop.run(&from));
    let last = |out: &str| tensors(&checkpoints(&shop.path(out)).pop().unwrap());
    assert!(last("short") == last("long"), "as if it had been that long from the start");
    assert!(shop.path("short/checkpoints/superseded-step-000008/manifest.json").exists(), "nothing is deleted");

    succeeded(shop.run(&shop.tiny("cosine", &more("schedule.kind=cosine"))));
    std::fs::remove_dir_all(shop.path("cosine/checkpoints/step-000008")).unwrap();
    refused(&shop.run(&resume("pretrain", "cosine", &["--steps", "16"])), &["train.steps", "step 2", "--model"]);
}

#[cfg(unix)]
#[test]
fn written_files_follow_the_umask() {
    use std::os::unix::fs::PermissionsExt;
    let shop = Workshop::with_model(20);
    let words = [
        ("run", shop.tiny("run", &["--steps", "2"])),
        ("tuned", shop.tuned("tuned", &["--steps", "2"])),
        ("dense", vec!["export", "--model", "model", "--out", "dense"]),
    ];
    for (out, args) in words {
        let script = "umask 027; exec \"$0\" \"$@\"";
        let mut command = Command::new("sh");
        command.args(["-c", script, env!("CARGO_BIN_EXE_lowrank")]).args(args).current_dir(shop.dir.path());
        succeeded(command.output().unwrap());
        let mut folders = vec![shop.path(out)];
        while let Some(folder) = folders.pop() {
            for entry in std::fs::read_dir(folder).unwrap() {
                let path = entry.unwrap().path();
                let mode = std::fs::metadata(&path).unwrap().permissions().mode() & 0o777;
                let wanted = if path.is_dir() { 0o750 } else { 0o640 };
                assert_eq!(mode, wanted, "{}: {mode:o}", path.display());
                if path.is_dir() {
                    folders.push(path);
                }
            }
        }
    }
}

/// Losses of a run's metrics by step.
fn logged(run: &Path, key: &str) -> Vec<(u64, f64)> {
    let lines = metrics(run);
    lines.iter().filter_map(|line| Some((line["step"].as_u64()?, line[key].as_f64()?))).collect()
}

#[test]
fn validation_losses_are_measured_on_one_text() {
    let shop = Workshop::new(60);
    let more =
        ["--steps", "12", "--set", "eval.every=4", "--set", "eval.batches=2", "--set", "data.validation_fraction=0.3"];
    succeeded(shop.run(&shop.tiny("run", &more)));
    let run = shop.path("run");
    let losses = logged(&run, "validation_loss");
    assert_eq!(losses.iter().map(|(step, _)| *step).collect::<Vec<_>>(), [4, 8, 12]);
    let summary = summary(&run);
    let of = |key: &str| summary[key].as_f64().unwrap();
    let best = losses.iter().map(|(_, loss)| *loss).fold(f64::INFINITY, f64::min);
    assert_eq!((of("validation_loss"), of("best_validation_loss")), (losses[2].1, best));
    assert_eq!(logged(&run, "final_validation_loss"), [(12, of("final_validation_loss"))]);
    assert_ne!(of("final_validation_loss"), of("validation_loss"), "two batches are not all of the text");

    // The same batches after a resume.
    succeeded(shop.run(&shop.tiny("halves", &more)));
    std::fs::remove_dir_all(shop.path("halves/checkpoints/step-000012")).unwrap();
    succeeded(shop.run(&resume("pretrain", "halves", &["--resume-from", "8"])));
    assert_eq!(logged(&shop.path("halves"), "validation_loss"), losses);
}

#[test]
fn the_clock_ends_a_run_that_asks_for_it_and_the_learning_rate_follows() {
    let shop = Workshop::new(40);
    let default = |out: &str| std::fs::read_to_string(shop.path(out).join("config.toml")).unwrap();
    succeeded(shop.run(&shop.tiny("steps", &["--steps", "2"])));
    assert!(default("steps").contains("minutes = 0.0"), "{}", default("steps"));

    let more =
        ["--steps", "10000000", "--minutes", "0.05", "--set", "schedule.warmup_steps=2", "--set", "checkpoint.every=0"];
    let args: Vec<&str> = shop.tiny("timed", &more).into_iter().filter(|word| *word != "--quiet").collect();
    let output = succeeded(shop.run(&args));
    assert!(stderr(&output).contains("train.minutes = 0.05 ended the run"), "{}", stderr(&output));
    let figures = summary(&shop.path("timed"));
    assert_eq!(figures["ended_by"], "clock");
    let rates = logged(&shop.path("timed"), "lr");
    let (highest, last) = (rates.iter().map(|(_, lr)| *lr).fold(0.0, f64::max), rates.last().unwrap().1);
    assert!(last < 0.2 * highest, "the decay ends with the run: {last} of {highest}");

    let before = std::fs::read(shop.path("timed/summary.json")).unwrap();
    let again = succeeded(shop.run(&["pretrain", "--resume", "--out", "timed"]));
    assert!(stderr(&again).contains("--minutes"), "{}", stderr(&again));
    assert_eq!(std::fs::read(shop.path("timed/summary.json")).unwrap(), before);
    succeeded(shop.run(&resume("pretrain", "timed", &["--minutes", "0.06"])));
    assert!(summary(&shop.path("timed"))["steps"].as_u64() > figures["steps"].as_u64());
}

#[test]
fn results_of_another_run_are_refused_or_replaced_on_demand() {
    let shop = Workshop::new(20);
    succeeded(shop.run(&shop.tiny("run", &["--steps", "4"])));
    std::fs::write(shop.path("run/notes.txt"), "of the user").unwrap();
    std::fs::remove_file(shop.path("run/config.toml")).unwrap();
    let before = (tensors(&checkpoints(&shop.path("run"))[0]), metrics(&shop.path("run")));
    let again = shop.tiny("run", &["--steps", "2"]);
    refused(&shop.run(&again), &["run", "--resume", "--out", "--overwrite"]);
    // A new run that does not come about removes nothing.
    refused(&shop.run(&[&again[..], &["--overwrite", "--data", "nowhere"]].concat()), &["nowhere"]);
    assert_eq!((tensors(&checkpoints(&shop.path("run"))[0]), metrics(&shop.path("run"))), before);

    succeeded(shop.run(&[&again[..], &["--overwrite"]].concat()));
    assert_eq!(metrics(&shop.path("run")).len(), 2);
    assert_eq!(std::fs::read_dir(shop.path("run/tensorboard")).unwrap().count(), 1);
    assert!(checkpoints(&shop.path("run"))[0].ends_with("step-000002") && shop.path("run/notes.txt").exists());

    std::fs::remove_dir_all(shop.path("run/checkpoints")).unwrap();
    let output = shop.run(&resume("pretrain", "run", &[]));
    refused(&output, &["no checkpoint to resume from", "--overwrite"]);
    assert_eq!(metrics(&shop.path("run")).len(), 2, "nothing is emptied");
}

#[test]
fn a_newest_checkpoint_that_cannot_be_read_stays_and_stops_the_run() {
    let shop = Workshop::new(20);
    let more =
        [&CONSTANT[..], &["--steps", "15", "--set", "checkpoint.every=5", "--set", "checkpoint.keep_last=3"]].concat();
    succeeded(shop.run(&shop.tiny("run", &more)));
    let newest = checkpoints(&shop.path("run")).pop().unwrap();
    let manifest = std::fs::read_to_string(newest.join("manifest.json")).unwrap();
    std::fs::write(newest.join("manifest.json"), manifest.replace("\"version\": 1", "\"version\": 9")).unwrap();
    let longer = resume("pretrain", "run", &["--steps", "20"]);
    refused(&shop.run(&longer), &["step-000015", "version 9", "--resume-from step-000010"]);
    assert_eq!(checkpoints(&shop.path("run")).len(), 3);
    refused(&shop.run(&[&longer[..], &["--resume-from", "step-000011"]].concat()), &["step-000011", "step-000010"]);
    succeeded(shop.run(&[&longer[..], &["--resume-from", "step-000010"]].concat()));
    assert!(shop.path("run/checkpoints/superseded-step-000015/manifest.json").exists());
    assert_eq!(summary(&shop.path("run"))["steps"], 20);
}

#[test]
fn resuming_a_finished_run_changes_nothing() {
    let shop = Workshop::new(20);
    succeeded(shop.run(&shop.tiny("run", &["--steps", "6", "--set", "eval.every=3"])));
    let files = || {
        let mut found: Vec<(PathBuf, Vec<u8>)> = Vec::new();
        let mut folders = vec![shop.path("run")];
        while let Some(folder) = folders.pop() {
            for entry in std::fs::read_dir(folder).unwrap() {
                let path = entry.unwrap().path();
                match path.is_dir() {
                    true => folders.push(path),
                    false if path.ends_with("lock") => {}
                    false => found.push((path.clone(), std::fs::read(path).unwrap())),
                }
            }
        }
        found.sort();
        found
    };
    let before = files();
    let output = succeeded(shop.run(&["pretrain", "--resume", "--out", "run"]));
    assert!(stderr(&output).contains("6 steps already"), "{}", stderr(&output));
    assert!(files() == before);

    // Killed between its last checkpoint and its summary, it writes one with every figure.
    let whole = summary(&shop.path("run"));
    std::fs::remove_file(shop.path("run/summary.json")).unwrap();
    succeeded(shop.run(&resume("pretrain", "run", &[])));
    let again = summary(&shop.path("run"));
    for key in ["steps", "tokens", "validation_loss", "final_validation_loss", "best_validation_loss", "weight_bytes"] {
        assert_eq!(again[key], whole[key], "{key}");
    }
    assert!(again["tokens_per_second"].as_f64().unwrap() > 0.0);
}

/// Restarts touch the optimizer's state a second time in a step; what is measured there counts once.
#[test]
fn optimizer_state_counts_once_in_a_step_with_a_restart() {
    let shop = Workshop::new(20);
    let mut more = vec!["--steps", "100", "--parameterization", "relora", "--set", "log.every=1"];
    // Step 100 is measured, and the ninth restart follows it.
    for setting in [
        "model.parameterization.options.rank=6",
        "model.parameterization.options.reset_every=11",
        "model.parameterization.options.restart_warmup=2",
        "schedule.warmup_steps=5",
    ] {
        more.extend(["--set", setting]);
    }
    succeeded(shop.run(&shop.tiny("run", &more)));
    let lines = metrics(&shop.path("run"));
    let bytes = |step: u64| lines.iter().find(|line| line["step"] == step).unwrap()["state_bytes"].as_u64().unwrap();
    assert_eq!(bytes(100), bytes(99));
    assert!(bytes(99) > 0);
}

#[cfg(unix)]
#[test]
fn a_comparison_stops_its_run_and_touches_no_folder_of_others() {
    let shop = Workshop::new(20);
    let tiny = shop.tiny("unused", &[]);
    let settings = &tiny[tiny.iter().position(|word| *word == "--set").unwrap()..];
    let words =
        ["compare", "optimizers", "adamw", "--quiet", "--steps", "1000000", "--lr", "0.01", "--out", "compared"];
    let args = [&words[..], settings].concat();
    let mut child = start(shop.command(&args));
    let run = shop.path("compared/adamw-0.01");
    wait_for("the first steps", || {
        std::fs::read_to_string(run.join("metrics.jsonl")).is_ok_and(|text| !text.is_empty())
    });
    let process: u32 = std::fs::read_to_string(run.join("lock")).unwrap().trim().parse().unwrap();
    signal(child.id(), "-TERM");
    assert_eq!(child.wait().unwrap().code(), Some(143));
    assert!(!Command::new("kill").args(["-0", &process.to_string()]).stderr(Stdio::null()).status().unwrap().success());
    assert_eq!(checkpoints(&run).len(), 1, "it saved before it stopped");

    // A run that somebody else made in such a folder.
    succeeded(shop.run(&shop.tiny("other/adamw-0.01", &["--steps", "2"])));
    let before = summary(&shop.path("other/adamw-0.01"));
    let words = ["compare", "optimizers", "adamw", "--quiet", "--steps", "4", "--lr", "0.01", "--out", "other"];
    let output = shop.run(&[&words[..], settings].concat());
    assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
    assert!(stderr(&output).contains("already holds a run"), "{}", stderr(&output));
    assert_eq!(summary(&shop.path("other/adamw-0.01")), before);
    assert!(!shop.path("other/adamw-0.01/trial.json").exists());
}

#[test]
fn simultaneous_starts_get_folders_of_their_own() {
    let shop = Workshop::new(20);
    let args: Vec<&str> = {
        let tiny = shop.tiny("unused", &["--steps", "2"]);
        let out = tiny.iter().position(|word| *word == "--out").unwrap();
        [&tiny[..out], &tiny[out + 2..]].concat()
    };
    let children: Vec<Child> = (0..4).map(|_| start(shop.command(&args))).collect();
    for child in children {
        succeeded(child.wait_with_output().unwrap());
    }
    for number in 1..=4 {
        assert_eq!(summary(&shop.path(&format!("runs/pretrain-{number:03}")))["steps"], 2);
    }
}

#[cfg(unix)]
#[test]
fn a_pipe_in_place_of_a_file_is_refused() {
    let shop = Workshop::with_model(10);
    for name in ["config.json", "tokenizer.json", "model.safetensors"] {
        let path = shop.path("model").join(name);
        std::fs::rename(&path, shop.path("aside")).unwrap();
        assert!(Command::new("mkfifo").arg(&path).status().unwrap().success());
        let mut child = start(shop.command(&["generate", "--model", "model", "--tokens", "2"]));
        wait_for(&format!("an answer to a pipe as {name}"), || child.try_wait().unwrap().is_some());
        let output = child.wait_with_output().unwrap();
        refused(&output, &[name, "not a regular file"]);
        std::fs::remove_file(&path).unwrap();
        std::fs::rename(shop.path("aside"), &path).unwrap();
    }
}

#[test]
fn one_seed_gives_the_same_bits_in_two_processes() {
    let shop = Workshop::with_model(30);
    let last = |out: &str| tensors(&checkpoints(&shop.path(out)).pop().unwrap());
    for out in ["a", "b"] {
        succeeded(shop.run(&shop.tiny(out, &["--steps", "12", "--seed", "7"])));
    }
    assert!(last("a") == last("b"));
    for out in ["c", "d"] {
        let more = ["--steps", "12", "--seed", "7", "--set", "adapter.name=randlora", "--set", "data.packing=true"];
        succeeded(shop.run(&shop.tuned(out, &more)));
    }
    assert!(last("c") == last("d"));
    succeeded(shop.run(&shop.tiny("other", &["--steps", "12", "--seed", "8"])));
    assert!(last("other") != last("a"));
}
