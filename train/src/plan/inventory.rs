//! Tensors of a run by the part of the model that they belong to.

use lowrank_models::adapter::{AdapterConfig, Allocation, Attach, Report, Rule, linear_weights};
use lowrank_models::hub::ModelFolder;
use lowrank_models::{BaseStorage, Choose, Init, Layout, Llama, LlamaConfig, MatrixStorage, ModelError, WeightSource};
use lowrank_optim::{Assignment, StateMeter, WeightStorage};

use super::parts::{ModelBytes, SegmentBytes};
use crate::build::{self, BuildError};
use crate::config::Config;
use crate::process;
use crate::process::BlockAllocator;

/// Model of a run with its adapter, of zeros that are never touched and take no memory.
///
/// All blocks are alike, so that it has only one, unless patterns of the optimizer choose among them.
pub struct Blueprint {
    llama: LlamaConfig,
    /// None only while it is dropped.
    model: Option<Llama>,
    report: Option<Report>,
}

impl Blueprint {
    /// Builds the model of a configuration, with its shape and its adapter.
    pub fn of(
        config: &Config,
        llama: &LlamaConfig,
        adapter: Option<&AdapterConfig>,
        rule: &dyn Rule,
        allocation: Option<&dyn Allocation>,
    ) -> Result<Self, BuildError> {
        let chosen = !config.optimizer.include.is_empty() || !config.optimizer.exclude.is_empty();
        // The initialisation of an adapter may be slow.
        let layers = if adapter.is_some() || !chosen { 1 } else { llama.num_hidden_layers };
        let device = process::device(&config.train.device)?.autodiff();
        let built = LlamaConfig { num_hidden_layers: layers, ..llama.clone() };
        let model = Llama::build(&built, &mut Blank, &device)?;
        let (model, report) = match adapter {
            Some(adapter) => {
                // The initialisation changes no size.
                let mut blank = AdapterConfig { init: "default".into(), layers: None, ..adapter.clone() };
                if let Some(allocation) = allocation {
                    let found: Vec<_> = linear_weights(&model)?.into_values().collect();
                    let layers =
                        blank.places(&found)?.len() * adapter.layers.as_ref().map_or(llama.num_hidden_layers, Vec::len);
                    blank.rank = allocation.largest_rank(layers).or(blank.rank);
                }
                let (model, report) = model.attach(Attach::new(blank))?;
                (rule.freeze(model), Some(report))
            }
            None => (model, None),
        };
        Ok(Self { llama: llama.clone(), model: Some(model), report })
    }
}

impl Drop for Blueprint {
    fn drop(&mut self) {
        drop(self.model.take());
        // Kept blocks would be filled with zeros the next time.
        BlockAllocator::begin_anew();
    }
}

/// Tensors of a run.
#[derive(Clone, Debug)]
pub struct Inventory {
    /// Configuration of the model.
    pub llama: LlamaConfig,
    /// Bytes of its segments.
    pub bytes: ModelBytes,
    /// Storage of its matrices.
    pub storage: MatrixStorage,
    /// Sum of the inner widths of the adapters on a block's linear layers.
    pub branches: usize,
    /// Elements that the adapters of a block keep for its backward pass, besides the inner widths: dense updates, quantised factors.
    pub kept_elements: usize,
    /// True if the adapter alone is trained and saved.
    pub adapted: bool,
    /// Bytes that an allocation keeps in a block.
    pub allocated: u64,
    /// Hook that needs all gradients at once, and why.
    pub all_gradients: Option<(&'static str, String)>,
    /// Bytes of optimizer state of each parameter, which processes may divide.
    pub states: Vec<u64>,
}

impl Inventory {
    /// Takes the inventory of the run of a configuration on its model.
    pub fn of(
        config: &Config,
        blueprint: &Blueprint,
        adapter: Option<&AdapterConfig>,
        rule: &dyn Rule,
        allocation: Option<&dyn Allocation>,
    ) -> Result<Self, BuildError> {
        let Blueprint { llama, model: Some(model), report } = blueprint else {
            unreachable!("the model is there until it is dropped");
        };
        let storage = build::matrix_storage(config, llama, adapter.is_some())?;
        let kept = kept(config, storage)?;
        let mut inventory = Self {
            storage,
            llama: llama.clone(),
            bytes: ModelBytes::of(model, kept),
            branches: report.iter().map(branches).sum(),
            kept_elements: kept_elements(adapter, report.as_ref())?,
            adapted: adapter.is_some(),
            allocated: 0,
            all_gradients: None,
            states: Vec::new(),
        };
        let meter = StateMeter::new();
        let built = build::optimizer(config, rule, model, &meter)?;
        inventory.all_gradients = built.hooks.needs_all_gradients();
        let trained = if let MatrixStorage::Trained(storage) = storage { storage } else { WeightStorage::F32 };
        let states = build::parameter_states(config, rule, &built.parameters, trained)?;
        // One block may have been built for all, or for all that have adapters.
        let alike = match (adapter, inventory.bytes.blocks.len()) {
            (Some(adapter), _) => adapter.layers.as_ref().map_or(llama.num_hidden_layers, Vec::len),
            (None, 1) => llama.num_hidden_layers,
            (None, _) => 1,
        };
        for (Assignment { parameter, .. }, state) in built.parameters.iter().zip(states) {
            let segment = inventory.bytes.of_parameter(parameter.id);
            segment.trained += 4 * parameter.shape.iter().product::<usize>() as u64;
            segment.state += state;
            let copies = if inventory.bytes.is_in_block(parameter.id) { alike } else { 1 };
            inventory.states.extend(std::iter::repeat_n(state, copies));
        }
        for layer in report.iter().flat_map(|report| &report.layers) {
            let allocated = allocation
                .map_or(0, |allocation| allocation.state_bytes(&layer.place, config.train.accumulation as u64));
            inventory.allocated += allocated as u64;
            inventory.bytes.blocks[0].state += (rule.state_bytes(layer.place.shape) + allocated) as u64;
        }
        if let [block] = *inventory.bytes.blocks {
            let adapted = |layer| match adapter {
                Some(AdapterConfig { layers: Some(layers), .. }) => layers.contains(&layer),
                _ => true,
            };
            let of = |layer| if adapted(layer) { block } else { plain_block(llama, kept[0]) };
            inventory.bytes.blocks = (0..llama.num_hidden_layers).map(of).collect();
        }
        Ok(inventory)
    }

    /// Bytes of the whole model.
    pub fn total(&self) -> SegmentBytes {
        let ModelBytes { entry, blocks, head, .. } = &self.bytes;
        blocks.iter().fold(entry.plus(*head), |sum, block| sum.plus(*block))
    }
}

/// Storage of the matrices of blocks, and of those at the ends of the model, with what the file of a frozen model holds.
fn kept(config: &Config, storage: MatrixStorage) -> Result<[MatrixStorage; 2], BuildError> {
    let file = match (storage, build::model_folder(&config.model)) {
        (MatrixStorage::Frozen(_), Some(folder)) => ModelFolder::open(folder)?.stores()?,
        _ => BaseStorage::F32,
    };
    let tables = if matches!(file, BaseStorage::Int8 | BaseStorage::Nf4) { BaseStorage::Bf16 } else { file };
    let of = |storage, file| {
        if storage == MatrixStorage::Frozen(BaseStorage::File) { MatrixStorage::Frozen(file) } else { storage }
    };
    Ok([of(storage, file), of(storage.of_tables(), tables)])
}

/// Bytes of a frozen block without adapters.
fn plain_block(llama: &LlamaConfig, storage: MatrixStorage) -> SegmentBytes {
    let matrices = llama.block_shapes().map(|[d_in, d_out]| storage.bytes(d_in * d_out)).sum::<usize>();
    let weights = (matrices + 4 * llama.block_vectors()) as u64;
    SegmentBytes { weights, ..SegmentBytes::default() }
}

fn branches(report: &Report) -> usize {
    report.layers.iter().map(|layer| layer.place.rank.max(1)).sum()
}

fn kept_elements(adapter: Option<&AdapterConfig>, report: Option<&Report>) -> Result<usize, BuildError> {
    let (Some(adapter), Some(report)) = (adapter, report) else { return Ok(0) };
    let entry = adapter.entry()?;
    let kept = report.layers.iter().map(|layer| entry.kept(&adapter.options, &layer.place));
    Ok(kept.sum::<Result<usize, _>>()?)
}

/// Zeros that are never written: the system allocates no memory for them.
struct Blank;

impl WeightSource for Blank {
    fn matrix(&mut self, _: &str, shape: [usize; 2], _: Layout, _: Init) -> Result<Vec<f32>, ModelError> {
        Ok(vec![0.0; shape[0] * shape[1]])
    }

    fn vector(&mut self, _: &str, len: usize, _: Init) -> Result<Vec<f32>, ModelError> {
        Ok(vec![0.0; len])
    }

    fn positions(&mut self, _: &str, count: usize, _: usize, _: Option<Choose>) -> Result<Vec<i32>, ModelError> {
        Ok(vec![0; count])
    }
}
