//! Text available on every machine that has built the project.

use std::path::{Path, PathBuf};

use super::source::files_below;
use super::{DataError, Skipped};

/// The Rust sources of the `burn` crates that Cargo downloaded, in the versions of `Cargo.lock`, in the order of their paths.
///
/// Cargo keeps them in `registry/src` of its home (`CARGO_HOME`, else `.cargo` in the home folder).
pub fn default_corpus() -> Result<Vec<PathBuf>, DataError> {
    let home = std::env::var_os("CARGO_HOME").map(PathBuf::from);
    let home = home.or_else(|| std::env::home_dir().map(|home| home.join(".cargo")));
    let registry = home.unwrap_or_default().join("registry").join("src");
    let missing = || DataError::NoCorpus { looked: registry.display().to_string() };
    let crates = burn_crates(include_str!("../../../Cargo.lock"));
    let mut files = Vec::new();
    for index in std::fs::read_dir(&registry).map_err(|_| missing())? {
        let index = index.map_err(DataError::read(&registry))?.path();
        for name in &crates {
            let folder = index.join(name);
            if folder.is_dir() {
                files.extend(files_below(&folder, &mut Skipped::default())?.into_iter().filter(|file| is_rust(file)));
            }
        }
    }
    match files.is_empty() {
        true => Err(missing()),
        false => Ok(files),
    }
}

fn is_rust(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == "rs")
}

/// `NAME-VERSION` of all crates called `burn` or `burn-*` in a lock file, sorted.
fn burn_crates(lock: &str) -> Vec<String> {
    let value = |line: &str, key: &str| Some(line.strip_prefix(key)?.trim_matches(['=', ' ', '"']).to_string());
    let lines: Vec<&str> = lock.lines().collect();
    let mut crates: Vec<String> = lines
        .windows(2)
        .filter_map(|pair| Some((value(pair[0], "name")?, value(pair[1], "version")?)))
        .filter(|(name, _)| name == "burn" || name.starts_with("burn-"))
        .map(|(name, version)| format!("{name}-{version}"))
        .collect();
    crates.sort();
    crates
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn crates_and_versions_come_from_the_lock_file() {
        let lock = "[[package]]\nname = \"burn\"\nversion = \"0.22.1\"\n\n[[package]]\nname = \"burner\"\nversion = \"1.0.0\"\n\n\
                    [[package]]\nname = \"burn-core\"\nversion = \"0.22.1\"\n";
        assert_eq!(burn_crates(lock), ["burn-0.22.1", "burn-core-0.22.1"]);
    }

    #[test]
    fn the_corpus_is_megabytes_of_rust() {
        let files = default_corpus().unwrap();
        let bytes: u64 = files.iter().map(|file| std::fs::metadata(file).unwrap().len()).sum();
        assert!(files.iter().all(|file| is_rust(file)));
        assert!(bytes > 5_000_000, "{bytes}");
    }
}
