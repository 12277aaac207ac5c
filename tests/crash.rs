//! A save that is broken off at each of its system calls: the program is killed there, or the call fails.
#![cfg(target_os = "linux")]

#[path = "program.rs"]
mod program;

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

struct Broken {
    shop: Workshop,
    library: PathBuf,
}

impl Broken {
    /// Continues the run in a folder up to a step.
    fn resume(&self, out: &str, steps: &str) -> Command {
        self.shop.command(&["pretrain", "--quiet", "--resume", "--out", out, "--steps", steps])
    }

    /// The same with the call of this number broken.
    fn broken(&self, out: &str, at: usize, how: &str, log: Option<&Path>) -> Output {
        let mut command = self.resume(out, "4");
        command.env("LD_PRELOAD", &self.library).env("BREAK_UNDER", self.shop.path(out).join("checkpoints"));
        command.env("BREAK_AT", at.to_string()).env("BREAK_HOW", how);
        log.map(|log| command.env("BREAK_LOG", log));
        command.output().expect("the program starts")
    }
}

#[test]
fn a_save_that_breaks_at_any_system_call_loses_nothing() {
    let shop = Workshop::new(10);
    let library = breaker(shop.dir.path());
    let settings = ["--steps", "2", "--set", "schedule.kind=constant", "--set", "checkpoint.keep=1"];
    succeeded(shop.run(&shop.tiny("begun", &settings)));
    let broken = Broken { shop, library };
    let path = |name: &str| broken.shop.path(name);

    copied(&path("begun"), &path("whole"));
    succeeded(broken.resume("whole", "4").output().expect("the program starts"));
    succeeded(broken.resume("whole", "6").output().expect("the program starts"));
    let expected = tensors(&checkpoints(&path("whole")).pop().expect("a checkpoint"));

    copied(&path("begun"), &path("counted"));
    succeeded(broken.broken("counted", 0, "kill", Some(&path("calls"))));
    let calls = std::fs::read_to_string(path("calls")).expect("a line for each call");
    let calls: Vec<&str> = calls.lines().collect();
    for call in ["open", "write", "sync", "rename", "mkdir", "unlink"] {
        assert!(calls.iter().any(|line| line.starts_with(call)), "a save has some {call}: {calls:#?}");
    }

    let attempt = |number: usize, how: &str| {
        let name = format!("{how}-{number}");
        let call = calls[number - 1];
        copied(&path("begun"), &path(&name));
        let output = broken.broken(&name, number, how, None);
        let text = stderr(&output);
        match how {
            "kill" => assert_eq!(output.status.signal(), Some(9), "{call}: {text}"),
            _ => {
                let code = output.status.code().expect("it ends by itself");
                assert!([0, 1].contains(&code) && !text.contains("panicked"), "{call}: exit code {code}\n{text}");
                assert!(code == 0 || text.contains("error:"), "{call}: {text}");
            }
        }
        let output = broken.resume(&name, "6").output().expect("the program starts");
        assert!(output.status.success(), "resumed after {how} at {call}: {}", stderr(&output));
        assert!(
            tensors(&checkpoints(&path(&name)).pop().expect("a checkpoint")) == expected,
            "{how} at {call}: another result"
        );
        let entries = std::fs::read_dir(path(&name).join("checkpoints")).expect("a folder");
        let names: Vec<String> =
            entries.map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned()).collect();
        assert_eq!(names, ["step-000006"], "left over after {how} at {call}");
        std::fs::remove_dir_all(path(&name)).expect("a folder");
    };
    std::thread::scope(|scope| {
        for how in ["kill", "fail"] {
            let (attempt, calls) = (&attempt, &calls);
            scope.spawn(move || (1..=calls.len()).for_each(|number| attempt(number, how)));
        }
    });
}
