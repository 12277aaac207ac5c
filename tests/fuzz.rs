//! Damaged files: no reader panics, hangs, or takes memory that only a header claims.
//!
//! Every reader gets folders that it reads without an error, with one file changed by a seeded generator. `LOWRANK_FUZZ_SECONDS` sets how long all
//! readers together are tried; without it each gets a fixed number of damaged folders. The folder of a failure stays for inspection.

#[path = "fuzz/memory.rs"]
mod memory;
#[path = "fuzz/mutation.rs"]
mod mutation;
#[path = "fuzz/targets.rs"]
mod targets;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use targets::{Files, Target, targets};

#[global_allocator]
static ALLOCATOR: memory::Counting = memory::Counting;

const SEED: u64 = 20_260_101;
/// Damaged folders of each reader where no time is given.
const ROUNDS: u64 = 60;
/// Memory of one reader, the files themselves some kilobytes.
const MOST_BYTES: usize = 192 << 20;
/// A reader that is still busy after this time hangs.
const HANGS: Duration = Duration::from_secs(60);

#[test]
fn damaged_files_are_read_or_refused() {
    let seconds = std::env::var("LOWRANK_FUZZ_SECONDS").ok();
    let seconds = seconds.map(|text| text.parse::<f64>().expect("LOWRANK_FUZZ_SECONDS is a number"));
    let targets = targets();
    let each = seconds.map(|seconds| Duration::from_secs_f64(seconds / targets.len() as f64));
    let mut failures = Vec::new();
    for target in &targets {
        failures.extend(run(target, each));
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

/// Tries one reader; returns its first failure.
fn run(target: &Target, time: Option<Duration>) -> Option<String> {
    let folder = tempfile::tempdir().expect("a folder");
    for files in &target.seeds {
        write(folder.path(), files);
        if let Err(error) = (target.read)(folder.path()) {
            return Some(format!("{}: undamaged files are refused: {error}", target.name));
        }
    }
    let start = Instant::now();
    let (mut round, mut refused) = (0, 0);
    while time.map_or(round < ROUNDS, |time| start.elapsed() < time) {
        let mut random = StdRng::seed_from_u64(SEED ^ round);
        let files = damaged(&target.seeds[round as usize % target.seeds.len()], &mut random);
        write(folder.path(), &files);
        match watched(target, folder.path()) {
            Ok(Ok(())) => {}
            Ok(Err(_)) => refused += 1,
            Err(failure) => {
                let kept = folder.keep();
                return Some(format!("{}, round {round}: {failure}; the files lie in {}", target.name, kept.display()));
            }
        }
        round += 1;
    }
    println!("{}: {round} damaged folders, {refused} refused", target.name);
    // A reader that takes everything has not been tried.
    (refused == 0 && target.name != "metrics")
        .then(|| format!("{}: nothing was refused in {round} rounds", target.name))
}

/// Reads a folder; an error of its own is fine, a panic, a hang and a waste of memory are not.
fn watched(target: &Target, folder: &Path) -> Result<Result<(), String>, String> {
    let (done, waits) = channel::<()>();
    let shown = folder.display().to_string();
    let watch = std::thread::spawn(move || {
        if waits.recv_timeout(HANGS) == Err(RecvTimeoutError::Timeout) {
            eprintln!("the reader hangs; the files lie in {shown}");
            std::process::abort();
        }
    });
    let read = || catch_unwind(AssertUnwindSafe(|| (target.read)(folder).map_err(|error| error.to_string())));
    let (result, bytes) = memory::peak(read);
    let _ = done.send(());
    watch.join().expect("the watch");
    let result = result.map_err(|_| "panic".to_string())?;
    match bytes > MOST_BYTES {
        true => Err(format!("took {} MB of memory", bytes >> 20)),
        false => Ok(result),
    }
}

/// The files with one of them damaged.
fn damaged(files: &Files, random: &mut StdRng) -> Files {
    let mut files = files.clone();
    let chosen = random.random_range(0..files.len());
    if let Some(bytes) = files.values_mut().nth(chosen) {
        *bytes = mutation::damaged(bytes, random);
    }
    files
}

/// Replaces the contents of a folder.
fn write(folder: &Path, files: &Files) {
    for entry in std::fs::read_dir(folder).expect("a folder") {
        std::fs::remove_file(entry.expect("an entry").path()).expect("a file");
    }
    for (name, bytes) in files {
        std::fs::write(folder.join(name), bytes).expect("a file");
    }
}
