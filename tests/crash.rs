//! A save that is broken off at each of its system calls: the program is killed there, or the call fails.
#![cfg(target_os = "linux")]

#[path = "program.rs"]
mod program;

use std::collections::BTreeMap;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use program::{Workshop, checkpoints, stderr, succeeded, tensors};

/// The library that breaks calls, compiled into a folder.
fn breaker(dir: &Path) -> PathBuf {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/break_calls.c");
    let library = dir.join("break_calls.so");
    let mut compiler = Command::new("cc");
    compiler.args(["-shared", "-fPIC", "-O1", "-o"]).arg(&library).arg(source).arg("-ldl");
    assert!(compiler.status().expect("a C compiler is there").success());
    library
}

fn copied(from: &Path, to: &Path) {
    let copied = Command::new("cp").arg("-a").arg(from).arg(to).status().expect("cp runs");
    assert!(copied.success());
}

/// Tensors of the newest checkpoint.
fn last(run: &Path) -> BTreeMap<String, Vec<u8>> {
    tensors(&checkpoints(run).pop().expect("a checkpoint"))
}

/// A run to continue, and the library.
struct Broken {
    shop: Workshop,
    library: PathBuf,
}

impl Broken {
    /// Continues the run in a folder up to a step.
    fn resume(&self, out: &str, steps: &str) -> Command {
        // Whole paths are compared.
        let out = self.shop.path(out);
        self.shop.command(&["pretrain", "--quiet", "--resume", "--out", out.to_str().expect("text"), "--steps", steps])
    }

    /// The same with calls that are counted or broken.
    fn watched(&self, out: &str, settings: &[(&str, &str)]) -> Output {
        let mut command = self.resume(out, "4");
        command.env("LD_PRELOAD", &self.library).env("BREAK_UNDER", self.shop.path(out).join("checkpoints"));
        command.envs(settings.iter().copied()).output().expect("the program starts")
    }
}

#[test]
fn a_save_that_breaks_at_any_system_call_loses_nothing() {
    let shop = Workshop::new(10);
    let library = breaker(shop.dir.path());
    let sets = ["schedule.kind=constant", "checkpoint.keep_last=1", "checkpoint.keep_best=false"];
    let more: Vec<&str> = ["--steps", "2"].into_iter().chain(sets.iter().flat_map(|set| ["--set", set])).collect();
    succeeded(shop.run(&shop.tiny("begun", &more)));
    let broken = Broken { shop, library };
    let path = |name: &str| broken.shop.path(name);

    copied(&path("begun"), &path("whole"));
    succeeded(broken.resume("whole", "4").output().expect("the program starts"));
    succeeded(broken.resume("whole", "6").output().expect("the program starts"));
    let expected = last(&path("whole"));

    copied(&path("begun"), &path("counted"));
    succeeded(broken.watched("counted", &[("BREAK_LOG", path("calls").to_str().expect("text"))]));
    let log = std::fs::read_to_string(path("calls")).expect("a line for each call");
    let mut calls: BTreeMap<&str, usize> = BTreeMap::new();
    log.lines().for_each(|line| *calls.entry(line).or_default() += 1);
    for call in ["open", "write", "sync", "rename", "mkdir", "unlink", "truncate"] {
        assert!(calls.keys().any(|line| line.starts_with(call)), "a save has some {call}: {calls:#?}");
    }

    let attempt = |line: &str, number: usize, how: &str| {
        let name = format!("{how}-{number}-{}", line.replace(['/', ' '], "_"));
        let what = format!("{how} at number {number} of {line}");
        copied(&path("begun"), &path(&name));
        let at = number.to_string();
        let output = broken.watched(&name, &[("BREAK_LINE", line), ("BREAK_AT", &at), ("BREAK_HOW", how)]);
        let text = stderr(&output);
        assert!(!text.contains("panicked"), "{what}: {text}");
        match (how, output.status.code()) {
            ("kill", None) => assert_eq!(output.status.signal(), Some(9), "{what}: {text}"),
            // Names are in another order in the headers of tensors each time, so that a file may take a write less.
            ("kill", code) => assert!(code == Some(0) && number > 2 && line.starts_with("write"), "{what}: {text}"),
            // What is already saved is not lost where the removal of older ones fails.
            (_, Some(0)) => {}
            (_, code) => {
                let input = line.starts_with("open /step-000002");
                assert!(code == Some(1) || code == Some(2) && input, "{what}: exit code {code:?}\n{text}");
                assert!(text.contains("error:") && text.contains("checkpoints"), "{what}: {text}");
            }
        }
        let output = broken.resume(&name, "6").output().expect("the program starts");
        assert!(output.status.success(), "resumed after {what}: {}", stderr(&output));
        assert!(last(&path(&name)) == expected, "{what}: another result");
        let entries = std::fs::read_dir(path(&name).join("checkpoints")).expect("a folder");
        let names: Vec<String> =
            entries.map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned()).collect();
        assert_eq!(names, ["step-000006"], "left over after {what}");
        std::fs::remove_dir_all(path(&name)).expect("a folder");
    };
    std::thread::scope(|scope| {
        for how in ["kill", "fail"] {
            let (attempt, calls) = (&attempt, &calls);
            scope.spawn(move || {
                calls.iter().for_each(|(line, count)| (1..=*count).for_each(|number| attempt(line, number, how)));
            });
        }
    });
}
