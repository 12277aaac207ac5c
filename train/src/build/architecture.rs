//! Models that a run can train: their data, folders and reports.

use std::path::Path;

use burn::tensor::Device;
use lowrank_models::adapter::{AdapterError, Attach, Report};
use lowrank_models::hub::FileType;
use lowrank_models::linear::LinearSteps;
use lowrank_models::{MatrixStorage, Parameterization, SegmentedModel};
use lowrank_optim::Hooks;

use super::BuildError;
use crate::config::{Config, Job};
use crate::data::images::Picture;
use crate::engine::TrainError;
use crate::objective::Stream;

/// Model that a run can train, whole or by an adapter, from its configuration to its checkpoints.
pub trait Architecture: SegmentedModel + 'static {
    /// Configuration of a model folder.
    type Hub;
    /// Data of a stage.
    type Data: StageData<Self::Batch>;

    /// Storage of the matrices in a run, trained or below an adapter; by default f32.
    fn storage(_config: &Config, _hub: &Self::Hub, _adapted: bool) -> Result<MatrixStorage, BuildError> {
        Ok(MatrixStorage::Wide)
    }

    /// Creates a model with random weights.
    fn random(hub: &Self::Hub, seed: u64, storage: MatrixStorage, device: &Device) -> Result<Self, BuildError>;

    /// Loads the model that a run starts from.
    fn load(
        hub: &Self::Hub,
        folder: &Path,
        seed: u64,
        storage: MatrixStorage,
        device: &Device,
    ) -> Result<Self, BuildError>;

    /// Loads the whole model of a checkpoint; rejects one of another shape.
    fn load_saved(hub: &Self::Hub, dir: &Path, storage: MatrixStorage, device: &Device) -> Result<Self, BuildError>;

    /// Writes the whole model into the folder of a checkpoint, from which it goes on being trained with the same bits. Its weights have this
    /// type, or the types in the files of the folder that the run started from.
    fn save(
        &self,
        hub: &Self::Hub,
        folder: Option<&Path>,
        dtype: Option<FileType>,
        dir: &Path,
    ) -> Result<(), BuildError>;

    /// Writes what an adapter's own files cannot say beside them.
    fn save_beside_adapter(_hub: &Self::Hub, _dir: &Path) -> Result<(), BuildError> {
        Ok(())
    }

    /// Writes what belongs beside a saved model; `folder` is the one that the run started from.
    fn save_companions(data: &Self::Data, folder: Option<&Path>, job: Job, dir: &Path) -> Result<(), BuildError>;

    /// Attaches an adapter to the matching linear layers and freezes everything else.
    fn attach(self, attach: Attach) -> Result<(Self, Report), AdapterError>;

    /// Returns the model with those parameters trained that are trained beside every adapter.
    fn with_trained_head(self) -> Self {
        self
    }

    /// Returns true if a parameter of this name is trained beside every adapter and saved with it.
    fn is_head(_name: &str) -> bool {
        false
    }

    /// Parameterization of the linear layers.
    fn parameterization(hub: &Self::Hub) -> Parameterization;

    /// `[d_in, d_out]` of the linear layers of a block.
    fn block_shapes(hub: &Self::Hub) -> Vec<[usize; 2]>;

    /// Steps of the parameterization around those of the optimizer, if it has any.
    fn linear_steps(&self, _seed: u64) -> Option<Box<dyn LinearSteps>> {
        None
    }

    /// Adds these steps to the hooks of a training loop.
    fn with_steps(hooks: Hooks<Self>, _steps: Box<dyn LinearSteps>) -> Hooks<Self> {
        hooks
    }

    /// Shows what the model does, if it can be shown: as a text for the terminal, and for the logs.
    fn sample(&self, data: &Self::Data, config: &Config) -> Result<Option<String>, TrainError>;

    /// Measures the model in its own terms, such as its accuracy, on the held-out batches that start at these rows, or on all.
    fn scores(&self, _data: &Self::Data, _starts: Option<&[u64]>, _device: &Device) -> Result<Scores, TrainError> {
        Ok(Scores::default())
    }
}

/// Measures of a model in its own terms.
#[derive(Clone, Debug, Default)]
pub struct Scores {
    /// Fraction of the rows that are classified correctly.
    pub accuracy: Option<f64>,
    /// Pictures for TensorBoard by their tags.
    pub pictures: Vec<(&'static str, Picture)>,
}

/// Data of a stage: training rows, held-out rows, and facts about them.
pub trait StageData<B> {
    /// Training rows.
    fn train(&self) -> &dyn Stream<B>;

    /// Held-out rows.
    fn validation(&self) -> &dyn Stream<B>;

    /// Hash of all training data.
    fn fingerprint(&self) -> &str;

    /// Hash of the held-out data.
    fn held_out_fingerprint(&self) -> &str;

    /// Plural of what the loss is counted by.
    fn unit(&self) -> &'static str {
        "tokens"
    }

    /// Plural of the held-out rows.
    fn of_all(&self) -> &'static str {
        "text"
    }

    /// Held-out text itself, if the data is plain text.
    fn held_out(&self) -> Option<&HeldOut> {
        None
    }

    /// One-line description of the amount of data.
    fn description(&self) -> &str;

    /// Command that tries the model after training, with `MODEL` for its options.
    fn ask(&self) -> &str;
}

/// Held-out text.
#[derive(Clone)]
pub struct HeldOut {
    /// Size in bytes.
    pub bytes: u64,
    /// Bits that `gzip -9` needs for each byte.
    pub gzip_bits_per_byte: f64,
}
