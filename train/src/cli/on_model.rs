//! Adapters on the model of a command.

use std::path::PathBuf;

use lowrank_models::Llama;
use lowrank_models::hub::gguf::GgufAdapter;
use lowrank_models::hub::peft::PeftFolder;

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
            if self.dirs[..place].contains(dir) {
                return Err(BuildError::Settings(format!("--adapter {} is given twice; give it once", dir.display())));
            }
            let name = dir.to_string_lossy();
            if dir.is_file() {
                (model, _) = GgufAdapter::open(dir)?.named(&name).attach(model)?;
                continue;
            }
            let folder = PeftFolder::open(dir)?.named(&name);
            for warning in &folder.warnings {
                eprintln!("warning: {}: {warning}", dir.display());
            }
            (model, _) = folder.attach(model)?;
        }
        Ok(model)
    }
}
