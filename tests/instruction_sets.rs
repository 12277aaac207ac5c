//! `LOWRANK_SIMD`: which instructions a run uses, and what it says of them.

#[path = "program.rs"]
mod program;

use lowrank_kernels::instructions::{InstructionSet, VARIABLE};
use program::{Workshop, refused, stderr, succeeded, summary};

#[test]
fn an_unknown_set_is_rejected_before_anything_is_done() {
    let shop = Workshop::new(10);
    let output = shop.command(&shop.tiny("run", &["--steps", "2"])).env(VARIABLE, "avx1024").output().unwrap();
    refused(&output, &[VARIABLE, "\"avx1024\"", "auto, avx2 and avx512"]);
    assert!(!shop.path("run").exists());
}

#[test]
fn a_run_that_resumes_with_other_instructions_says_so() {
    let best = InstructionSet::best();
    let Some(other) = [InstructionSet::Avx2].into_iter().find(|set| *set < best) else { return };
    let shop = Workshop::new(10);
    let run = |set: &str, resume: bool| {
        let mut args =
            shop.tiny("run", &["--steps", "4", "--set", "checkpoint.every=2", "--set", "checkpoint.keep_last=9"]);
        if resume {
            args.push("--resume");
        }
        succeeded(shop.command(&args).env(VARIABLE, set).output().unwrap())
    };
    run(other.name(), false);
    assert_eq!(summary(&shop.path("run"))["instruction_set"], other.name());
    std::fs::remove_dir_all(shop.path("run/checkpoints/step-000004")).unwrap();
    let same = run(other.name(), true);
    assert!(!stderr(&same).contains(VARIABLE), "{}", stderr(&same));
    std::fs::remove_dir_all(shop.path("run/checkpoints/step-000004")).unwrap();
    let changed = stderr(&run("auto", true));
    assert!(changed.contains(other.name()) && changed.contains(best.name()), "{changed}");
}
