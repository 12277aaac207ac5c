//! Runs of several processes, and their comparison with those of one.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use crate::program::{Workshop, checkpoints, metrics, succeeded, summary, tensors};

/// Setting that divides the optimizer's state.
pub const SHARD: &str = "train.shard_state=true";

/// `mpirun` with this number of processes of one thread each, which may share the cores of a small machine.
pub fn mpirun(shop: &Workshop, ranks: usize, args: &[&str]) -> Command {
    let mut command = Command::new("mpirun");
    command.args(["--oversubscribe", "--bind-to", "none", "--mca", "mpi_yield_when_idle", "1", "-n"]);
    command.arg(ranks.to_string()).arg(env!("CARGO_BIN_EXE_lowrank")).args(args);
    command.env("OMPI_ALLOW_RUN_AS_ROOT", "1").env("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1");
    command.env("RAYON_NUM_THREADS", "1").current_dir(shop.dir.path()).stdin(Stdio::null());
    command
}

pub fn together(shop: &Workshop, ranks: usize, args: &[&str]) -> Output {
    mpirun(shop, ranks, args).output().expect("mpirun starts")
}

/// Returns true, and says so, if several processes cannot run here.
pub fn skipped() -> bool {
    if !cfg!(feature = "mpi") {
        println!("skipped: built without the feature mpi");
        return true;
    }
    let found = Command::new("mpirun").arg("--version").output().is_ok_and(|output| output.status.success());
    assert!(found, "built with the feature mpi, and mpirun is not there");
    false
}

/// Weights and optimizer state of the last checkpoint of a run.
pub fn saved(run: &Path) -> BTreeMap<String, Vec<u8>> {
    tensors(&checkpoints(run).pop().expect("a checkpoint"))
}

/// Trains with as many processes, and in one process with as many micro-batches: the files and the losses must be equal.
pub fn same_bits(shop: &Workshop, job: &str, ranks: usize, more: &[&str]) {
    let args = |out| if job == "finetune" { shop.tuned(out, more) } else { shop.tiny(out, more) };
    same_runs(shop, ranks, &args("alone"), &args("several"));
}

/// As [`same_bits`], with all arguments of the run of one process and of that of several, in the folders `alone` and
/// `several`.
pub fn same_runs(shop: &Workshop, ranks: usize, alone: &[&str], several_args: &[&str]) {
    let accumulation = format!("train.accumulation={ranks}");
    succeeded(shop.run(&[alone, &["--overwrite", "--set", &accumulation]].concat()));
    succeeded(together(shop, ranks, &[several_args, &["--overwrite"]].concat()));
    let (one, many) = (saved(&shop.path("alone")), saved(&shop.path("several")));
    assert!(one.keys().eq(many.keys()) && one.len() > 1, "{:?} {:?}", one.keys(), many.keys());
    let logged = |run: &str| metrics(&shop.path(run)).into_iter().next_back().expect("a line");
    let (several, ranks_as_f64) = (logged("several"), ranks as f64);
    let [sent, gradients] = ["sent_bytes", "gradient_bytes"].map(|key| several[key].as_f64().expect("a number"));
    let expected = 2.0 * (ranks_as_f64 - 1.0) / ranks_as_f64 * gradients;
    // An owner sends its weights to all others.
    let shared = several_args.contains(&SHARD);
    let weights = if shared { (ranks_as_f64 - 1.0) * gradients } else { 0.0 };
    let most = 1.02 * expected + weights + 4096.0;
    // Gradients that an allocation drops are sent before.
    let dropped = several_args.contains(&"--allocation");
    assert!(sent >= expected && (sent <= most || dropped), "{sent} bytes sent, {expected} by the formula");
    assert!(several["communication_seconds"].as_f64().is_some_and(|seconds| seconds > 0.0), "{several}");
    assert!(logged("alone")["sent_bytes"].is_null());
    for (name, bytes) in &one {
        assert!(bytes == &many[name], "{name} differs with {ranks} processes and {several_args:?}");
    }
    let [alone, several] = ["alone", "several"].map(|run| summary(&shop.path(run)));
    for key in ["train_loss", "validation_loss", "final_validation_loss", "validation_accuracy"] {
        assert_eq!(alone[key], several[key], "{key} with {ranks} processes and {several_args:?}");
    }
    if shared {
        let held = several["process_state_bytes"].as_array().expect("bytes of each process");
        assert_eq!(held.len(), ranks);
        let held: Vec<u64> = held.iter().map(|bytes| bytes.as_u64().expect("a number")).collect();
        assert_eq!(several["optimizer_state_bytes"].as_u64(), held.iter().copied().max());
        let whole = alone["optimizer_state_bytes"].as_u64().expect("a number");
        assert_eq!(held.iter().sum::<u64>(), whole, "{held:?} with {several_args:?}");
    }
}
