//! Adapter and training rule of a configuration.

use std::path::Path;
use std::str::FromStr;

use lowrank_models::adapter::{AdapterConfig, Rule, StructureEntry, Targets};
use lowrank_models::hub::peft::PeftFolder;

use super::BuildError;
use crate::config::{AdapterSection, Config, RuleSection};

/// Returns the training rule of the configuration.
pub fn rule(section: &RuleSection) -> Result<Box<dyn Rule>, BuildError> {
    Ok(<dyn Rule>::named(&section.name, &section.options)?)
}

/// Folder of an adapter to continue training, if the configuration names one instead of a structure.
pub fn adapter_folder(section: &AdapterSection) -> Result<Option<PeftFolder>, BuildError> {
    if !names_adapter_folder(section) {
        return Ok(None);
    }
    alone(section, "the folder says what the adapter is")?;
    Ok(Some(PeftFolder::open(Path::new(&section.name))?))
}

/// Returns true if the section names a folder rather than a structure or none.
pub fn names_adapter_folder(section: &AdapterSection) -> bool {
    let name = section.name.as_str();
    !name.is_empty() && name != WHOLE && StructureEntry::find(name).is_err() && Path::new(name).is_dir()
}

/// Rejects other keys of the section in addition to the name.
fn alone(section: &AdapterSection, reason: &str) -> Result<(), BuildError> {
    let name = &section.name;
    match *section == (AdapterSection { name: name.clone(), ..AdapterSection::default() }) {
        true => Ok(()),
        false => {
            Err(BuildError::Settings(format!("adapter.name = {name}: {reason}; take the other adapter.* keys away")))
        }
    }
}

/// Adapter of the configuration; none if all weights are trained.
pub fn adapter(config: &Config) -> Result<Option<AdapterConfig>, BuildError> {
    let section = &config.adapter;
    if section.name == WHOLE {
        alone(section, "all weights are trained")?;
        return Ok(None);
    }
    let targets = |text: &String| (!text.is_empty()).then(|| Targets::parse(text));
    Ok(Some(AdapterConfig {
        structure: section.name.clone(),
        rank: section.rank,
        alpha: section.alpha,
        scaling: section.scaling,
        dropout: section.dropout,
        init: section.init.clone(),
        targets: targets(&section.targets).unwrap_or_default(),
        exclude: targets(&section.exclude),
        layers: (!section.layers.is_empty()).then(|| section.layers.clone()),
        modules_to_save: section.modules_to_save.clone(),
        bias: section.bias,
        rank_pattern: patterns("adapter.rank_pattern", &section.rank_pattern)?,
        alpha_pattern: patterns("adapter.alpha_pattern", &section.alpha_pattern)?,
        seed: config.train.seed,
        options: section.options.clone(),
        ..AdapterConfig::default()
    }))
}

/// Name that stands for no adapter.
const WHOLE: &str = "none";

fn patterns<T: FromStr>(key: &str, given: &[String]) -> Result<Vec<(String, T)>, BuildError> {
    let parsed = given.iter().map(|text| {
        let (pattern, value) = text.rsplit_once('=')?;
        Some((pattern.trim().to_string(), value.trim().parse().ok()?))
    });
    let wrong = |text: &String| BuildError::Settings(format!("{key} = \"{text}\": write it as PATTERN=NUMBER"));
    parsed.zip(given).map(|(pair, text)| pair.ok_or_else(|| wrong(text))).collect()
}
