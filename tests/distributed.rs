//! Several processes under `mpirun`: the bits of one process. Without the feature `mpi` only the refusal of
//! such a start is tested, and the rest says that it was skipped.

#[path = "program.rs"]
mod program;

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use program::{Workshop, checkpoints, metrics, refused, stderr, succeeded, summary, tensors};

/// `mpirun` with this number of processes of one thread each, which may share the cores of a small machine.
fn mpirun(shop: &Workshop, ranks: usize, args: &[&str]) -> Command {
    let mut command = Command::new("mpirun");
    command.args(["--oversubscribe", "--bind-to", "none", "--mca", "mpi_yield_when_idle", "1", "-n"]);
    command.arg(ranks.to_string()).arg(env!("CARGO_BIN_EXE_lowrank")).args(args);
    command.env("OMPI_ALLOW_RUN_AS_ROOT", "1").env("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1");
    command.env("RAYON_NUM_THREADS", "1").current_dir(shop.dir.path()).stdin(Stdio::null());
    command
}

fn together(shop: &Workshop, ranks: usize, args: &[&str]) -> Output {
    mpirun(shop, ranks, args).output().expect("mpirun starts")
}

/// Returns true, and says so, if several processes cannot run here.
fn skipped() -> bool {
    if !cfg!(feature = "mpi") {
        println!("skipped: built without the feature mpi");
        return true;
    }
    let found = Command::new("mpirun").arg("--version").output().is_ok_and(|output| output.status.success());
    assert!(found, "built with the feature mpi, and mpirun is not there");
    false
}

/// Weights and optimizer state of the last checkpoint of a run.
fn saved(run: &Path) -> BTreeMap<String, Vec<u8>> {
    tensors(&checkpoints(run).pop().expect("a checkpoint"))
}

/// Trains with as many processes, and in one process with as many micro-batches: the files must be equal.
fn same_bits(shop: &Workshop, job: &str, ranks: usize, more: &[&str]) {
    let accumulation = format!("train.accumulation={ranks}");
    let args = |out: &'static str, first: &[&'static str]| -> Vec<String> {
        let args = if job == "finetune" { shop.tuned(out, first) } else { shop.tiny(out, first) };
        args.iter().chain(more).map(|arg| (*arg).to_owned()).collect()
    };
    let run = |args: &[String]| -> Output {
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        if args.contains(&"several") { together(shop, ranks, &args) } else { shop.run(&args) }
    };
    let mut alone = args("alone", &["--overwrite"]);
    alone.extend(["--set".into(), accumulation]);
    succeeded(run(&alone));
    succeeded(run(&args("several", &["--overwrite"])));
    let (one, many) = (saved(&shop.path("alone")), saved(&shop.path("several")));
    assert!(one.keys().eq(many.keys()) && one.len() > 1, "{:?} {:?}", one.keys(), many.keys());
    let logged = |run: &str| metrics(&shop.path(run)).into_iter().next_back().expect("a line");
    let (several, ranks_as_f64) = (logged("several"), ranks as f64);
    let [sent, gradients] = ["sent_bytes", "gradient_bytes"].map(|key| several[key].as_f64().expect("a number"));
    let expected = 2.0 * (ranks_as_f64 - 1.0) / ranks_as_f64 * gradients;
    assert!((expected..=1.02 * expected + 4096.0).contains(&sent), "{sent} bytes sent, {expected} by the formula");
    assert!(several["communication_seconds"].as_f64().is_some_and(|seconds| seconds > 0.0), "{several}");
    assert!(logged("alone")["sent_bytes"].is_null());
    for (name, bytes) in &one {
        assert!(bytes == &many[name], "{name} differs with {ranks} processes and {more:?}");
    }
}

#[test]
fn optimizers_get_the_bits_of_one_process() {
    if skipped() {
        return;
    }
    let shop = Workshop::new(40);
    let cases: [(usize, &[&str]); 7] = [
        (2, &["optimizer.name=adamw"]),
        (3, &["optimizer.name=adamw-8bit", "optimizer.options.min_8bit_size=0", "train.backward=checkpointed"]),
        (4, &["optimizer.name=dct-adamw", "optimizer.options.rank=6"]),
        (2, &["optimizer.name=galore", "optimizer.options.rank=6", "optimizer.options.update_proj_gap=3"]),
        (3, &["optimizer.name=dion", "optimizer.options.rank=6"]),
        (3, &["optimizer.name=trion", "optimizer.options.rank=6", "train.backward=checkpointed"]),
        (4, &["optimizer.name=adamw", "train.backward=checkpointed"]),
    ];
    for (ranks, settings) in cases {
        let more: Vec<&str> = settings.iter().flat_map(|setting| ["--set", setting]).collect();
        same_bits(&shop, "pretrain", ranks, &[&["--steps", "8"][..], &more].concat());
    }
}

const RANK: &str = "model.parameterization.options.rank=6";

#[test]
fn parameterizations_and_adapters_get_the_bits_of_one_process() {
    if skipped() {
        return;
    }
    let shop = Workshop::with_model(40);
    let steps = ["--steps", "6", "--set", "schedule.warmup_steps=2"];
    same_bits(&shop, "pretrain", 2, &[&steps[..], &["--parameterization", "sltrain", "--set", RANK]].concat());
    same_bits(
        &shop,
        "pretrain",
        3,
        &[
            &steps[..],
            &[
                "--parameterization",
                "relora",
                "--set",
                RANK,
                "--set",
                "model.parameterization.options.reset_every=3",
                "--set",
                "optimizer.weight_decay=0",
                "--set",
                "model.parameterization.options.restart_warmup=1",
            ],
        ]
        .concat(),
    );
    let lora = ["--rank", "4", "--dropout", "0.1"];
    same_bits(&shop, "finetune", 2, &[&steps[..], &lora].concat());
    same_bits(&shop, "finetune", 3, &[&steps[..], &["--rank", "4", "--rule", "lora-pro"]].concat());
}

/// Per-layer updates take no accumulation: the loss of the joined batch is the partner.
#[test]
fn per_layer_updates_follow_the_joined_batch() {
    if skipped() {
        return;
    }
    let shop = Workshop::new(40);
    let more = ["--steps", "8", "--set", "train.backward=per-layer", "--set", "optimizer.clip=0"];
    succeeded(shop.run(&shop.tiny("alone", &[&more[..], &["--set", "train.batch=4"]].concat())));
    succeeded(together(&shop, 2, &shop.tiny("several", &more)));
    let loss = |run: &str| summary(&shop.path(run))["train_loss"].as_f64().expect("a loss");
    assert!((loss("alone") - loss("several")).abs() < 1e-5, "{} {}", loss("alone"), loss("several"));
}

#[test]
fn other_data_and_too_few_rows_are_refused() {
    if skipped() {
        return;
    }
    let shop = Workshop::new(40);
    let script =
        "if [ $OMPI_COMM_WORLD_RANK = 1 ]; then data=other; else data=text; fi; exec \"$0\" \"$@\" --data $data";
    std::fs::create_dir(shop.path("other")).unwrap();
    for entry in std::fs::read_dir(shop.path("text")).unwrap() {
        let path = entry.unwrap().path();
        let text = std::fs::read_to_string(&path).unwrap().replace("memory", "memoir");
        std::fs::write(shop.path("other").join(path.file_name().unwrap()), text).unwrap();
    }
    let program = env!("CARGO_BIN_EXE_lowrank");
    let args: Vec<&str> = shop.tiny("run", &["--steps", "4"]);
    let mut command = mpirun(&shop, 2, &[]);
    let mpi_args: Vec<String> = command.get_args().map(|arg| arg.to_string_lossy().into_owned()).collect();
    let launcher = &mpi_args[..mpi_args.len() - 1];
    command = Command::new("mpirun");
    command.args(launcher).args(["bash", "-c", script, program]).args(&args).current_dir(shop.dir.path());
    command.env("OMPI_ALLOW_RUN_AS_ROOT", "1").env("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1");
    refused(&command.output().unwrap(), &["rank 1", "data.path"]);
    assert!(!shop.path("run").exists(), "nothing is left behind");

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
    let more = ["--steps", "300", "--set", "checkpoint.every=20"];
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

#[test]
fn a_build_without_mpi_says_so() {
    let shop = Workshop::new(10);
    if cfg!(feature = "mpi") {
        return;
    }
    for variable in ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"] {
        let output = shop.command(&shop.tiny("run", &["--steps", "2"])).env(variable, "2").output().unwrap();
        refused(&output, &[variable, "2", "--features mpi"]);
    }
    let output = shop.command(&shop.tiny("run", &["--steps", "2"])).env("PMI_SIZE", "1").output().unwrap();
    succeeded(output);
}
