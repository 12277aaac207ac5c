//! Runs within a memory limit.

use lowrank_models::LlamaConfig;

use crate::build::{self, BuildError, Listener};
use crate::config::{Config, bytes};
use crate::plan::{self, Forecast, Forecaster, Freedom};
use crate::process::{MemoryUse, machine_memory};

/// Returns the configuration, changed as little as needed to stay within its memory limit.
pub(super) fn fitting(
    config: Config,
    freedom: Freedom,
    forecaster: Forecaster<'_>,
    mapped: u64,
    listener: &dyn Listener,
) -> Result<(Config, Option<Forecast>), BuildError> {
    let Some(limit) = plan::limit(&config)? else { return Ok((config, None)) };
    if config.train.device != "cpu" {
        listener.warn("the forecast of memory counts what the CPU's operations keep; on a GPU more is needed");
    }
    let shape = forecaster.shape(&config)?;
    // Tokenizer, examples and token files are already in memory.
    let begun = MemoryUse::now();
    if begun.peak > limit {
        listener.warn(&format!("reading the data took {} already, more than train.memory", bytes(begun.peak)));
    }
    let forecaster = forecaster.beginning_at(begun.rss + mapped);
    let chosen = plan::choose(&config, freedom, &shape, &|config| forecaster.forecast(config))?;
    listener.line(&format!("within {}: {}; {} expected", bytes(limit), chosen.describe(), bytes(chosen.forecast.peak)));
    Ok((chosen.config, Some(chosen.forecast)))
}

/// Fills in settings that follow from the model's shape, and rejects sizes beyond the memory of the machine.
pub(super) fn complete(
    config: &mut Config,
    freedom: Freedom,
    llama: &LlamaConfig,
    listener: &dyn Listener,
) -> Result<(), BuildError> {
    if freedom.seq_len
        && let Some(positions) = build::usual_length(config, llama)
    {
        listener.line(&format!("train.seq_len = {positions}: all positions of the model, since none is given"));
    }
    with_usual_rank(config, llama.hidden_size, listener);
    if let Some(rank) = build::set_usual_layer_rank(&mut config.model, llama)? {
        listener.line(&format!(
            "model.parameterization.options.rank = {rank}: a quarter of the model's width, or its narrowest layer, since {} needs a rank and none is given",
            config.model.parameterization.name
        ));
    }
    build::check_sizes(config, llama, machine_memory())
}

/// Sets the rank of an optimizer that needs one and has none.
pub(super) fn with_usual_rank(config: &mut Config, hidden_size: usize, listener: &dyn Listener) {
    if let Some(rank) = build::usual_rank(config, hidden_size) {
        listener.line(&format!(
            "optimizer.options.rank = {rank}: a quarter of the model's width, since {} needs a rank and none is given",
            config.optimizer.name
        ));
    }
}
