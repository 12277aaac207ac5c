//! Several processes under `mpirun`: the bits of one process. Without the feature `mpi` only the refusal of
//! such a start is tested, and the rest says that it was skipped.

#[path = "distributed/endings.rs"]
mod endings;
#[path = "distributed/launch.rs"]
mod launch;
#[path = "pictures.rs"]
mod pictures;
#[path = "program.rs"]
mod program;
#[path = "distributed/shards.rs"]
mod shards;

use launch::{SHARD, same_bits, same_runs, skipped, together};
use pictures::{draw, tiny};
use program::{Workshop, metrics, refused, succeeded, summary};

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

/// Every allocation, with the state of what it leaves undivided and divided.
#[test]
fn allocations_get_the_bits_of_one_process() {
    if skipped() {
        return;
    }
    let shop = Workshop::with_model(60);
    let cases: [(&str, &[&str]); 6] = [
        ("sora", &[]),
        ("adalora", &["target_rank=2", "t_init=2", "t_final=2", "delta_t=1"]),
        ("dylora", &[]),
        ("bayesian", &[]),
        ("snella", &[]),
        ("diffora", &["search_steps=4"]),
    ];
    for (number, (name, options)) in cases.into_iter().enumerate() {
        let options: Vec<String> = options.iter().map(|option| format!("allocation.options.{option}")).collect();
        let shard = format!("train.shard_state={}", number % 2 == 0);
        let set = options.iter().chain([&shard]).flat_map(|option| ["--set", option]);
        let more: Vec<&str> = ["--allocation", name, "--steps", "8"].into_iter().chain(set).collect();
        same_bits(&shop, "finetune", 2 + number % 2, &more);
        let [one, several] = ["alone", "several"].map(|run| std::fs::read(shop.path(run).join("rank.json")).unwrap());
        assert!(one == several, "{name}");
    }
    let growing = shop.tuned("growing", &["--allocation", "increlora", "--steps", "8"]);
    refused(&together(&shop, 2, &growing), &["allocation.name = increlora", "several processes", "start one"]);
    assert!(!shop.path("growing").exists());
}

#[test]
fn vision_transformers_get_the_bits_of_one_process() {
    if skipped() {
        return;
    }
    let shop = Workshop::new(0);
    draw(&shop, "images", &["red", "green", "blue"], 12);
    for (ranks, shard) in [(2, "train.shard_state=false"), (3, SHARD)] {
        let more = ["--steps", "6", "--set", "data.images.crop=0.8", "--set", shard];
        let args = |out| tiny("pretrain", "vit-micro", out, "images", &more);
        same_runs(&shop, ranks, &args("alone"), &args("several"));
    }
}

/// Held-out batches that the processes cannot share equally.
#[test]
fn evaluations_are_shared_and_get_the_loss_of_one_process() {
    if skipped() {
        return;
    }
    let shop = Workshop::new(60);
    let settings = ["eval.every=2", "eval.batches=4", "data.validation_fraction=0.3", "checkpoint.every=2"];
    let set = settings.iter().flat_map(|setting| ["--set", setting]);
    let more: Vec<&str> = ["--steps", "6"].into_iter().chain(set).collect();
    same_bits(&shop, "pretrain", 3, &more);
    let losses = |run: &str| -> Vec<_> {
        let lines = metrics(&shop.path(run)).into_iter();
        lines.map(|line| [line["validation_loss"].clone(), line["final_validation_loss"].clone()]).collect()
    };
    let alone = losses("alone");
    assert!(alone.iter().filter(|[loss, _]| loss.is_number()).count() == 3, "{alone:?}");
    assert_eq!(alone, losses("several"));
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
