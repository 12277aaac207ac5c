//! Storage of the matrices of a run.

use lowrank_models::hub::gguf::BlockType;
use lowrank_models::linear::{LinearSteps, RunFacts};
use lowrank_models::{BaseStorage, LlamaConfig, MatrixStorage};
use lowrank_optim::WeightStorage;

use super::BuildError;
use crate::config::Config;

/// Inputs that share a scale in `q8_0`.
const Q8_0_BLOCK: usize = BlockType::Q8_0.values();

/// Returns the storage of the matrices of a run, trained or below an adapter. Rejects storages that it cannot have.
pub fn matrix_storage(config: &Config, llama: &LlamaConfig, adapted: bool) -> Result<MatrixStorage, BuildError> {
    let (trained, base, device) = (config.weights.storage, config.weights.base, &config.train.device);
    let refuse = |key: &str, value: &dyn std::fmt::Display, reason: String| {
        Err(BuildError::Settings(format!("weights.{key} = {value}: {reason}")))
    };
    let on_cpu = device == "cpu";
    if adapted {
        if trained != WeightStorage::F32 {
            let reason =
                "the tensors of an adapter are trained in f32; remove it, and set weights.base for the weights below";
            return refuse("storage", &trained, reason.into());
        }
        let inputs = llama.block_shapes().map(|[d_in, _]| d_in).chain([llama.hidden_size]);
        let uneven = inputs.into_iter().find(|d_in| !d_in.is_multiple_of(Q8_0_BLOCK));
        if let (BaseStorage::Q8_0, Some(d_in)) = (base, uneven) {
            let reason = format!("blocks of {Q8_0_BLOCK} do not divide the {d_in} inputs of a layer; set it to int8");
            return refuse("base", &base, reason);
        }
        return match (base, on_cpu) {
            // What other backends cannot compute with is widened.
            (BaseStorage::File, false) => Ok(MatrixStorage::Wide),
            (BaseStorage::F32, _) | (_, true) => Ok(MatrixStorage::Frozen(base)),
            _ => refuse(
                "base",
                &base,
                format!("train.device = {device} computes with f32 alone; set it to f32 or file, or train on the cpu"),
            ),
        };
    }
    if !matches!(base, BaseStorage::File | BaseStorage::F32) {
        let reason =
            "without an adapter all weights are trained; set weights.storage, or name an adapter with adapter.name";
        return refuse("base", &base, reason.into());
    }
    if trained == WeightStorage::F32 {
        return Ok(MatrixStorage::Trained(trained));
    }
    if !on_cpu {
        return refuse(
            "storage",
            &trained,
            format!("train.device = {device} computes with f32 alone; set it to f32, or train on the cpu"),
        );
    }
    let parameterization = &llama.parameterization;
    let name = parameterization.name();
    let run = RunFacts { seed: config.train.seed, width: llama.hidden_size };
    let steps: Option<Box<dyn LinearSteps>> = parameterization.method().steps(run);
    if steps.is_some() {
        return refuse(
            "storage",
            &trained,
            format!("{name} changes its weights in f32 besides the optimizer's steps; set it to f32"),
        );
    }
    if trained == WeightStorage::Int8 && !parameterization.is_dense() {
        return refuse(
            "storage",
            &trained,
            format!("the layers of {name} have no dense weight; set it to bf16 or 24bit"),
        );
    }
    let grid = config.optimizer.options.get("weight_bits").and_then(|bits| bits.as_u64());
    let has_grid = lowrank_optim::registry::optimizer(&config.optimizer.name)?
        .options()
        .get("weight_bits")
        .is_some_and(|option| option.default.as_ref().and_then(|bits| bits.as_u64()).unwrap_or(0) > 0);
    if grid.map_or(has_grid, |bits| bits > 0) {
        let reason = format!(
            "{} rounds weights to a grid of its own; set optimizer.options.weight_bits to 0",
            config.optimizer.name
        );
        return refuse("storage", &trained, reason);
    }
    Ok(MatrixStorage::Trained(trained))
}
