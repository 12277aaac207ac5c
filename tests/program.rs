//! Runs the program `lowrank` as a person would.
#![allow(dead_code)] // each test file uses its part

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use safetensors::SafeTensors;

/// A folder with a small text corpus, in which the program works.
pub struct Workshop {
    pub dir: tempfile::TempDir,
}

/// Words that make a text with something to learn in it.
const WORDS: [&str; 16] = [
    "the", "model", "learns", "a", "small", "rank", "from", "rows", "of", "weights", "and", "keeps", "every", "moment",
    "in", "memory",
];

impl Workshop {
    /// A corpus of `documents` files of a few hundred bytes each.
    pub fn new(documents: usize) -> Self {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let text = dir.path().join("text");
        std::fs::create_dir(&text).expect("a folder");
        let mut state = 12345u64;
        for number in 0..documents {
            let mut words = Vec::new();
            for _ in 0..60 {
                state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                words.push(WORDS[(state >> 60) as usize]);
            }
            std::fs::write(text.join(format!("{number:04}.txt")), words.join(" ")).expect("a file");
        }
        Self { dir }
    }

    /// The same with a tiny model in `model` and examples to fine-tune it on in `examples.jsonl`.
    pub fn with_model(examples: usize) -> Self {
        let shop = Self::new(10);
        let more = ["--steps", "200", "--lr", "0.01", "--set", "schedule.warmup_steps=10"];
        succeeded(shop.run(&shop.tiny("pretrained", &more)));
        let model = checkpoints(&shop.path("pretrained")).pop().expect("a checkpoint");
        std::fs::rename(model, shop.path("model")).expect("a model folder");
        for name in ["optimizer.safetensors", "optimizer.bpk", "trainer.json", "manifest.json"] {
            std::fs::remove_file(shop.path("model").join(name)).expect("what is no part of a model");
        }
        let line = |number: usize| {
            let (a, b) = (WORDS[number % 16], WORDS[number * 7 / 16 % 16]);
            format!("{{\"prompt\": \"{a} {b} {number}: \", \"completion\": \"{b} {a}\"}}")
        };
        let lines: Vec<String> = (0..examples).map(line).collect();
        std::fs::write(shop.path("examples.jsonl"), lines.join("\n")).expect("a file");
        shop
    }

    /// Arguments of a fine-tuning of that model that takes seconds.
    pub fn tuned<'a>(&self, out: &'a str, more: &[&'a str]) -> Vec<&'a str> {
        let mut args = vec!["finetune", "--quiet", "--out", out, "--model", "model", "--data", "examples.jsonl"];
        for setting in ["train.batch=2", "train.seq_len=48", "optimizer.lr=0.01", "eval.every=0", "log.sample_tokens=8"]
        {
            args.extend(["--set", setting]);
        }
        args.extend(more);
        args
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// `lowrank` with arguments, in this folder.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_lowrank"));
        command.current_dir(self.dir.path()).args(args).stdin(Stdio::null());
        command
    }

    pub fn run(&self, args: &[&str]) -> Output {
        self.command(args).output().expect("the program starts")
    }

    /// Arguments of a run that takes seconds: a tiny model on this corpus.
    pub fn tiny<'a>(&self, out: &'a str, more: &[&'a str]) -> Vec<&'a str> {
        let mut args = vec!["pretrain", "--quiet", "--out", out];
        for setting in [
            "data.path=text",
            "tokenizer.path=bytes",
            "model.hidden_size=32",
            "model.intermediate_size=48",
            "model.num_hidden_layers=2",
            "model.num_attention_heads=2",
            "model.max_position_embeddings=128",
            "data.cache=cache",
            "train.batch=2",
            "train.seq_len=32",
            "eval.every=0",
            "log.sample_tokens=8",
        ] {
            args.extend(["--set", setting]);
        }
        args.extend(more);
        args
    }
}

/// Text that the program printed for people.
pub fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Succeeds or shows what the program said.
pub fn succeeded(output: Output) -> Output {
    assert!(
        output.status.success(),
        "{}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        stderr(&output)
    );
    output
}

/// Bad input: exit code 2, no panic, and a message with all of these.
pub fn refused(output: &Output, parts: &[&str]) {
    let text = stderr(output);
    assert_eq!(output.status.code(), Some(2), "{text}");
    assert!(!text.contains("panicked"), "{text}");
    for part in parts {
        assert!(text.contains(part), "\"{part}\" is not in:\n{text}");
    }
}

/// The lines of `metrics.jsonl`.
pub fn metrics(run: &Path) -> Vec<serde_json::Value> {
    let text = std::fs::read_to_string(run.join("metrics.jsonl")).expect("metrics.jsonl");
    text.lines().map(|line| serde_json::from_str(line).expect("a JSON object a line")).collect()
}

/// `summary.json`.
pub fn summary(run: &Path) -> serde_json::Value {
    let text = std::fs::read_to_string(run.join("summary.json")).expect("summary.json");
    serde_json::from_str(&text).expect("JSON")
}

/// Checkpoint folders, oldest first.
pub fn checkpoints(run: &Path) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(run.join("checkpoints")) else {
        return Vec::new();
    };
    let mut found: Vec<PathBuf> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("step-")))
        .collect();
    found.sort();
    found
}

/// Every tensor of the weights, or of the adapter, and of the states, by name. The order within a file of states does not matter.
pub fn tensors(checkpoint: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut found = BTreeMap::new();
    for name in ["model.safetensors", "adapter_model.safetensors"] {
        if checkpoint.join(name).exists() {
            found.insert(name.to_string(), std::fs::read(checkpoint.join(name)).expect("weights"));
        }
    }
    assert_eq!(found.len(), 1, "a checkpoint holds a model or an adapter");
    for entry in std::fs::read_dir(checkpoint).expect("a checkpoint") {
        let path = entry.expect("a file").path();
        let state = path.file_stem().expect("a name").to_string_lossy().into_owned();
        if path.extension().is_none_or(|extension| extension != "bpk") {
            continue;
        }
        let bytes = std::fs::read(path.with_extension("safetensors")).expect("a state");
        let tensors = SafeTensors::deserialize(&bytes).expect("safetensors");
        let named = tensors.tensors().into_iter();
        found.extend(named.map(|(name, view)| (format!("{state}: {name}"), view.data().to_vec())));
        let counters = burn_pack::Reader::from_file(&path).expect("counters");
        let counters = counters.scalars().iter();
        found.extend(counters.map(|(name, value)| (format!("{state}: {name}"), format!("{value:?}").into_bytes())));
    }
    found
}
