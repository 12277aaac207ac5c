//! Writing of a new model folder.

use std::path::Path;

use anyhow::Context;
use lowrank_models::Llama;
use lowrank_models::hub::{self, FileType, FileTypes, MAX_SHARD_BYTES, ModelFolder};

use crate::build::BuildError;
use crate::process::files;

/// Rejects an existing folder.
pub fn refuse_existing(out: &Path) -> Result<(), BuildError> {
    match out.exists() {
        true => Err(BuildError::Settings(format!("{} exists already; name another folder", out.display()))),
        false => Ok(()),
    }
}

/// Reads the type of weights that a `--dtype` names.
pub fn file_type(name: &str) -> Result<FileType, BuildError> {
    name.parse().map_err(|reason| BuildError::Settings(format!("--dtype {name}: {reason}")))
}

/// Writes a model with the companion files of its source folder, under a temporary name that is then renamed. Weights have this type, or the
/// types that they have in the source folder.
pub fn write(
    model: &Llama,
    from: &ModelFolder,
    from_dir: &Path,
    dtype: Option<FileType>,
    out: &Path,
) -> anyhow::Result<()> {
    let types = match dtype {
        Some(dtype) => FileTypes::all(dtype),
        None => from.types().map_err(BuildError::from)?,
    };
    whole(out, |dir| fill(model, from, from_dir, &types, dir))
}

/// Creates a folder as a whole or not at all: `fill` writes into a folder under a temporary name that is then renamed.
pub fn whole(out: &Path, fill: impl FnOnce(&Path) -> anyhow::Result<()>) -> anyhow::Result<()> {
    refuse_existing(out)?;
    let parent = out.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(".".as_ref());
    std::fs::create_dir_all(parent).with_context(|| format!("cannot create {}", parent.display()))?;
    let beside = files::unfinished(out);
    // Remains of a killed process.
    files::remove_if_there(&beside)
        .and_then(|()| std::fs::create_dir(&beside))
        .with_context(|| format!("cannot write in {}", parent.display()))?;
    let written = fill(&beside).and_then(|()| {
        files::sync_folder(&beside)
            .and_then(|()| std::fs::rename(&beside, out))
            .and_then(|()| files::sync_parent(out))
            .with_context(|| format!("cannot create {}", out.display()))
    });
    if written.is_err() {
        // The first error is the one to report.
        let _ = files::remove_if_there(&beside);
    }
    written
}

fn fill(model: &Llama, from: &ModelFolder, from_dir: &Path, types: &FileTypes, dir: &Path) -> anyhow::Result<()> {
    hub::save_as(model, &from.config.extra, types, dir, MAX_SHARD_BYTES).map_err(BuildError::from)?;
    Ok(hub::copy_companions(from_dir, dir).map_err(BuildError::from)?)
}
