//! What a run needs before its first step: data, shape of the model, optimizer.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use burn::optim::ModuleOptimizer;
use lowrank_models::adapter::{GradientRule, Rule};
use lowrank_models::hub::{HubConfig, ModelFolder};
use lowrank_models::linear::PARAMETERIZATIONS;
use lowrank_models::{Llama, LlamaConfig, Parameterization};
use lowrank_optim::loro::{LoroConfig, LoroSteps};
use lowrank_optim::registry::{self, OptionValue, Options};
use lowrank_optim::{MomentResets, StateMeter, Stepped};
use serde_json::{Map, Value};

use super::JobError;
use crate::config::{Config, ModelSection};
use crate::data::{
    Format, PrepareOptions, Prepared, Progress, Source, Stage, TokenizerChoice, default_corpus, prepare,
};
use crate::engine::{Cycle, Restarts, Schedule, ScheduleKind};
use crate::run::{BlockAllocator, Screen};

/// The shape of the model in the default job: learns something worth seeing in some minutes on two cores.
fn default_shape(vocab_size: usize) -> LlamaConfig {
    LlamaConfig {
        vocab_size,
        hidden_size: 256,
        intermediate_size: 688,
        num_hidden_layers: 4,
        num_attention_heads: 4,
        num_key_value_heads: 4,
        head_dim: 64,
        max_position_embeddings: 1024,
        rope_theta: 10_000.0,
        rms_norm_eps: 1e-6,
        tie_word_embeddings: true,
        initializer_range: 0.02,
        parameterization: Parameterization::Dense,
    }
}

/// What the linear layers hold, of the options that are given and the defaults of the others.
fn parameterization(model: &ModelSection) -> Result<Parameterization, JobError> {
    let name = model.parameterization.as_str();
    let Some(method) = PARAMETERIZATIONS.iter().find(|method| method.name == name) else {
        let known: Vec<&str> = PARAMETERIZATIONS.iter().map(|method| method.name).collect();
        return Err(JobError::Settings(format!(
            "model.parameterization = {name}: it must be one of {}",
            known.join(", ")
        )));
    };
    let given = [
        ("rank", model.rank.map(Value::from)),
        ("alpha", model.alpha.map(Value::from)),
        ("density", model.density.map(Value::from)),
        ("trained_scale", model.trained_scale.map(Value::from)),
        ("init", model.init.clone().map(Value::from)),
        ("gamma", model.gamma.map(Value::from)),
        ("keep_gate", model.keep_gate.map(Value::from)),
        ("reset_every", model.reset_every.map(Value::from)),
        ("restart_warmup", model.restart_warmup.map(Value::from)),
        ("reset", model.reset.clone().map(Value::from)),
        ("exact_every", model.exact_every.map(Value::from)),
        ("lr_scaler", model.lr_scaler.map(Value::from)),
    ];
    let mut values = Map::from_iter([("name".to_string(), Value::from(name))]);
    for (option, default, _) in method.options {
        // Words are no JSON.
        let default = serde_json::from_str(default).unwrap_or_else(|_| Value::from(*default));
        values.insert(option.to_string(), default);
    }
    for (option, value) in given {
        let Some(value) = value else { continue };
        if values.insert(option.to_string(), value).is_none() {
            return Err(JobError::Settings(format!(
                "model.{option} has no meaning with model.parameterization = {name}; take it away"
            )));
        }
    }
    serde_json::from_value(Value::Object(values))
        .map_err(|error| JobError::Settings(format!("model.parameterization = {name}: {error}")))
}

/// What the configuration says of text and tokenizer.
pub fn prepare_options(config: &Config) -> Result<PrepareOptions, JobError> {
    let folder = model_folder(&config.model);
    let tokenizer = match config.tokenizer.path.as_str() {
        "bytes" => TokenizerChoice::Bytes,
        // A model that exists has a tokenizer of its own.
        "" => match folder.map(|folder| folder.join("tokenizer.json")).filter(|path| path.exists()) {
            Some(path) => TokenizerChoice::File(path),
            None => TokenizerChoice::Train(config.tokenizer.vocab_size),
        },
        path => TokenizerChoice::File(PathBuf::from(path)),
    };
    let (paths, format) = match config.data.path.is_empty() {
        true => (default_corpus()?, Format::Text),
        false => (config.data.path.clone(), config.data.format),
    };
    Ok(PrepareOptions {
        source: Source { paths, format, field: config.data.field.clone() },
        tokenizer,
        validation_fraction: config.data.validation_fraction,
        seed: config.train.seed,
    })
}

/// Prepares the data, showing how far it is.
pub fn prepare_data(config: &Config, screen: &mut Screen) -> Result<Prepared, JobError> {
    let options = prepare_options(config)?;
    let mut shown = None;
    let mut show = |Progress { stage, done, total }: Progress| {
        if shown != Some(stage) {
            shown = Some(stage);
            let what = match stage {
                Stage::Scan => "reading the text",
                Stage::TrainTokenizer => "training the tokenizer",
                Stage::Encode => "turning text into tokens",
                Stage::Verify => "checking the tokens",
            };
            screen.begin(what, total);
        }
        screen.advance(done);
    };
    let prepared = prepare(&options, &config.data.cache, &mut show)?;
    if config.data.verify {
        prepared.train.verify(&mut show)?;
        prepared.validation.verify(&mut show)?;
    }
    let fresh = shown.is_some_and(|stage| stage != Stage::Verify);
    screen.end();
    // Training a tokenizer takes more than it leaves.
    BlockAllocator::begin_anew();
    let skipped = prepared.facts.skipped;
    if fresh && !skipped.is_nothing() {
        screen.line(&skipped.to_string());
    }
    Ok(prepared)
}

/// The folder of a model to go on from, when the section names one rather than a shape.
pub(crate) fn model_folder(model: &ModelSection) -> Option<&Path> {
    let path = Path::new(&model.name);
    path.join("config.json").exists().then_some(path)
}

/// The model's configuration, with further keys for `config.json`.
pub fn model_config(model: &ModelSection, vocab_size: usize, separator: u32) -> Result<HubConfig, JobError> {
    if let Some(folder) = model_folder(model) {
        let mut hub = ModelFolder::open(folder)?.config;
        if vocab_size > hub.llama.vocab_size {
            return Err(JobError::Settings(format!(
                "the tokenizer has {vocab_size} ids, the model in {} has an embedding for {}; use the model's own tokenizer",
                folder.display(),
                hub.llama.vocab_size
            )));
        }
        let kept = match model.parameterization == "relora" {
            true => ModelSection { name: String::new(), ..shapeless(model) },
            false => ModelSection::default(),
        };
        if (ModelSection { name: String::new(), ..model.clone() }) != kept {
            return Err(JobError::Settings(format!(
                "model.name = {} is a folder with a shape of its own; take the other model.* keys away (relora, which stands on a dense model, may stay)",
                folder.display()
            )));
        }
        if model.parameterization == "relora" {
            if hub.llama.parameterization != Parameterization::Dense {
                return Err(JobError::Settings(format!(
                    "model.parameterization = relora stands on a dense model; the layers of {} are {}: go on with them without that key, or `lowrank export` first",
                    folder.display(),
                    hub.llama.parameterization.name()
                )));
            }
            hub.llama.parameterization = parameterization(model)?;
            hub.llama.validate()?;
        }
        return Ok(hub);
    }
    let mut llama = match model.name.as_str() {
        "" => default_shape(vocab_size),
        name => LlamaConfig::named(name, vocab_size)?,
    };
    let reshaped = model.hidden_size.is_some() || model.num_attention_heads.is_some();
    macro_rules! take {
        ($($field:ident),*) => {$( if let Some(value) = model.$field { llama.$field = value; } )*};
    }
    take!(hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, max_position_embeddings);
    take!(rope_theta, rms_norm_eps, tie_word_embeddings);
    if reshaped || model.num_key_value_heads.is_some() {
        llama.num_key_value_heads = model.num_key_value_heads.unwrap_or(llama.num_attention_heads);
    }
    match model.head_dim {
        Some(head_dim) => llama.head_dim = head_dim,
        None if reshaped => {
            llama.head_dim = LlamaConfig::default_head_dim(llama.hidden_size, llama.num_attention_heads)?
        }
        None => {}
    }
    llama.parameterization = parameterization(model)?;
    llama.validate()?;
    let extra = ["bos_token_id", "eos_token_id"].map(|key| (key.to_string(), separator.into()));
    Ok(HubConfig { llama, extra: Map::from_iter(extra) })
}

/// The section without the keys that give a shape.
fn shapeless(model: &ModelSection) -> ModelSection {
    ModelSection {
        hidden_size: None,
        intermediate_size: None,
        num_hidden_layers: None,
        num_attention_heads: None,
        num_key_value_heads: None,
        head_dim: None,
        max_position_embeddings: None,
        rope_theta: None,
        rms_norm_eps: None,
        tie_word_embeddings: None,
        ..model.clone()
    }
}

/// What turns gradients into updates.
pub(crate) struct Optimizer {
    pub optimizer: ModuleOptimizer,
    /// What changes gradients before.
    pub rule: Option<GradientRule>,
    /// Who steps each parameter.
    pub parameters: Vec<Stepped>,
}

/// The options of the optimizer that the configuration gives.
pub(crate) fn optimizer_options(config: &Config) -> Result<Options, JobError> {
    let section = &config.optimizer;
    let mut options = Options::from([("weight_decay".to_string(), OptionValue::Number(section.weight_decay))]);
    for (name, value) in &section.options {
        let value = match value {
            toml::Value::Boolean(flag) => OptionValue::Flag(*flag),
            toml::Value::Integer(count) => OptionValue::Count(*count),
            toml::Value::Float(number) => OptionValue::Number(*number),
            toml::Value::String(text) => OptionValue::Text(text.clone()),
            other => {
                return Err(JobError::Settings(format!(
                    "optimizer.{name} = {other}: it must be a number, a text, true or false"
                )));
            }
        };
        options.insert(name.clone(), value);
    }
    Ok(options)
}

/// The optimizer of the configuration for what of this model is trained.
pub(crate) fn optimizer(
    config: &Config,
    rule: &Rule,
    model: &Llama,
    cycle: &Cycle,
    meter: &StateMeter,
) -> Result<Optimizer, JobError> {
    let section = &config.optimizer;
    let method = registry::find(&section.name)?;
    let options = optimizer_options(config)?;
    let options = rule.options(method.name, options)?;
    let mut hidden = rule.parameters(model);
    if !section.include.is_empty() {
        hidden = hidden.including(&section.include)?;
    }
    if !section.exclude.is_empty() {
        hidden = hidden.excluding(&section.exclude)?;
    }
    let (optimizer, parameters) = match cycle {
        Cycle::None => method.init(&options, &hidden, meter)?,
        Cycle::ReLora { resets, .. } => method.init_resettable(&options, &hidden, meter, resets)?,
        Cycle::Loro { steps, .. } => loro(config, &options, model)?.init(&hidden, meter, steps)?,
    };
    Ok(Optimizer { optimizer, rule: rule.gradient_rule(model, &options, meter)?, parameters })
}

/// The optimizer that belongs to LORO, with the options that are given.
fn loro(config: &Config, options: &Options, model: &Llama) -> Result<LoroConfig, JobError> {
    let refuse = |key: &str, value: &str, reason: &str| {
        Err(JobError::Settings(format!("optimizer.{key} = {value} with model.parameterization = loro: {reason}")))
    };
    let section = &config.optimizer;
    if section.name != "adamw" {
        return refuse("name", &section.name, "its exact steps are made of the moments of Adam; take adamw");
    }
    for (key, pattern) in [("include", &section.include), ("exclude", &section.exclude)] {
        if !pattern.is_empty() {
            return refuse(key, pattern, "both factors of every layer are stepped together; take it away");
        }
    }
    let Parameterization::Loro { rank, lr_scaler, .. } = model.config().parameterization else {
        unreachable!("the cycle was made of the parameterization");
    };
    let own_scale = rank as f64 / model.config().hidden_size as f64;
    let mut loro = LoroConfig::new(if lr_scaler == -1.0 { own_scale } else { lr_scaler });
    for (key, value) in options {
        let field = match key.as_str() {
            "beta_1" => &mut loro.beta_1,
            "beta_2" => &mut loro.beta_2,
            "epsilon" => &mut loro.epsilon,
            "weight_decay" => &mut loro.weight_decay,
            _ => return refuse(key, &value.to_string(), "it has beta_1, beta_2, epsilon and weight_decay"),
        };
        *field = match value {
            OptionValue::Number(number) => *number,
            OptionValue::Count(count) => *count as f64,
            _ => return refuse(key, &value.to_string(), "it must be a number"),
        };
    }
    Ok(loro)
}

/// What the parameterization does around updates.
pub(crate) fn cycle(config: &Config, parameterization: &Parameterization) -> Cycle {
    match parameterization {
        Parameterization::ReLora { reset_every, reset, .. } => Cycle::ReLora {
            every: *reset_every,
            keep: *reset,
            seed: config.train.seed,
            resets: MomentResets::default(),
        },
        Parameterization::Loro { exact_every, .. } => Cycle::Loro { every: *exact_every, steps: LoroSteps::default() },
        _ => Cycle::None,
    }
}

/// The schedule of the configuration for a run of so many steps, which must fit the restarts of the parameterization.
pub(super) fn schedule(
    config: &Config,
    parameterization: &Parameterization,
    total_steps: Option<u64>,
) -> Result<Schedule, JobError> {
    let section = &config.schedule;
    let warmup_steps = match (section.warmup_steps, total_steps) {
        (0, Some(total)) => (section.warmup_fraction * total as f64).ceil() as u64,
        (steps, _) => steps,
    };
    let name = parameterization.name();
    let refuse = |reason: String| Err(JobError::Settings(reason));
    let jagged = section.kind == ScheduleKind::CosineRestarts;
    let restarts = match parameterization {
        Parameterization::ReLora { reset_every, .. } if *reset_every <= warmup_steps => {
            return refuse(format!(
                "model.reset_every = {reset_every}: the first restart would come inside the {warmup_steps} steps of schedule.warmup_steps; raise one or lower the other"
            ));
        }
        Parameterization::ReLora { .. } if !jagged => {
            return refuse(format!(
                "schedule.kind with {name}: a restart needs a learning rate that falls to 0 and comes back; set schedule.kind=cosine-restarts"
            ));
        }
        Parameterization::ReLora { reset_every, restart_warmup, .. } => Restarts {
            every: *reset_every,
            warmup_steps: *restart_warmup,
            adjust_steps: section.adjust_steps,
            in_warmup: false,
        },
        // All state begins anew after an exact step, also where the first warm-up has not come to its end.
        Parameterization::Loro { exact_every, restart_warmup, .. } => Restarts {
            every: *exact_every,
            warmup_steps: *restart_warmup,
            adjust_steps: section.adjust_steps,
            in_warmup: true,
        },
        _ if jagged => {
            return refuse(format!("schedule.kind = cosine-restarts: {name} has no restarts; relora and loro have"));
        }
        _ => Restarts::default(),
    };
    if jagged && section.final_fraction == 0.0 {
        return refuse(
            "schedule.final_fraction = 0: it must be greater than 0 with schedule.kind = cosine-restarts".into(),
        );
    }
    if !jagged && section.adjust_steps > 0 {
        return refuse(
            "schedule.adjust_steps has no meaning without schedule.kind = cosine-restarts; take it away".into(),
        );
    }
    Ok(Schedule {
        kind: section.kind,
        peak: config.optimizer.lr,
        warmup_steps,
        total_steps,
        final_fraction: section.final_fraction,
        decay_fraction: section.decay_fraction,
        restarts,
    })
}

/// What is allowed and probably not meant.
pub(super) fn doubts(config: &Config, llama: &LlamaConfig, total_steps: Option<u64>) -> Vec<String> {
    let mut doubts = Vec::new();
    let parameterization = &llama.parameterization;
    let name = parameterization.name();
    let wide = |[d_in, d_out]: &[usize; 2]| {
        let held = parameterization.values(*d_in, *d_out) + parameterization.positions(*d_in, *d_out);
        *parameterization != Parameterization::Dense && held >= d_in * d_out
    };
    if let Some([d_in, d_out]) = llama.block_shapes().find(wide) {
        doubts.push(format!(
            "{name} saves nothing: in place of the {} values of a {d_in} x {d_out} weight it trains {} and keeps {} positions; lower the rank or the density",
            d_in * d_out,
            parameterization.values(d_in, d_out),
            parameterization.positions(d_in, d_out)
        ));
    }
    if let (Parameterization::ReLora { reset_every, .. }, Some(steps)) = (parameterization, total_steps) {
        if !steps.is_multiple_of(*reset_every) {
            doubts.push(format!(
                "the {steps} steps of the run are no multiple of model.reset_every = {reset_every}: the last cycle has {} steps",
                steps % reset_every
            ));
        }
        if !config.schedule.adjust_steps.is_multiple_of(*reset_every) {
            doubts.push(format!(
                "schedule.adjust_steps = {} is no multiple of model.reset_every = {reset_every}: the learning rate is not 0 where the factors restart",
                config.schedule.adjust_steps
            ));
        }
    }
    doubts
}

/// One line for each setting that differs.
pub(super) fn differences(before: &BTreeMap<String, String>, now: &BTreeMap<String, String>) -> Vec<String> {
    let none = "unset".to_string();
    let keys: std::collections::BTreeSet<&String> = before.keys().chain(now.keys()).collect();
    keys.into_iter()
        .filter(|key| before.get(*key) != now.get(*key))
        .map(|key| format!("  {key} = {} (now {})", before.get(key).unwrap_or(&none), now.get(key).unwrap_or(&none)))
        .collect()
}
