//! The command line: what it says and how it ends when something is wrong.

#[path = "program.rs"]
mod program;

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Output, Stdio};

use burn::tensor::Device;
use lowrank_models::adapter::{AdapterConfig, Attach};
use lowrank_models::hub::ModelFolder;
use lowrank_models::hub::peft::{Form, save};
use program::{Workshop, checkpoints, refused, stderr, succeeded, summary};

#[test]
fn without_the_default_text_the_message_says_what_to_do() {
    let shop = Workshop::new(1);
    let output = shop.command(&["pretrain", "--steps", "2"]).env("CARGO_HOME", shop.path("no-cargo")).output();
    refused(&output.expect("the program starts"), &["no-cargo", "--data PATH"]);
}

#[test]
fn bad_data_is_refused_by_file_and_line() {
    let shop = Workshop::new(1);
    let data = |name: &str, bytes: &[u8], parts: &[&str]| {
        std::fs::write(shop.path(name), bytes).unwrap();
        let setting = format!("data.path={name}");
        let output = shop.run(&shop.tiny("run", &["--steps", "3", "--set", &setting]));
        refused(&output, parts);
        assert!(!shop.path("run").exists());
    };
    data("broken.jsonl", b"{\"text\": \"fine\"}\n{\"text\": \"cut", &["broken.jsonl line 2"]);
    data("fields.jsonl", b"{\"body\": \"fine\"}\n", &["fields.jsonl line 1", "data.field"]);
    data("empty.txt", b"", &["empty.txt", "--data"]);
    data("latin.txt", b"caf\xe9", &["latin.txt", "UTF-8"]);
    data("one.txt", b"a single document", &["one sample needs"]);
    let unreadable = shop.path("text/0000.txt");
    std::fs::remove_file(&unreadable).unwrap();
    refused(&shop.run(&shop.tiny("run", &["--steps", "3"])), &["text", "--data"]);
}

#[test]
fn damaged_token_files_are_refused() {
    let shop = Workshop::new(30);
    succeeded(shop.run(&["tokenize", "--quiet", "--data", "text", "--tokenizer", "bytes", "--out", "tokens"]));
    refused(
        &shop.run(&["tokenize", "--data", "text", "--tokenizer", "bytes", "--out", "tokens"]),
        &["tokens", "exists"],
    );
    let run = |out: &str| shop.run(&shop.tiny(out, &["--steps", "2", "--set", "data.path=tokens"]));
    succeeded(run("good"));
    let file = shop.path("tokens/train/tokens-00000.bin");
    let bytes = std::fs::read(&file).unwrap();
    std::fs::write(&file, &bytes[..bytes.len() - 2]).unwrap();
    refused(&run("cut"), &["tokens-00000.bin", "truncated"]);
    let mut flipped = bytes.clone();
    flipped[11] ^= 0x40;
    std::fs::write(&file, flipped).unwrap();
    refused(&run("flipped"), &["tokens-00000.bin"]);
}

#[test]
fn a_damaged_checkpoint_stops_the_run_and_stays() {
    let shop = Workshop::new(20);
    let more = ["--set", "checkpoint.every=5", "--set", "checkpoint.keep_last=3", "--steps", "15"];
    succeeded(shop.run(&shop.tiny("run", &more)));
    let saved = checkpoints(&shop.path("run"));
    let flip = |path: &Path| {
        let mut bytes = std::fs::read(path).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        std::fs::write(path, bytes).unwrap();
    };
    flip(&saved[2].join("model.safetensors"));
    refused(&shop.run(&["inspect", saved[2].to_str().unwrap()]), &["model.safetensors", "SHA-256"]);
    let resume = ["pretrain", "--quiet", "--resume", "--out", "run"];
    refused(&shop.run(&resume), &["step-000015", "SHA-256", "--resume-from step-000010"]);
    assert_eq!(checkpoints(&shop.path("run")).len(), 3);
    succeeded(shop.run(&[&resume[..], &["--resume-from", "step-000010"]].concat()));
    assert_eq!(summary(&shop.path("run"))["steps"], 15);
    for path in checkpoints(&shop.path("run")) {
        std::fs::write(path.join("optimizer.bpk"), b"short").unwrap();
    }
    refused(&shop.run(&resume), &["optimizer.bpk", "no earlier one"]);
}

#[test]
fn a_model_folder_must_be_whole() {
    let shop = Workshop::new(20);
    succeeded(shop.run(&shop.tiny("run", &["--steps", "2"])));
    let model = checkpoints(&shop.path("run")).pop().unwrap();
    let generate =
        |dir: &Path| shop.run(&["generate", "--model", dir.to_str().unwrap(), "--tokens", "4", "--prompt", "the"]);
    succeeded(generate(&model));
    let weights = model.join("model.safetensors");
    let bytes = std::fs::read(&weights).unwrap();
    std::fs::write(&weights, &bytes[..bytes.len() / 2]).unwrap();
    refused(&generate(&model), &["model.safetensors", "truncated"]);
    std::fs::write(&weights, b"no such thing").unwrap();
    refused(&generate(&model), &["model.safetensors"]);
    std::fs::write(&weights, &bytes).unwrap();
    let config = std::fs::read_to_string(model.join("config.json")).unwrap();
    std::fs::write(model.join("config.json"), config.replace("\"hidden_size\": 32", "\"hidden_size\": 64")).unwrap();
    refused(&generate(&model), &["model.embed_tokens.weight", "shape"]);
    std::fs::write(model.join("config.json"), config.replace("\"num_hidden_layers\": 2", "\"num_hidden_layers\": 1"))
        .unwrap();
    refused(&generate(&model), &["model.layers.1", "no place"]);
    std::fs::write(model.join("config.json"), config.replace("\"num_hidden_layers\": 2", "\"num_hidden_layers\": 3"))
        .unwrap();
    refused(&generate(&model), &["model.layers.2", "missing"]);
    refused(&generate(&shop.path("nowhere")), &["nowhere"]);
    refused(&shop.run(&["generate", "--model", model.to_str().unwrap(), "--temperature", "-1"]), &["temperature"]);
}

#[test]
fn a_folder_in_use_or_with_a_run_is_not_taken() {
    let shop = Workshop::new(20);
    let mut busy = shop.command(&shop.tiny("run", &["--steps", "1000000"])).stderr(Stdio::null()).spawn().unwrap();
    while !shop.path("run/metrics.jsonl").exists() {
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    let process = busy.id().to_string();
    refused(&shop.run(&shop.tiny("run", &["--steps", "3"])), &["in use", &process]);
    refused(&shop.run(&["pretrain", "--resume", "--out", "run"]), &["in use", &process]);
    busy.kill().unwrap();
    busy.wait().unwrap();
    refused(&shop.run(&shop.tiny("run", &["--steps", "3"])), &["already holds a run", "--resume"]);
    refused(&shop.run(&["pretrain", "--resume", "--out", "other"]), &["other", "no run to resume"]);
    assert!(!shop.path("other").exists());
}

/// A file system that is full: the save fails with exit code 1, and the earlier checkpoint stays good.
#[test]
fn a_full_disk_leaves_the_earlier_checkpoint() {
    let shop = Workshop::new(20);
    succeeded(
        shop.run(
            &shop.tiny("run", &["--steps", "10", "--set", "checkpoint.every=5", "--set", "schedule.kind=constant"]),
        ),
    );
    let before = checkpoints(&shop.path("run"));
    // A limit on the size of files stops the weights halfway, as a full disk does.
    let script = "trap '' XFSZ; ulimit -f 16; exec \"$0\" pretrain --quiet --resume --out run --steps 20";
    let output = std::process::Command::new("sh")
        .args(["-c", script, env!("CARGO_BIN_EXE_lowrank")])
        .current_dir(shop.dir.path())
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    assert!(stderr(&output).contains("checkpoints"), "{}", stderr(&output));
    assert_eq!(checkpoints(&shop.path("run")), before);
    succeeded(shop.run(&["inspect", before.last().unwrap().to_str().unwrap()]));
    succeeded(shop.run(&["pretrain", "--quiet", "--resume", "--out", "run", "--steps", "20"]));
}

#[test]
fn logging_that_fails_warns_once_and_does_not_stop() {
    let shop = Workshop::new(20);
    std::fs::create_dir_all(shop.path("run")).unwrap();
    std::fs::write(shop.path("run/tensorboard"), "a file where the folder should be").unwrap();
    std::fs::create_dir(shop.path("run/metrics.jsonl")).unwrap();
    let output = succeeded(shop.run(&shop.tiny("run", &["--steps", "5", "--set", "schedule.warmup_steps=1"])));
    let text = stderr(&output);
    assert_eq!(text.matches("warning").count(), 2, "{text}");
    assert_eq!(summary(&shop.path("run"))["steps"], 5);
}

/// A learning rate that makes the loss infinite stops the run before the update, or is passed over as often as allowed.
#[test]
fn a_loss_that_explodes_stops_the_run() {
    let shop = Workshop::new(20);
    let more = [
        "--steps",
        "60",
        "--lr",
        "1000000",
        "--set",
        "schedule.kind=constant",
        "--set",
        "schedule.warmup_steps=0",
        "--set",
        "optimizer.clip=0",
    ];
    let output = shop.run(&shop.tiny("run", &more));
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    assert!(stderr(&output).contains("step ") && stderr(&output).contains("optimizer.lr"), "{}", stderr(&output));
    let skipping = [&more[..], &["--set", "train.max_skipped_steps=2"]].concat();
    let output = shop.run(&shop.tiny("skip", &skipping));
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    assert_eq!(stderr(&output).matches("the update was left out").count(), 2, "{}", stderr(&output));
}

#[test]
fn the_summary_has_every_figure() {
    let shop = Workshop::new(30);
    let output = succeeded(shop.run(&shop.tiny("run", &["--steps", "12", "--set", "eval.every=4"])));
    assert!(output.stdout.is_empty(), "--quiet prints nothing");
    let summary = summary(&shop.path("run"));
    for key in [
        "steps",
        "tokens",
        "seconds",
        "train_loss",
        "validation_loss",
        "best_validation_loss",
        "final_validation_loss",
        "validation_bits_per_byte",
        "gzip_bits_per_byte",
        "tokens_per_second",
        "peak_rss_bytes",
        "weight_bytes",
        "gradient_bytes",
        "optimizer_state_bytes",
    ] {
        assert!(summary[key].as_f64().is_some_and(|value| value > 0.0), "{key} is {}", summary[key]);
    }
    let bytes = |key: &str| summary[key].as_u64().unwrap();
    assert_eq!(bytes("weight_bytes"), bytes("gradient_bytes"));
    assert_eq!(bytes("optimizer_state_bytes"), 2 * bytes("weight_bytes"));
    let model = checkpoints(&shop.path("run")).pop().unwrap();
    let output = succeeded(shop.run(&[
        "eval",
        "--quiet",
        "--model",
        model.to_str().unwrap(),
        "--data",
        "text",
        "--seq-len",
        "32",
        "--batch",
        "2",
        "--set",
        "data.validation_fraction=0.05",
    ]));
    let loss = format!("{:.4} nats", summary["final_validation_loss"].as_f64().unwrap());
    let told = String::from_utf8(output.stdout).unwrap();
    assert!(told.contains(&loss), "{loss} is not in {told}");
}

#[test]
fn generated_text_depends_on_the_seed_alone() {
    let shop = Workshop::new(20);
    succeeded(shop.run(&shop.tiny("run", &["--steps", "3"])));
    let model = checkpoints(&shop.path("run")).pop().unwrap();
    let text = |seed: &str| {
        let args =
            ["generate", "--model", model.to_str().unwrap(), "--prompt", "the model", "--tokens", "40", "--seed", seed];
        succeeded(shop.run(&args)).stdout
    };
    assert_eq!(text("1"), text("1"));
    assert_ne!(text("1"), text("2"));
    assert!(text("1").starts_with(b"the model"));
}

#[test]
fn output_that_nobody_reads_is_no_failure() {
    let shop = Workshop::new(1);
    let mut child = shop.command(&["methods"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert!(!stderr(&output).contains("panicked"), "{}", stderr(&output));
    assert!(String::from_utf8(succeeded(shop.run(&["methods"])).stdout).unwrap().contains("adamw"));
    assert!(String::from_utf8(succeeded(shop.run(&["methods", "adamw"])).stdout).unwrap().contains("weight_decay"));
    let mode = std::fs::metadata(env!("CARGO_BIN_EXE_lowrank")).unwrap().permissions().mode();
    assert!(mode & 0o111 != 0);
}

/// Allowed, and said with the numbers.
#[test]
fn suspicious_settings_produce_warnings() {
    let shop = Workshop::new(20);
    let told = |out: &str, settings: &[&str], parts: &[&str]| {
        let mut more = vec!["--steps", "3", "--set", "schedule.warmup_steps=1"];
        more.extend(settings.iter().flat_map(|setting| ["--set", setting]));
        let text = stderr(&succeeded(shop.run(&shop.tiny(out, &more))));
        assert!(parts.iter().all(|part| text.contains(part)), "{text}");
        assert_eq!(text.contains("warning"), !parts.is_empty(), "{text}");
    };
    let density = [
        "model.parameterization.name=sltrain",
        "model.parameterization.options.rank=4",
        "model.parameterization.options.density=0.5",
    ];
    told("dense", &density, &["1024 values of a 32 x 32", "trains 768 and keeps 512 positions"]);
    told(
        "wide",
        &["model.parameterization.name=cola", "model.parameterization.options.rank=16"],
        &["cola saves nothing", "trains 1024"],
    );
    told("sparse", &["model.parameterization.name=sltrain", "model.parameterization.options.rank=4"], &[]);
    let relora = [
        "model.parameterization.name=relora",
        "model.parameterization.options.rank=4",
        "model.parameterization.options.reset_every=2",
        "model.parameterization.options.restart_warmup=1",
    ];
    told("cut", &relora, &["3 steps", "reset_every = 2", "last cycle has 1"]);
    let shifted = [&relora[..], &["schedule.adjust_steps=1"]].concat();
    told("shifted", &shifted, &["adjust_steps = 1", "not 0 where the factors restart"]);
}

#[test]
fn positions_that_are_repeated_or_out_of_range_are_refused() {
    let shop = Workshop::new(20);
    let settings = ["--steps", "2", "--parameterization", "sltrain", "--set", "model.parameterization.options.rank=4"];
    succeeded(shop.run(&shop.tiny("run", &settings)));
    let model = checkpoints(&shop.path("run")).pop().unwrap();
    let path = model.join("model.safetensors");
    let bytes = std::fs::read(&path).unwrap();
    let name = "model.layers.0.mlp.up_proj.sparse_index";
    let begin = safetensors::SafeTensors::deserialize(&bytes).unwrap().tensor(name).unwrap().data().as_ptr() as usize
        - bytes.as_ptr() as usize;
    let position = |place: usize| i32::from_le_bytes(bytes[begin + 4 * place..][..4].try_into().unwrap());
    let second = position(1);
    let with = |place: usize, value: i32, parts: &[&str]| {
        let mut changed = bytes.clone();
        changed[begin + 4 * place..][..4].copy_from_slice(&value.to_le_bytes());
        std::fs::write(&path, changed).unwrap();
        refused(&shop.run(&["generate", "--model", model.to_str().unwrap(), "--tokens", "2"]), parts);
    };
    with(0, second, &[name, &format!("{second} after {second}"), "ascend"]);
    with(0, -1, &[name, "position -1", "1536"]);
    let last = (32.0 * 48.0 * 0.03) as usize - 1;
    with(last, 1536, &[name, "position 1536", "there are 1536"]);
}

/// A LoRA of small values on a checkpoint, written into a folder.
fn adapter(model: &Path, dir: &Path, seed: u64) {
    let base = ModelFolder::open(model).unwrap().load(&Device::default()).unwrap();
    let config = AdapterConfig { seed, init: "random".into(), ..AdapterConfig::new("lora").with_rank(4) };
    let (model, _) = base.attach(Attach::new(config)).unwrap();
    save(&model, "default", Form::Peft, Some("the checkpoint"), dir).unwrap();
}

#[test]
fn adapters_are_merged_shown_and_used() {
    let shop = Workshop::new(30);
    succeeded(shop.run(&shop.tiny("run", &["--steps", "4"])));
    let model = checkpoints(&shop.path("run")).pop().unwrap();
    let model = model.to_str().unwrap();
    for (name, seed) in [("one", 1), ("two", 2)] {
        adapter(Path::new(model), &shop.path(name), seed);
    }
    let both = ["--adapter", "one", "--adapter", "two"];
    let told = succeeded(shop.run(&[&["merge", "--model", model, "--out", "merged"][..], &both].concat()));
    assert_eq!(String::from_utf8_lossy(&told.stdout).trim(), "merged");
    assert!(shop.path("merged/tokenizer.json").exists());
    let stdout = |output: Output| String::from_utf8_lossy(&succeeded(output).stdout).into_owned();
    let text = |model: &str, adapters: &[&str]| {
        let args = ["generate", "--model", model, "--greedy", "--tokens", "24", "--prompt", "the model"];
        stdout(shop.run(&[&args[..], adapters].concat()))
    };
    assert_eq!(text("merged", &[]), text(model, &both));
    assert_ne!(text(model, &[]), text(model, &both));
    let loss = |model: &str, adapters: &[&str]| {
        let args =
            ["eval", "--quiet", "--model", model, "--data", "text", "--seq-len", "32", "--set", "data.cache=cache"];
        stdout(shop.run(&[&args[..], adapters].concat()))
    };
    assert_eq!(loss("merged", &[]), loss(model, &both));
    assert_ne!(loss(model, &[]), loss(model, &["--adapter", "one"]));
    let shown = stdout(shop.run(&["inspect", "one"]));
    for part in ["LoRA", "2106.09685", "the checkpoint", "all-linear", "lora_A.weight", "[4, 32]"] {
        assert!(shown.contains(part), "{part} is not in:\n{shown}");
    }

    // Nothing is left of a merge that was refused.
    let merge = |adapter: &str, parts: &[&str]| {
        refused(&shop.run(&["merge", "--model", model, "--adapter", adapter, "--out", "out"]), parts);
        assert!(!shop.path("out").exists());
    };
    let entries = || std::fs::read_dir(shop.dir.path()).unwrap().count();
    let before = entries();
    refused(&shop.run(&["merge", "--model", model, "--out", "out"]), &["--adapter"]);
    refused(&shop.run(&["merge", "--model", model, "--adapter", "one", "--out", "merged"]), &["merged", "exists"]);
    refused(
        &shop.run(&["merge", "--model", model, "--adapter", "one", "--adapter", "one", "--out", "out"]),
        &["one", "twice"],
    );
    refused(&shop.run(&["merge", "--model", "merged", "--adapter", "one", "--out", "out"]), &["other base weights"]);
    merge("nowhere", &["nowhere", "adapter_config.json"]);
    merge(model, &["adapter_config.json"]);
    let config = std::fs::read_to_string(shop.path("one/adapter_config.json")).unwrap();
    let with = |from: &str, to: &str| {
        assert!(config.contains(from), "{config}");
        std::fs::write(shop.path("one/adapter_config.json"), config.replace(from, to)).unwrap();
    };
    with("\"LORA\"", "\"POLY\"");
    merge("one", &["adapter_config.json", "POLY"]);
    with("\"r\": 4", "\"r\": 5");
    merge("one", &["lora_A.weight", "[4, 32]", "[5, 32]"]);
    with("\"r\": 4", "\"r\": 1000000000");
    merge("one", &["lora_A.weight", "[1000000000, 32]"]);
    with("\"lora_bias\": false", "\"lora_bias\": true");
    merge("one", &["lora_bias"]);
    with("\"r\": 4", "\"r\": 4, \"future\": 1");
    let told = succeeded(shop.run(&["merge", "--model", model, "--adapter", "one", "--out", "again"]));
    assert!(stderr(&told).contains("warning: one: key future"), "{}", stderr(&told));
    with("{", "");
    merge("one", &["adapter_config.json", "JSON"]);
    assert_eq!(entries(), before + 1);
}
