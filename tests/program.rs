//! Runs the program `lowrank` as a person would.
#![allow(dead_code)] // each test file uses its part

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

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

/// What the program printed for people.
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

/// Every tensor of the weights and of the optimizer's state, by name. The order within a file of states does not matter.
pub fn tensors(checkpoint: &Path) -> BTreeMap<String, Vec<u8>> {
    let weights = std::fs::read(checkpoint.join("model.safetensors")).expect("the weights of a checkpoint");
    let reader = burn_pack::Reader::from_file(checkpoint.join("optimizer.bpk")).expect("the optimizer's state");
    let states = reader.into_tensors().expect("tensors").into_iter().map(|tensor| {
        let (name, _, _, _, bytes) = tensor.into_parts().expect("a tensor");
        (name, bytes.to_vec())
    });
    states.chain([("weights".to_string(), weights)]).collect()
}
