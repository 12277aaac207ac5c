//! Memory forecast of a run from its parts.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use lowrank_models::adapter::{AdapterConfig, Allocation, Rule};
use lowrank_models::{LlamaConfig, MatrixStorage, ops};
use lowrank_optim::WeightStorage;

use super::inventory::{Blueprint, Inventory};
use super::parts::{ModelBytes, SegmentBytes};
use crate::build::{self, BuildError};
use crate::config::{Config, OptimizerSection};
use crate::engine::{BackwardMode, largest_share};
use crate::process::Peers;

/// Expected memory of a run, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Forecast {
    /// All weights.
    pub weights: u64,
    /// Maximum gradients that exist at a time.
    pub gradients: u64,
    /// All trained tensors, whose gradients processes sum.
    pub trained: u64,
    /// Optimizer state.
    pub state: u64,
    /// Maximum memory that a forward pass keeps for the backward pass.
    pub activations: u64,
    /// Peak of the process.
    pub peak: u64,
}

/// Memory of the program itself: its code, its threads with the panels of their products, and small allocations.
const PROGRAM: u64 = 30 << 20;
/// Memory of a tokenizer per id.
const TOKENIZER: u64 = 450;

/// Forecasts runs that differ only in their settings.
pub struct Forecaster<'a> {
    llama: &'a dyn Fn(&Config) -> Result<LlamaConfig, BuildError>,
    adapter: Option<&'a AdapterConfig>,
    rule: &'a dyn Rule,
    allocation: Option<&'a dyn Allocation>,
    begun: u64,
    /// The last model, with the settings that determine it.
    blueprint: RefCell<Option<(String, Blueprint)>>,
    /// Inventories by the settings that determine the tensors, to avoid building them again for every backward mode and
    /// batch.
    inventories: RefCell<BTreeMap<String, Inventory>>,
}

impl<'a> Forecaster<'a> {
    /// Creates forecasts of runs with the model shape `llama` and this adapter.
    pub fn new(
        llama: &'a dyn Fn(&Config) -> Result<LlamaConfig, BuildError>,
        adapter: Option<&'a AdapterConfig>,
        rule: &'a dyn Rule,
        allocation: Option<&'a dyn Allocation>,
    ) -> Self {
        Self {
            llama,
            adapter,
            rule,
            allocation,
            begun: 0,
            blueprint: RefCell::default(),
            inventories: RefCell::default(),
        }
    }

    /// Counts bytes that the process already uses.
    pub fn beginning_at(self, begun: u64) -> Self {
        Self { begun, ..self }
    }

    /// Shape of the model of a configuration.
    pub fn shape(&self, config: &Config) -> Result<LlamaConfig, BuildError> {
        (self.llama)(config)
    }

    /// Rejects a configuration that a run would reject, as far as that follows without its data and the forecast does not show it.
    pub fn check(&self, config: &Config) -> Result<(), BuildError> {
        config.check()?;
        // The length of an epoch is not known.
        let steps = if config.train.epochs > 0.0 { None } else { config.total_steps(0) };
        build::schedule(config, &(self.llama)(config)?.parameterization, steps)?;
        if self.adapter.is_some() {
            self.rule.check_adapter_alone(&build::optimizer_options(config))?;
        }
        if let Some(allocation) = self.allocation {
            allocation.check_optimizer(&config.optimizer.name)?;
        }
        Ok(())
    }

    /// Forecasts the run of a configuration in each of the processes of this run.
    pub fn forecast(&self, config: &Config) -> Result<Forecast, BuildError> {
        self.forecast_for(config, Peers::of_process().size())
    }

    /// Forecasts the run of a configuration in each of as many processes, which divide the optimizer's state if the
    /// configuration says so; the one that holds most of it counts.
    pub fn forecast_for(&self, config: &Config, processes: usize) -> Result<Forecast, BuildError> {
        let optimizer = OptimizerSection { clip: 0.0, block_clip: 0.0, ..config.optimizer.clone() };
        let micro_batches = self.allocation.map_or(0, |_| config.train.accumulation);
        let key = format!("{:?} {:?} {optimizer:?} {micro_batches}", config.model, config.weights);
        let mut inventories = self.inventories.borrow_mut();
        let inventory = match inventories.entry(key) {
            Entry::Occupied(made) => made.into_mut(),
            Entry::Vacant(place) => place.insert(self.inventory(config)?),
        };
        if let (BackwardMode::PerLayer, Some((hook, reason))) = (config.train.backward, &inventory.all_gradients) {
            return Err(BuildError::Settings(format!(
                "train.backward = per-layer: {hook} needs all gradients at once, {reason}; set it to whole or checkpointed"
            )));
        }
        let forecast = Step::of(config, inventory).forecast(self.begun);
        if processes == 1 || !config.train.shard_state {
            return Ok(forecast);
        }
        let elsewhere = inventory.states.iter().sum::<u64>() - largest_share(&inventory.states, processes);
        Ok(Forecast { state: forecast.state - elsewhere, peak: forecast.peak - elsewhere, ..forecast })
    }

    /// Inventory of a configuration; the model is built again only if its settings have changed.
    fn inventory(&self, config: &Config) -> Result<Inventory, BuildError> {
        let key = format!("{:?}", config.model);
        let mut last = self.blueprint.borrow_mut();
        if last.as_ref().is_none_or(|(made, _)| *made != key) {
            // Two models at a time would take twice the addresses.
            last.take();
        }
        let (_, blueprint) = match &mut *last {
            Some(made) => made,
            None => {
                let llama = (self.llama)(config)?;
                last.insert((key, Blueprint::of(config, &llama, self.adapter, self.rule, self.allocation)?))
            }
        };
        Inventory::of(config, blueprint, self.adapter, self.rule, self.allocation)
    }
}

/// Memory sizes of one step.
struct Step<'a> {
    inventory: &'a Inventory,
    backward: BackwardMode,
    micro_batches: u64,
    /// Input of a block.
    input: u64,
    /// Memory kept by a block, including its input.
    block: u64,
    /// Additional memory of a block's backward pass, without gradients of weights.
    gradients: u64,
    /// Additional memory of the loss: the logits of some rows.
    logits: u64,
}

impl<'a> Step<'a> {
    fn of(config: &Config, inventory: &'a Inventory) -> Self {
        let llama = &inventory.llama;
        let tokens = (config.train.batch * config.train.seq_len) as u64;
        let floats = |values: usize| 4 * tokens * values as u64;
        Self {
            inventory,
            backward: config.train.backward,
            micro_batches: config.train.accumulation as u64,
            input: floats(llama.hidden_size),
            block: floats(llama.kept() + inventory.branches) + 4 * inventory.kept_elements as u64,
            // The gradients of the gate and of its factor exist at the same time as the gradient of their product,
            // along with two running sums.
            gradients: floats(2 * llama.intermediate_size + 2 * llama.hidden_size) + 4 * inventory.kept_elements as u64,
            logits: 4 * tokens.min(ops::LOSS_ROWS as u64) * llama.vocab_size as u64,
        }
    }

    fn forecast(&self, begun: u64) -> Forecast {
        let ModelBytes { entry: embedding, blocks, head, largest, widest, .. } = &self.inventory.bytes;
        let total = self.inventory.total();
        let layers = blocks.len() as u64;
        let most = |of: fn(&SegmentBytes) -> u64| blocks.iter().map(of).max().unwrap_or(0);
        let block_grads = most(|part| part.trained);
        // With a tied embedding the loss computes the gradient of the table.
        let head_grads = if self.inventory.llama.tie_word_embeddings { embedding.trained } else { head.trained };
        // Norm, gradient of the loss at its input, and that of the head, which is computed with the loss.
        let loss = 3 * self.input + head_grads;
        let in_blocks: u64 = blocks.iter().map(|part| part.trained).sum();
        // Earlier micro-batches have accumulated all gradients.
        let gathered = if self.micro_batches > 1 { total.trained } else { 0 };
        let (activations, gradients, passes) = match self.backward {
            BackwardMode::Whole => {
                let kept = layers * self.block + loss;
                let first = kept + self.logits;
                let top = layers * self.block + head_grads + self.input + self.gradients + block_grads;
                let bottom = self.block + head_grads + in_blocks + self.gradients;
                let end = total.trained + self.input;
                (kept, total.trained, [first, top, bottom, end])
            }
            BackwardMode::Checkpointed => {
                let inputs = layers * self.input;
                let first = inputs + loss + self.logits;
                let top = inputs + head_grads + self.input + self.block + self.gradients + block_grads;
                // With accumulated gradients, those of a segment are added to them before the next ones are computed.
                let (above, all) = if gathered > 0 { (0, embedding.trained) } else { (in_blocks, total.trained) };
                let bottom = head_grads + above + self.block + self.gradients;
                let end = all + self.input;
                (inputs + self.block.max(loss), total.trained, [first, top, bottom, end])
            }
            BackwardMode::PerLayer => {
                let inputs = layers * self.input;
                let tied = if self.inventory.llama.tie_word_embeddings { embedding.trained } else { 0 };
                let first = inputs + loss + self.logits;
                let top = inputs + tied + self.input + self.block + self.gradients + block_grads;
                let end = embedding.trained + tied + self.input;
                let gradients = block_grads.max(head.trained).max(embedding.trained);
                (inputs + self.block.max(loss), gradients, [first, top, 0, end])
            }
        };
        // A narrow weight is widened for its update.
        let narrow = !matches!(
            self.inventory.storage,
            MatrixStorage::Wide | MatrixStorage::Frozen(_) | MatrixStorage::Trained(WeightStorage::F32)
        );
        let update = if narrow { gradients + gathered.saturating_sub(gradients) + 4 * widest } else { 0 };
        // A saved tensor is copied, and copied again in the order of its file; those of an adapter are copied all together. What an allocation
        // keeps is there as tensors, as a record, and twice as bytes.
        let saving = match self.inventory.adapted {
            true => total.trained + largest + 4 * layers * self.inventory.allocated,
            false => 2 * largest,
        };
        let work = passes.into_iter().map(|pass| pass + gathered).chain([saving, update]).max().unwrap_or(0);
        let program = PROGRAM + TOKENIZER * self.inventory.llama.vocab_size as u64;
        Forecast {
            weights: total.weights,
            gradients,
            trained: total.trained,
            state: total.state,
            activations,
            peak: program.max(begun) + total.weights + total.state + work,
        }
    }
}
