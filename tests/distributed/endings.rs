//! Runs of several processes that are refused, and runs that end early.

use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use lowrank_kernels::instructions::InstructionSet;

use crate::launch::{SHARD, mpirun, saved, skipped, together};
use crate::program::{Workshop, refused, stderr, succeeded};

/// Two processes, of which the second has other arguments than the first.
fn one_differs(shop: &Workshop, first: &str, second: &str) -> Output {
    let script = format!(
        "if [ $OMPI_COMM_WORLD_RANK = 1 ]; then set -- \"$@\" {second}; else set -- \"$@\" {first}; fi; exec \"$0\" \"$@\""
    );
    let launcher = mpirun(shop, 2, &[]);
    let mut args: Vec<String> = launcher.get_args().map(|arg| arg.to_string_lossy().into_owned()).collect();
    let program = args.pop().expect("the program");
    let mut command = Command::new("mpirun");
    command.args(args).args(["bash", "-c", &script, &program]).args(shop.tiny("run", &[]));
    command.envs(launcher.get_envs().filter_map(|(name, value)| Some((name, value?))));
    command.current_dir(shop.dir.path()).stdin(Stdio::null()).output().expect("mpirun starts")
}

/// Bad input that is reported by one process alone, and that leaves nothing behind.
fn refused_once(output: &Output, parts: &[&str]) {
    refused(output, parts);
    let text = stderr(output);
    assert_eq!(text.matches("error: ").count(), 1, "{text}");
}

#[test]
fn other_settings_are_refused_by_one_message() {
    if skipped() {
        return;
    }
    let shop = Workshop::new(40);
    for (first, second, part) in [
        ("--steps 4 ", "--steps 4 --set optimizer.lr=0.002", "another configuration"),
        ("--steps 4 ", "--steps 4 --set train.shard_state=true", "another configuration"),
        ("--steps 4 --set optimizer.name=adamw", "--steps 4 --set optimizer.name=scale", "another configuration"),
        ("--steps 5", "--steps 6", "another length of the run"),
        ("--steps 4 --set eval.every=2", "--steps 4 --set eval.every=3", "another length of the run"),
        ("--steps 4 --set train.batch=2", "--steps 4 --set train.batch=3", "another configuration"),
        ("--steps 4 --set train.seed=1", "--steps 4 --set train.seed=2", "another weights"),
    ] {
        refused_once(&one_differs(&shop, first, second), &["rank 1", part]);
        assert!(!shop.path("run").exists(), "{second} leaves a folder");
    }
}

#[test]
fn another_instruction_set_is_refused() {
    if skipped() {
        return;
    }
    if InstructionSet::best() != InstructionSet::Avx512 {
        println!("skipped: this processor has no two instruction sets to choose from");
        return;
    }
    let shop = Workshop::new(40);
    let output = one_differs(&shop, "--steps 4", "--steps 4; export LOWRANK_SIMD=avx2");
    refused_once(&output, &["rank 1", "another instruction set", "LOWRANK_SIMD"]);
    assert!(!shop.path("run").exists());
}

/// Settings that only one process rejects end the others.
#[test]
fn an_error_of_one_process_ends_all() {
    if skipped() {
        return;
    }
    let shop = Workshop::new(40);
    let output = one_differs(&shop, "--steps 4", "--steps 4 --set optimizer.options.beta_1=7");
    refused_once(&output, &["rank 1 of 2", "beta_1"]);
    assert!(!shop.path("run").exists());
}

#[test]
fn other_data_and_too_few_rows_are_refused() {
    if skipped() {
        return;
    }
    let shop = Workshop::new(40);
    std::fs::create_dir(shop.path("other")).unwrap();
    for entry in std::fs::read_dir(shop.path("text")).unwrap() {
        let path = entry.unwrap().path();
        let text = std::fs::read_to_string(&path).unwrap().replace("memory", "memoir");
        std::fs::write(shop.path("other").join(path.file_name().unwrap()), text).unwrap();
    }
    refused_once(&one_differs(&shop, "--steps 4 --data text", "--steps 4 --data other"), &["rank 1", "data.path"]);
    let many = shop.tiny("run", &["--steps", "4", "--set", "train.batch=400"]);
    refused(&together(&shop, 2, &many), &["train.batch", "2 processes"]);
}

fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !done() {
        assert!(begin.elapsed() < Duration::from_secs(120), "waited two minutes for {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Process ids of the ranks that mpirun started.
fn ranks_of(launcher: u32) -> Vec<String> {
    let output = Command::new("pgrep").args(["-P", &launcher.to_string(), "lowrank"]).output().expect("pgrep");
    String::from_utf8_lossy(&output.stdout).split_whitespace().map(String::from).collect()
}

#[test]
fn a_dead_rank_ends_all_and_a_signal_to_one_stops_all() {
    if skipped() {
        return;
    }
    let shop = Workshop::new(40);
    let more = ["--steps", "300", "--set", "checkpoint.every=20", "--set", SHARD];
    succeeded(together(&shop, 2, &shop.tiny("whole", &more)));
    for (out, signal, code) in [("killed", "-KILL", None), ("stopped", "-TERM", Some(143))] {
        let mut command = mpirun(&shop, 2, &shop.tiny(out, &more));
        let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("mpirun starts");
        wait_for("a checkpoint", || shop.path(out).join("checkpoints/step-000020/manifest.json").exists());
        let ranks = ranks_of(child.id());
        assert_eq!(ranks.len(), 2);
        assert!(Command::new("kill").args([signal, &ranks[1]]).status().unwrap().success());
        let output = child.wait_with_output().unwrap();
        assert!(!output.status.success(), "{}", stderr(&output));
        if code.is_some() {
            assert_eq!(output.status.code(), code, "{}", stderr(&output));
            assert!(stderr(&output).contains("--resume"), "{}", stderr(&output));
        }
        succeeded(together(&shop, 2, &["pretrain", "--quiet", "--resume", "--out", out]));
        assert!(saved(&shop.path("whole")) == saved(&shop.path(out)), "{signal} changed the weights");
    }
}

/// Open MPI kills what has not ended a second after the signal: the checkpoint before is used then.
#[test]
fn a_signal_to_the_launcher_leaves_a_checkpoint_that_goes_on_with_the_same_bits() {
    if skipped() {
        return;
    }
    let shop = Workshop::new(40);
    let more = ["--steps", "300", "--set", "checkpoint.every=20", "--set", SHARD];
    succeeded(together(&shop, 2, &shop.tiny("whole", &more)));
    let mut command = mpirun(&shop, 2, &shop.tiny("stopped", &more));
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("mpirun starts");
    wait_for("a checkpoint", || shop.path("stopped/checkpoints/step-000020/manifest.json").exists());
    let ranks = ranks_of(child.id());
    assert!(Command::new("kill").args(["-TERM", &child.id().to_string()]).status().unwrap().success());
    let output = child.wait_with_output().unwrap();
    assert!(!output.status.success(), "{}", stderr(&output));
    assert!(!stderr(&output).contains("panicked"), "{}", stderr(&output));
    wait_for("the end of all", || ranks.iter().all(|rank| !std::path::Path::new("/proc").join(rank).exists()));
    succeeded(together(&shop, 2, &["pretrain", "--quiet", "--resume", "--out", "stopped"]));
    assert!(saved(&shop.path("whole")) == saved(&shop.path("stopped")), "the signal changed the weights");
}
