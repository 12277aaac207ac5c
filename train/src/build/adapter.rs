//! Adapter and training rule of a configuration.

use std::collections::BTreeMap;
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
    let chosen = match section.targets.strip_prefix('@') {
        Some(name) => Some(modules_of_file(name)?),
        None => targets(&section.targets),
    };
    let of_file = rank_file(section)?;
    let (targets_of_file, rank_pattern) = match of_file {
        Some((targets, ranks)) => (Some(targets), ranks),
        None => (None, patterns("adapter.rank_pattern", &section.rank_pattern)?),
    };
    Ok(Some(AdapterConfig {
        structure: section.name.clone(),
        rank: section.rank,
        alpha: section.alpha,
        scaling: section.scaling,
        dropout: section.dropout,
        init: section.init.clone(),
        targets: targets_of_file.or(chosen).unwrap_or_default(),
        exclude: targets(&section.exclude),
        layers: (!section.layers.is_empty()).then(|| section.layers.clone()),
        modules_to_save: section.modules_to_save.clone(),
        bias: section.bias,
        rank_pattern,
        alpha_pattern: patterns("adapter.alpha_pattern", &section.alpha_pattern)?,
        seed: config.train.seed,
        options: section.options.clone(),
        ..AdapterConfig::default()
    }))
}

/// Adapted layers, and patterns of their ranks.
type LayerRanks = (Targets, Vec<(String, usize)>);

/// Layers and ranks of the file that `adapter.rank_pattern = @FILE` names: the `rank.json` of a run with an allocation.
/// Layers of rank 0 are left out. The layers must exist in the model: their patterns are checked as those of a user.
fn rank_file(section: &AdapterSection) -> Result<Option<LayerRanks>, BuildError> {
    let refuse = |reason: String| Err(BuildError::Settings(format!("adapter.rank_pattern = {reason}")));
    let Some(name) = section.rank_pattern.iter().find_map(|text| text.strip_prefix('@')) else { return Ok(None) };
    let defaults = AdapterSection::default();
    if section.rank_pattern.len() > 1 || section.targets != defaults.targets || !section.exclude.is_empty() {
        return refuse(format!(
            "@{name}: the file says which layers are adapted, and at which rank; remove other patterns, adapter.targets and adapter.exclude"
        ));
    }
    #[derive(serde::Deserialize)]
    struct Layer {
        rank: usize,
    }
    #[derive(serde::Deserialize)]
    struct Ranks {
        layers: BTreeMap<String, Layer>,
    }
    let ranks: Ranks = match json_of(name) {
        Ok(ranks) => ranks,
        Err(error) => {
            return refuse(format!("@{name}: {error}; name the rank.json of a run that was trained with --allocation"));
        }
    };
    let kept: Vec<(String, usize)> =
        ranks.layers.into_iter().filter(|(_, layer)| layer.rank > 0).map(|(path, layer)| (path, layer.rank)).collect();
    if kept.is_empty() {
        return refuse(format!("@{name}: no layer in it has a rank above 0"));
    }
    let targets = Targets::Names(kept.iter().map(|(path, _)| path.clone()).collect());
    Ok(Some((targets, kept.into_iter().map(|(path, rank)| (regex::escape(&path), rank)).collect())))
}

/// Layers of the file that `adapter.targets = @FILE` names: the `modules.json` of a run that selected layers.
fn modules_of_file(name: &str) -> Result<Targets, BuildError> {
    #[derive(serde::Deserialize)]
    struct Selected {
        modules: Vec<String>,
    }
    let refuse = |reason: String| Err(BuildError::Settings(format!("adapter.targets = @{name}: {reason}")));
    match json_of(name) {
        Ok(Selected { modules }) if modules.is_empty() => refuse("the file selects no layer".into()),
        Ok(Selected { modules }) => Ok(Targets::Names(modules)),
        Err(error) => refuse(format!("{error}; name the modules.json of a run that selected layers")),
    }
}

/// A JSON file of a run, or the reason why it cannot be read as such.
fn json_of<T: serde::de::DeserializeOwned>(name: &str) -> Result<T, String> {
    let text = std::fs::read_to_string(name).map_err(|error| error.to_string())?;
    serde_json::from_str(&text).map_err(|error| error.to_string())
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
