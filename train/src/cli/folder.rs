//! Writing a model folder in place of none.

use std::path::Path;

use anyhow::Context;
use lowrank_models::Llama;
use lowrank_models::hub::{self, MAX_SHARD_BYTES, ModelFolder};

use crate::build::BuildError;

/// Refuses a folder that is there.
pub fn refuse_existing(out: &Path) -> Result<(), BuildError> {
    match out.exists() {
        true => Err(BuildError::Settings(format!("{} exists already; name another folder", out.display()))),
        false => Ok(()),
    }
}

/// Writes a model with the companions of the folder it came from: beside, then renamed.
pub fn write(model: &Llama, from: &ModelFolder, from_dir: &Path, out: &Path) -> anyhow::Result<()> {
    let parent = out.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(".".as_ref());
    std::fs::create_dir_all(parent).with_context(|| format!("cannot create {}", parent.display()))?;
    let beside = tempfile::tempdir_in(parent).with_context(|| format!("cannot write in {}", parent.display()))?;
    hub::save(model, &from.config.extra, beside.path(), MAX_SHARD_BYTES).map_err(BuildError::from)?;
    hub::copy_companions(from_dir, beside.path()).map_err(BuildError::from)?;
    // After this the temporary folder has nothing left to remove.
    std::fs::rename(beside.path(), out).with_context(|| format!("cannot create {}", out.display()))
}
