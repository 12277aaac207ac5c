//! Adapters on the model of a command.

use std::path::{Path, PathBuf};

use lowrank_models::hub::gguf::GgufAdapter;
use lowrank_models::hub::peft::PeftFolder;
use lowrank_models::{Llama, ModelError};

use crate::build::BuildError;

/// Which adapters stand on the model.
#[derive(Debug, clap::Args)]
pub struct Adapters {
    /// Adapter folder of this program or of Python's peft, or GGUF file; may be repeated: each stands on those before it
    #[arg(long = "adapter", value_name = "DIR")]
    dirs: Vec<PathBuf>,
}

impl Adapters {
    /// Returns true if there are no adapters.
    pub fn is_empty(&self) -> bool {
        self.dirs.is_empty()
    }

    /// Folders and files of the adapters, in order.
    pub fn paths(&self) -> &[PathBuf] {
        &self.dirs
    }

    /// Attaches the adapters to the model, in order. Reports contents of the folders that are ignored.
    pub fn on(&self, mut model: Llama) -> Result<Llama, BuildError> {
        for (place, dir) in self.dirs.iter().enumerate() {
            self.refuse_twice(place)?;
            model = match dir.is_file() {
                true => GgufAdapter::open(dir)?.named(&dir.to_string_lossy()).attach(model)?.0,
                false => folder(dir)?.attach(model)?.0,
            };
        }
        Ok(model)
    }

    /// As [`Adapters::on`], for another model with its own way of attaching a folder.
    pub fn on_by<M>(
        &self,
        mut model: M,
        attach: impl Fn(PeftFolder, M) -> Result<M, ModelError>,
    ) -> Result<M, BuildError> {
        for (place, dir) in self.dirs.iter().enumerate() {
            self.refuse_twice(place)?;
            model = attach(folder(dir)?, model)?;
        }
        Ok(model)
    }

    fn refuse_twice(&self, place: usize) -> Result<(), BuildError> {
        let dir = &self.dirs[place];
        match self.dirs[..place].contains(dir) {
            true => Err(BuildError::Settings(format!("--adapter {} is given twice; give it once", dir.display()))),
            false => Ok(()),
        }
    }
}

/// Opens an adapter folder under its own name, and reports contents that are ignored.
fn folder(dir: &Path) -> Result<PeftFolder, ModelError> {
    let folder = PeftFolder::open(dir)?.named(&dir.to_string_lossy());
    for warning in &folder.warnings {
        eprintln!("warning: {}: {warning}", dir.display());
    }
    Ok(folder)
}
