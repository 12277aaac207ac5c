//! Adapters on the model of a command.

use std::path::{Path, PathBuf};

use burn::module::Module;
use burn::tensor::Device;
use lowrank_kernels::host::is_cpu;
use lowrank_models::adapter::{Adapter, Nested, Resize, adapters_of, each_adapter, resize};
use lowrank_models::hub::ModelFolder;
use lowrank_models::hub::gguf::GgufAdapter;
use lowrank_models::hub::peft::PeftFolder;
use lowrank_models::{BaseStorage, Llama, MatrixStorage, ModelError};

use crate::build::BuildError;

/// Storage of the weights of a model that is only read.
#[derive(Debug, clap::Args)]
pub struct Storage {
    /// Storage of the weights: file (bf16, f16 and codes as they are), f32, bf16, int8, q8_0 or nf4
    #[arg(long = "weights", value_name = "STORAGE", default_value = "file", value_parser = base_storage)]
    storage: BaseStorage,
}

impl Storage {
    /// Loads the model of a folder; on other devices than the CPU in f32.
    pub fn load(&self, folder: &ModelFolder, device: &Device) -> Result<Llama, BuildError> {
        let on_cpu = is_cpu(&device.clone().inner());
        let storage = match (self.storage, on_cpu) {
            (BaseStorage::File | BaseStorage::F32, false) => MatrixStorage::Wide,
            (storage, true) => MatrixStorage::Frozen(storage),
            (storage, false) => {
                return Err(BuildError::Settings(format!(
                    "--weights {storage}: only the CPU computes with it; leave it out, or set --device cpu"
                )));
            }
        };
        Ok(folder.load_stored(storage, device)?)
    }
}

/// A storage by its name.
pub fn base_storage(name: &str) -> Result<BaseStorage, String> {
    let known = BaseStorage::CHOICES;
    let found = known.into_iter().find(|storage| storage.name() == name);
    found.ok_or_else(|| format!("must be one of {}", known.map(BaseStorage::name).join(", ")))
}

/// Adapters of the model.
#[derive(Debug, clap::Args)]
pub struct Adapters {
    /// Adapter folder of this program or of Python's peft, or GGUF file; may be repeated: each is applied on top of those before it
    #[arg(long = "adapter", value_name = "DIR")]
    dirs: Vec<PathBuf>,
    /// Rank at which adapters trained by the allocation dylora are used: from 1 to their own
    #[arg(long, value_name = "RANK", requires = "dirs")]
    pub rank: Option<usize>,
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
                false => {
                    let folder = folder(dir)?;
                    let model = if folder.has_own_head() { model.with_own_head() } else { model };
                    folder.attach(model)?.0
                }
            };
        }
        self.at_rank(model)
    }

    /// As [`Adapters::on`], for another model with its own way of attaching a folder.
    pub fn on_by<M: Module>(
        &self,
        mut model: M,
        attach: impl Fn(PeftFolder, M) -> Result<M, ModelError>,
    ) -> Result<M, BuildError> {
        for (place, dir) in self.dirs.iter().enumerate() {
            self.refuse_twice(place)?;
            model = attach(folder(dir)?, model)?;
        }
        self.at_rank(model)
    }

    fn at_rank<M: Module>(&self, model: M) -> Result<M, BuildError> {
        match self.rank {
            Some(rank) => at_rank(model, rank),
            None => Ok(model),
        }
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

/// The model with the leading components alone of its nested adapters.
fn at_rank<M: Module>(mut model: M, rank: usize) -> Result<M, BuildError> {
    let refused = |reason: String| Err(BuildError::Settings(format!("--rank {rank}: {reason}")));
    let mut largest: Option<usize> = None;
    each_adapter(&model, |_, stack| {
        for nested in stack.stack.iter().filter_map(|adapter| adapter.structure.downcast_ref::<Nested>()) {
            largest = Some(largest.map_or(nested.rank(), |largest| largest.max(nested.rank())));
        }
    });
    match largest {
        None => {
            return refused(
                "no adapter works at other ranks than its own; that takes an adapter trained with --allocation dylora; remove --rank".into(),
            );
        }
        Some(largest) if rank == 0 || rank > largest => {
            return refused(format!("the adapter has the ranks 1 to {largest}"));
        }
        Some(_) => {}
    }
    for control in adapters_of(&model) {
        let leading = |_: &str, adapter: &Adapter| {
            let nested = adapter.structure.downcast_ref::<Nested>()?;
            Some(Resize { keep: (0..rank.min(nested.rank())).collect(), append: 0 })
        };
        (model, _) = resize(model, control.name(), leading)?;
    }
    Ok(model)
}
