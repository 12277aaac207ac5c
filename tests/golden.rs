//! Golden cases: numbers of the authors' code, or checked against it.
//!
//! Walks the folder named by `LOWRANK_GOLDEN` (default: `golden` beside this file): one folder a method, one safetensors file a case,
//! configuration as JSON under `config` in the header. What a case asks for follows from its tensors and configuration.

#[path = "golden/adalora.rs"]
mod adalora;
#[path = "golden/adamw_8bit.rs"]
mod adamw_8bit;
#[path = "golden/allora.rs"]
mod allora;
#[path = "golden/apollo.rs"]
mod apollo;
#[path = "golden/bayesian_lora.rs"]
mod bayesian_lora;
#[path = "golden/block_lora.rs"]
mod block_lora;
#[path = "golden/bone.rs"]
mod bone;
#[path = "golden/dct_adamw.rs"]
mod dct_adamw;
#[path = "golden/diffora.rs"]
mod diffora;
#[path = "golden/dion.rs"]
mod dion;
#[path = "golden/dora.rs"]
mod dora;
#[path = "golden/dylora.rs"]
mod dylora;
#[path = "golden/fira.rs"]
mod fira;
#[path = "golden/frugal.rs"]
mod frugal;
#[path = "golden/galore.rs"]
mod galore;
#[path = "golden/gguf.rs"]
mod gguf;
#[path = "golden/hydra.rs"]
mod hydra;
#[path = "golden/increlora.rs"]
mod increlora;
#[path = "golden/interop_families.rs"]
mod interop_families;
#[path = "golden/interop_peft.rs"]
mod interop_peft;
#[path = "golden/interop_peft_more.rs"]
mod interop_peft_more;
#[path = "golden/interop_vit.rs"]
mod interop_vit;
#[path = "golden/lambda_orthogonality.rs"]
mod lambda_orthogonality;
#[path = "golden/ldadam.rs"]
mod ldadam;
#[path = "golden/llama.rs"]
mod llama;
#[path = "golden/loca.rs"]
mod loca;
#[path = "golden/loldu.rs"]
mod loldu;
#[path = "golden/lora.rs"]
mod lora;
#[path = "golden/lora_lego.rs"]
mod lora_lego;
#[path = "golden/lora_pro.rs"]
mod lora_pro;
#[path = "golden/lora_sb.rs"]
mod lora_sb;
#[path = "golden/low_precision_weights.rs"]
mod low_precision_weights;
#[path = "golden/merge_baselines.rs"]
mod merge_baselines;
#[path = "golden/muon.rs"]
mod muon;
#[path = "golden/nf4.rs"]
mod nf4;
#[path = "golden/nola.rs"]
mod nola;
#[path = "golden/orthogonal_adaptation.rs"]
mod orthogonal_adaptation;
#[path = "golden/pego.rs"]
mod pego;
#[path = "golden/pissa.rs"]
mod pissa;
#[path = "golden/pretraining_parameterisations.rs"]
mod pretraining_parameterisations;
#[path = "golden/randlora.rs"]
mod randlora;
#[path = "golden/relora.rs"]
mod relora;
#[path = "golden/rmm.rs"]
mod rmm;
#[path = "golden/salt.rs"]
mod salt;
#[path = "golden/scale.rs"]
mod scale;
#[path = "golden/sltrain.rs"]
mod sltrain;
#[path = "golden/snella.rs"]
mod snella;
#[path = "golden/sora.rs"]
mod sora;
#[path = "golden/sorsa.rs"]
mod sorsa;
#[path = "golden/support/mod.rs"]
mod support;
#[path = "golden/svfit.rs"]
mod svfit;
#[path = "golden/tera.rs"]
mod tera;
#[path = "golden/tlora.rs"]
mod tlora;
#[path = "golden/trion.rs"]
mod trion;
#[path = "golden/vera.rs"]
mod vera;
#[path = "golden/wara.rs"]
mod wara;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use support::case::{Case, Outcome};

/// Runs one case: a remark for its line, or what is wrong.
type Runner = fn(&Case) -> Outcome;

/// The methods with cases, and the runner of each.
const RUNNERS: &[(&str, Runner)] = &[
    ("adalora", adalora::run),
    ("adamw-8bit", adamw_8bit::run),
    ("allora", allora::run),
    ("apollo", apollo::run),
    ("bayesian-lora", bayesian_lora::run),
    ("block-lora", block_lora::run),
    ("bone", bone::run),
    ("dct-adamw", dct_adamw::run),
    ("diffora", diffora::run),
    ("dion", dion::run),
    ("dora", dora::run),
    ("dylora", dylora::run),
    ("fira", fira::run),
    ("frugal", frugal::run),
    ("galore", galore::run),
    ("gguf", gguf::run),
    ("hydra", hydra::run),
    ("increlora", increlora::run),
    ("interop-families", interop_families::run),
    ("interop-peft", interop_peft::run),
    ("interop-peft-more", interop_peft_more::run),
    ("interop-vit", interop_vit::run),
    ("lambda-orthogonality", lambda_orthogonality::run),
    ("ldadam", ldadam::run),
    ("llama", llama::run),
    ("loca", loca::run),
    ("loldu", loldu::run),
    ("lora", lora::run),
    ("lora-lego", lora_lego::run),
    ("lora-pro", lora_pro::run),
    ("lora-sb", lora_sb::run),
    ("low-precision-weights", low_precision_weights::run),
    ("merge-baselines", merge_baselines::run),
    ("muon", muon::run),
    ("nf4", nf4::run),
    ("nola", nola::run),
    ("orthogonal-adaptation", orthogonal_adaptation::run),
    ("pego", pego::run),
    ("pissa", pissa::run),
    ("pretraining-parameterisations", pretraining_parameterisations::run),
    ("randlora", randlora::run),
    ("relora", relora::run),
    ("rmm", rmm::run),
    ("salt", salt::run),
    ("scale", scale::run),
    ("sltrain", sltrain::run),
    ("snella", snella::run),
    ("sora", sora::run),
    ("sorsa", sorsa::run),
    ("svfit", svfit::run),
    ("tera", tera::run),
    ("tlora", tlora::run),
    ("trion", trion::run),
    ("vera", vera::run),
    ("wara", wara::run),
];

/// The runner of a method; none when it is not implemented yet.
fn runner(method: &str) -> Option<Runner> {
    RUNNERS.iter().find(|(name, _)| *name == method).map(|(_, run)| *run)
}

#[test]
fn golden_cases_agree() {
    let given = std::env::var_os("LOWRANK_GOLDEN").map(PathBuf::from);
    let own = given.is_none();
    let root = given.unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("golden"));
    let mut failed = Vec::new();
    let mut met = BTreeSet::new();
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    for path in cases(&root) {
        let inside = path.strip_prefix(&root).unwrap_or(&path).with_extension("");
        let method = inside.iter().next().unwrap_or_default().to_string_lossy().into_owned();
        let name = inside.to_string_lossy().trim_end_matches("/expected").to_string();
        met.insert(method.clone());
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
    // The project's own cases are complete; a folder that somebody names has what it has.
    let missing: Vec<&str> = RUNNERS.iter().map(|(name, _)| *name).filter(|name| own && !met.contains(*name)).collect();
    assert!(missing.is_empty(), "no cases of {} under {}", missing.join(", "), root.display());
    assert!(counts.contains_key("passed") || !failed.is_empty(), "no case under {} was run", root.display());
    assert!(failed.is_empty(), "{} cases failed:\n{}", failed.len(), failed.join("\n"));
}

/// The case of a folder of model files.
const EXPECTED: &str = "expected.safetensors";

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
                (true, false) if path.join(EXPECTED).exists() => found.push(path.join(EXPECTED)),
                (false, false) if path.extension().is_some_and(|end| end == "safetensors") => found.push(path),
                _ => {}
            }
        }
    }
    found.sort();
    found
}
