//! Situations of real use, each a folder below `tests/reports` that is named by what it shows.
//!
//! A case lies over the small model in `tests/reports/model`: its files replace that model's, and `case.json` says which commands are run and what
//! they print. What is expected was computed by Python's `transformers`, `tokenizers` and `peft`.

#[path = "program.rs"]
mod program;

use std::path::{Path, PathBuf};

use program::{Workshop, stderr};
use serde::Deserialize;
use serde_json::Value;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Case {
    shows: String,
    runs: Vec<Run>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Run {
    args: Vec<String>,
    code: i32,
    /// The whole standard output.
    #[serde(default)]
    stdout: Option<String>,
    /// Parts of the standard output and of the messages.
    #[serde(default)]
    contains: Vec<String>,
    #[serde(default)]
    stderr: Vec<String>,
    /// Parts that no output has.
    #[serde(default)]
    absent: Vec<String>,
    /// Loss that `eval` prints, and the number of tokens.
    #[serde(default)]
    loss: Option<f64>,
    #[serde(default)]
    tokens: Option<u64>,
    /// Ids that Python had on the way.
    #[serde(default, rename = "note")]
    _note: Value,
}

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/reports")
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).expect("a folder");
    for entry in std::fs::read_dir(from).expect("a folder") {
        let path = entry.expect("an entry").path();
        let target = to.join(path.file_name().expect("a name"));
        match path.is_dir() {
            true => copy(&path, &target),
            false => drop(std::fs::copy(&path, &target).expect("a copy")),
        }
    }
}

/// The number in the row of a table that begins with a word.
fn number(stdout: &str, row: &str) -> f64 {
    let line = stdout.lines().find(|line| line.split_whitespace().next() == Some(row));
    let word = line.and_then(|line| line.split_whitespace().nth(1)).unwrap_or_else(|| panic!("no {row} in {stdout}"));
    word.replace(',', "").parse().expect("a number")
}

/// Differences between a run and its case.
fn problems(shop: &Workshop, run: &Run) -> Vec<String> {
    let args: Vec<&str> = run.args.iter().map(String::as_str).collect();
    let output = shop.run(&args);
    let (stdout, messages) = (String::from_utf8_lossy(&output.stdout).into_owned(), stderr(&output));
    let mut problems = Vec::new();
    let mut check = |holds: bool, what: String| {
        if !holds {
            problems.push(format!("{what}\n  of {args:?}\n  stdout: {stdout}\n  stderr: {messages}"));
        }
    };
    check(output.status.code() == Some(run.code), format!("ends with {} instead of {}", output.status, run.code));
    check(!messages.contains("panicked"), "a panic".into());
    if let Some(expected) = &run.stdout {
        check(stdout == *expected, format!("prints {stdout:?} instead of {expected:?}"));
    }
    for (parts, text) in [(&run.contains, &stdout), (&run.stderr, &messages)] {
        for part in parts {
            check(text.contains(part), format!("{part:?} is not printed"));
        }
    }
    for part in &run.absent {
        check(!stdout.contains(part) && !messages.contains(part), format!("{part:?} is printed"));
    }
    if let (Some(loss), Some(0)) = (run.loss, output.status.code()) {
        let ours = number(&stdout, "loss");
        check((ours - loss).abs() < 1.5e-4, format!("loss {ours} instead of {loss}"));
    }
    if let (Some(tokens), Some(0)) = (run.tokens, output.status.code()) {
        let ours = number(&stdout, "tokens");
        check(ours == tokens as f64, format!("{ours} tokens instead of {tokens}"));
    }
    problems
}

#[test]
fn every_report_comes_out_right() {
    let only = std::env::var("LOWRANK_REPORT").ok();
    let mut names: Vec<PathBuf> =
        std::fs::read_dir(folder()).expect("tests/reports").map(|entry| entry.expect("an entry").path()).collect();
    names.sort();
    let mut failed = Vec::new();
    let mut count = 0;
    for dir in names.into_iter().filter(|dir| dir.join("case.json").exists()) {
        let name = dir.file_name().expect("a name").to_string_lossy().into_owned();
        if only.as_ref().is_some_and(|only| !name.contains(only.as_str())) {
            continue;
        }
        count += 1;
        let text = std::fs::read_to_string(dir.join("case.json")).expect("case.json");
        let case: Case = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{name}: {error}"));
        let shop = Workshop { dir: tempfile::tempdir().expect("a temporary folder") };
        copy(&folder().join("model"), &shop.path("model"));
        for entry in std::fs::read_dir(&dir).expect("a folder").map(|entry| entry.expect("an entry").path()) {
            // Other model folders are variants of the same model.
            if entry.is_dir() && entry.join("config.json").exists() && !entry.ends_with("model") {
                copy(&folder().join("model"), &shop.path(&entry.file_name().expect("a name").to_string_lossy()));
            }
        }
        copy(&dir, shop.dir.path());
        for run in &case.runs {
            failed
                .extend(problems(&shop, run).into_iter().map(|problem| format!("{name} ({}): {problem}", case.shows)));
        }
    }
    assert!(failed.is_empty(), "{} of the cases' commands fail:\n{}", failed.len(), failed.join("\n\n"));
    assert!(count > 0, "no case");
}
