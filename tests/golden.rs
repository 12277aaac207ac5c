//! Golden cases: numbers of the authors' code, or checked against it.
//!
//! Walks the folder named by `LOWRANK_GOLDEN` (default: `golden` beside this file): one folder a method, one safetensors file a case,
//! configuration as JSON under `config` in the header. What a case asks for follows from its tensors and configuration.

#[path = "golden_adapters.rs"]
mod adapters;
#[path = "golden_bases.rs"]
mod bases;
#[path = "golden_case.rs"]
mod case;
#[path = "golden_dct.rs"]
mod dct;
#[path = "golden_decompositions.rs"]
mod decompositions;
#[path = "golden_frozen_factors.rs"]
mod frozen_factors;
#[path = "golden_llama.rs"]
mod llama;
#[path = "golden_lora.rs"]
mod lora;
#[path = "golden_momentum.rs"]
mod momentum;
#[path = "golden_parameterizations.rs"]
mod parameterizations;
#[path = "golden_peft.rs"]
mod peft;
#[path = "golden_projected.rs"]
mod projected;
#[path = "golden_relora.rs"]
mod relora;
#[path = "golden_rules.rs"]
mod rules;
#[path = "golden_structures.rs"]
mod structures;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use case::{Case, Outcome};

/// Runs one case: a remark for its line, or what is wrong.
type Runner = fn(&Case) -> Outcome;

/// The runner of a method; none when it is not implemented yet.
fn runner(method: &str) -> Option<Runner> {
    match method {
        "adamw-8bit" => Some(momentum::adamw_8bit),
        "allora" => Some(rules::allora),
        "apollo" => Some(projected::apollo),
        "block-lora" => Some(structures::block_lora),
        "bone" => Some(structures::bone),
        "dct-adamw" => Some(dct::run),
        "dion" => Some(momentum::dion),
        "dora" => Some(lora::dora),
        "fira" => Some(projected::fira),
        "frugal" => Some(projected::frugal),
        "galore" => Some(projected::galore),
        "hydra" => Some(structures::hydra),
        "interop-peft" => Some(peft::interop),
        "ldadam" => Some(projected::ldadam),
        "llama" => Some(llama::run),
        "loca" => Some(bases::loca),
        "loldu" => Some(decompositions::loldu),
        "lora" => Some(lora::run),
        "lora-pro" => Some(rules::lora_pro),
        "lora-sb" => Some(frozen_factors::lora_sb),
        "muon" => Some(momentum::muon),
        "nola" => Some(bases::nola),
        "pissa" => Some(lora::pissa),
        "pretraining-parameterisations" => Some(parameterizations::others),
        "randlora" => Some(bases::randlora),
        "relora" => Some(relora::run),
        "salt" => Some(decompositions::salt),
        "sltrain" => Some(parameterizations::sltrain),
        "sorsa" => Some(decompositions::sorsa),
        "svfit" => Some(decompositions::svfit),
        "tera" => Some(bases::tera),
        "tlora" => Some(bases::tlora),
        "trion" => Some(momentum::trion),
        "vera" => Some(frozen_factors::vera),
        "wara" => Some(bases::wara),
        _ => None,
    }
}

#[test]
fn golden_cases_agree() {
    let root = std::env::var_os("LOWRANK_GOLDEN")
        .map(PathBuf::from)
        .unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("golden"));
    let mut failed = Vec::new();
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    for path in cases(&root) {
        let method = path.parent().and_then(Path::file_name).unwrap_or_default().to_string_lossy().into_owned();
        let name = format!("{method}/{}", path.file_stem().unwrap_or_default().to_string_lossy());
        let kind = match runner(&method) {
            None => {
                println!("skipped  {name}: {method} is not implemented yet");
                "skipped"
            }
            Some(run) => match Case::read(&path).and_then(|case| run(&case)) {
                Ok(remark) => {
                    println!("passed   {name}: {remark}");
                    "passed"
                }
                Err(reason) => {
                    println!("FAILED   {name}: {reason}");
                    failed.push(format!("{name}: {reason}"));
                    "failed"
                }
            },
        };
        *counts.entry(kind).or_default() += 1;
    }
    println!("{counts:?}");
    assert!(counts.contains_key("passed") || !failed.is_empty(), "no case under {} was run", root.display());
    assert!(failed.is_empty(), "{} cases failed:\n{}", failed.len(), failed.join("\n"));
}

/// All case files below a folder, sorted.
fn cases(root: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![root.to_path_buf()];
    while let Some(folder) = folders.pop() {
        let entries = std::fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
        for entry in entries {
            let path = entry.expect("a readable folder").path();
            // Folders of model files below a method are material of other tests.
            match (path.is_dir(), folder == root) {
                (true, true) => folders.push(path),
                (false, false) if path.extension().is_some_and(|end| end == "safetensors") => found.push(path),
                _ => {}
            }
        }
    }
    found.sort();
    found
}
